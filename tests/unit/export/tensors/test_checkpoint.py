from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from golden import tiny_checkpoint
from l2p_export.checkpoint.loading import checkpoint_record, load_model
from l2p_export.tensors.digests import weights_digest
from l2p_export.tensors.sources import FileTensor, read_tensor
from l2p_runtime.tensorfile import open_tensorfile

STATE = tiny_checkpoint.checkpoint(16)


def _spell(prefix: str, *, fused: bool) -> dict[str, np.ndarray]:
    names = tiny_checkpoint.fused(STATE) if fused else {f"model.diffusion_model.{name}": v for name, v in STATE.items()}
    return {prefix + name.removeprefix("model.diffusion_model."): value for name, value in names.items()}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("fused", [False, True])
def test_every_spelling_reads_as_the_published_one(tmp_path: Path, prefix: str, *, fused: bool) -> None:
    save_file(_spell(prefix, fused=fused), tmp_path / "x.safetensors")
    checkpoint = load_model(tmp_path / "x.safetensors").checkpoint
    assert checkpoint.tensors.keys() == STATE.keys()
    assert (checkpoint.spelling.prefix, checkpoint.spelling.fused) == (prefix, fused)
    for name, source in checkpoint.tensors.items():
        np.testing.assert_array_equal(read_tensor(source), STATE[name])


def test_the_trunk_digest_is_blind_to_spelling_and_to_what_bf16_drops(tmp_path: Path, tiny_path: Path) -> None:
    save_file(_spell("model.diffusion_model.", fused=True), tmp_path / "fused.safetensors")
    bf16 = {name: torch.from_numpy(value).to(torch.bfloat16) for name, value in STATE.items()}
    save_torch(bf16, tmp_path / "bf16.safetensors")
    paths = (tiny_path, tmp_path / "fused.safetensors", tmp_path / "bf16.safetensors")
    records = [checkpoint_record(load_model(path)) for path in paths]
    assert len({record.trunk_sha256 for record in records}) == 1
    assert len({record.fingerprint for record in records}) == 1


def test_the_trunk_digest_sees_the_trunk_alone(tmp_path: Path, tiny_path: Path) -> None:
    expected = checkpoint_record(load_model(tiny_path)).trunk_sha256
    for name, same in (("layers.0.attention_norm1.weight", True), ("layers.1.attention_norm1.weight", False)):
        save_file(STATE | {name: STATE[name] + 1}, tmp_path / "x.safetensors")
        assert (checkpoint_record(load_model(tmp_path / "x.safetensors")).trunk_sha256 == expected) is same


def test_digest_by_hand(tmp_path: Path) -> None:
    import hashlib

    save_file({"b": np.ones(3, np.float32), "a": np.full((1, 2), 2.0, np.float32)}, tmp_path / "x.safetensors")
    file = open_tensorfile(tmp_path / "x.safetensors")
    sources = {name: FileTensor(file, info, info.shape) for name, info in file.tensors.items()}
    expected = hashlib.sha256(b"a\0" + b"\x00\x40" * 2 + b"b\0" + b"\x80\x3f" * 3).hexdigest()
    assert weights_digest(sources, ["b", "a"]) == expected


@settings(max_examples=25)
@given(st.integers(1, 40), st.integers(1, 9), st.sampled_from(["F32", "BF16", "F16", "F64"]))
def test_chunks_join_to_the_whole(
    tmp_path_factory: pytest.TempPathFactory, chunk_bytes: int, rows: int, dtype: str
) -> None:
    path = tmp_path_factory.mktemp("chunks") / "x.safetensors"
    torch_dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}[dtype]
    values = torch.randn(3 * rows, 5, generator=torch.Generator().manual_seed(rows)).to(torch_dtype)
    save_torch({"x": values}, path)
    file = open_tensorfile(path)
    source = FileTensor(file, file.tensors["x"], (rows, 5), first_row=rows)
    joined = np.concatenate(list(source.chunks(chunk_bytes)))
    np.testing.assert_array_equal(joined, values[rows : 2 * rows].to(torch.float32).numpy().reshape(-1))
    np.testing.assert_array_equal(read_tensor(source).reshape(-1), joined)


def test_bf16_rounding_is_to_nearest_even() -> None:
    values = np.asarray([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20], np.float32)
    assert values.astype(ml_dtypes.bfloat16).astype(np.float32).tolist() == [1.0, 1.015625, 1.0078125]


def test_a_folder_with_one_file_will_do(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "x.safetensors")
    assert load_model(tmp_path).checkpoint.path.name == "x.safetensors"
