from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from golden import tiny_checkpoint
from l2p_engines.store.stages import Home, StageRunner
from l2p_export.checkpoint.loading import LoadedModel, load_model, trunk_digest
from l2p_export.tensors.digests import WeightDigests, weight_digests
from l2p_runtime.errors import HostError
from l2p_runtime.progress import Silent


def digests(loaded: LoadedModel, home: Path, reporter: Silent | None = None) -> WeightDigests:
    names = {spec.name: tuple(loaded.model.network_shapes(spec.name)) for spec in loaded.model.networks}
    tensors, files = loaded.checkpoint.tensors, loaded.files
    return weight_digests(StageRunner(Home(home)), "x", tensors, names, files, {}, reporter or Silent())


class Counting(Silent):
    """Counts the stages that ran."""

    def __init__(self) -> None:
        self.titles: list[str] = []

    def task(self, title: str, total: int = 0, unit: str = "bytes"):  # type: ignore[no-untyped-def]
        self.titles.append(title)
        return super().task(title, total, unit)


def test_spellings_of_equal_values_agree(tiny_path: Path, tmp_path: Path) -> None:
    fused = tmp_path / "fused.safetensors"
    save_file(tiny_checkpoint.fused(tiny_checkpoint.checkpoint()), fused)
    split = digests(load_model(tiny_path), tmp_path)
    assert split == digests(load_model(fused), tmp_path)
    assert split.trunk_sha256 == trunk_digest(load_model(tiny_path))


def test_only_the_network_that_changed_differs(tiny_path: Path, tmp_path: Path) -> None:
    state = load_file(tiny_path)
    state["local_decoder.out_conv.bias"] = np.nextafter(state["local_decoder.out_conv.bias"], np.float32(9))
    save_file(state, tmp_path / "other.safetensors")
    before, after = (digests(load_model(path), tmp_path) for path in (tiny_path, tmp_path / "other.safetensors"))
    changed = [name for name, digest in before.groups if after.of(name) != digest]
    assert changed == ["head"]
    assert before.trunk_sha256 == after.trunk_sha256


def test_files_that_did_not_change_are_not_read_again(tiny_path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(tiny_path.read_bytes())
    reporter = Counting()
    first = digests(load_model(copy), tmp_path, reporter)
    assert digests(load_model(copy), tmp_path, reporter) == first
    assert reporter.titles == ["hashing x"]
    # Its time set back, as an archive does: the kernel's change time tells all the same.
    status = copy.stat()
    state = load_file(copy)
    state["local_decoder.out_conv.bias"] += 1
    save_file(state, copy)
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert copy.stat().st_size == status.st_size
    assert digests(load_model(copy), tmp_path, reporter).of("head") != first.of("head")
    assert len(reporter.titles) == 2


def test_a_file_that_changes_while_it_is_read_is_refused(tiny_path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(tiny_path.read_bytes())

    class Touching(Silent):
        def task(self, title: str, total: int = 0, unit: str = "bytes"):  # type: ignore[no-untyped-def]
            os.utime(copy)
            return super().task(title, total, unit)

    with pytest.raises(HostError, match="a file changed while it was read"):
        digests(load_model(copy), tmp_path, Touching())
    assert not list((tmp_path / "stages").glob("*"))
