"""A pipeline folder whose writing is cut off: it has no index, so it is no source."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from fakes.sources import write_tiny_source
from l2p_export.training.source.folder import open_source
from l2p_runtime.errors import HostError, UsageError

INDEX = "model_index.json"


def test_the_index_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[str] = []
    replace = Path.replace

    def noted(self: Path, target: Path) -> Path:
        moved.append(target.relative_to(tmp_path).as_posix())
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", noted)
    write_tiny_source(tmp_path)
    assert moved[-1] == INDEX
    assert sorted(moved) == sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file())
    assert len({path.stat().st_mode for path in tmp_path.rglob("*") if path.is_file()}) == 1


def test_a_full_disk_leaves_no_index_and_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, fsync = tmp_path / "new" / "source", os.fsync

    def full(handle: int) -> None:
        if (folder / "transformer").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(HostError, match=r"cannot write `.*source`: No space left"):
        write_tiny_source(folder)
    assert [path for path in folder.rglob("*") if ".partial" in path.name or path.name == INDEX] == []
    with pytest.raises(UsageError, match="no pipeline folder"):
        open_source(folder)
    monkeypatch.undo()
    write_tiny_source(folder)
