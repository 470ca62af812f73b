from __future__ import annotations

import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

from l2p_runtime.tensorfile import open_tensorfile, write_tensorfile

NAMES = st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__" and name.isprintable())


def test_files_of_the_library_are_read(tmp_path: Path) -> None:
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b.c": np.ones(4, np.int64), "s": np.float32(2)[()]}
    tensors["s"] = np.asarray(2.0, np.float32)
    save_file(tensors, tmp_path / "x.safetensors", {"k": "v"})
    file = open_tensorfile(tmp_path / "x.safetensors")
    assert dict(file.metadata) == {"k": "v"}
    for name, value in tensors.items():
        np.testing.assert_array_equal(file.read(name), value)


def test_the_library_reads_ours(tmp_path: Path) -> None:
    tensors = {"x": np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32), "m": np.asarray([True, False])}
    write_tensorfile(tmp_path / "x.safetensors", tensors, {"k": "v"})
    for name, value in load_file(tmp_path / "x.safetensors").items():
        np.testing.assert_array_equal(value, tensors[name])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int64", "int16", "bool"])
def test_every_dtype_and_layout_is_written(tmp_path: Path, dtype: str) -> None:
    values = (np.arange(12).reshape(3, 4) % 5 - 2).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    tensors = {"rows": values, "columns": values.T, "steps": values[::2, ::3], "one": values[1, 1], "none": values[:0]}
    write_tensorfile(tmp_path / "x.safetensors", {name: np.asarray(value) for name, value in tensors.items()})
    found = load_torch(tmp_path / "x.safetensors")
    for name, value in tensors.items():
        assert str(found[name].dtype) == f"torch.{dtype}"
        assert found[name].tolist() == value.tolist()


def test_a_file_that_cannot_be_finished_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tensorfile(tmp_path / "x.safetensors", {"x": np.ones(3, np.float32)})
    before = (tmp_path / "x.safetensors").read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_tensorfile(tmp_path / "x.safetensors", {"x": np.zeros(3, np.float32)})
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]


def test_data_starts_on_a_page(tmp_path: Path) -> None:
    write_tensorfile(tmp_path / "x.safetensors", {"x": np.ones(3, np.float32)})
    assert open_tensorfile(tmp_path / "x.safetensors").tensors["x"].offset % 4096 == 0


def test_bf16_comes_as_bits(tmp_path: Path) -> None:
    save_torch({"x": torch.tensor([1.0, -2.0], dtype=torch.bfloat16)}, tmp_path / "x.safetensors")
    assert open_tensorfile(tmp_path / "x.safetensors").read("x").tolist() == [0x3F80, 0xC000]


@settings(max_examples=30)
@given(st.dictionaries(NAMES,
                       st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=6))  # fmt: skip
def test_any_names_and_shapes_survive(tmp_path_factory: pytest.TempPathFactory, shapes: dict[str, list[int]]) -> None:
    path = tmp_path_factory.mktemp("any") / "x.safetensors"
    tensors = {name: np.full(shape, index, np.float32) for index, (name, shape) in enumerate(shapes.items())}
    write_tensorfile(path, tensors)
    file = open_tensorfile(path)
    for name, value in tensors.items():
        np.testing.assert_array_equal(file.read(name), value)


@pytest.mark.parametrize("extra", range(256))
def test_a_header_of_any_length_is_no_pickle(tmp_path: Path, extra: int) -> None:
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "x.safetensors", {"k": "v" * extra})
    assert open_tensorfile(tmp_path / "x.safetensors").metadata["k"] == "v" * extra
