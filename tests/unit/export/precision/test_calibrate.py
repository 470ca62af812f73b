"""Folders of a calibration: one writer each, and nothing that somebody else made is removed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from l2p_engines.store.locks import locked
from l2p_export.precision.calibrate import calibrate
from l2p_export.precision.sweep import sweep_bundle
from l2p_runtime.errors import HostError, UsageError
from l2p_runtime.progress import Silent


class StoppedError(Exception):
    """The calibration came past its folder."""


def job(out: Path, settings: str = "{}") -> Any:
    class Job(SimpleNamespace):
        @property
        def bundle(self) -> object:
            raise StoppedError

    return Job(out=out, settings=settings)


def test_one_calibration_writes_a_file(tmp_path: Path) -> None:
    out = tmp_path / "s.json"
    with locked(tmp_path / "s.json.work.lock"):
        for _ in range(2):
            with pytest.raises(HostError, match=r"another calibration is writing `.*s\.json`"):
                calibrate(job(out), Silent())
            # What another one has made so far, before its settings are there.
            (tmp_path / "s.json.work").mkdir(exist_ok=True)
    with pytest.raises(StoppedError):
        calibrate(job(out), Silent())


def test_results_of_other_settings_are_removed(tmp_path: Path) -> None:
    work = tmp_path / "s.json.work"
    for settings, is_kept in (("a", True), ("b", False)):
        with pytest.raises(StoppedError):
            calibrate(job(tmp_path / "s.json", "a"), Silent())
        (work / "0.safetensors").write_bytes(b"")
        with pytest.raises(StoppedError):
            calibrate(job(tmp_path / "s.json", settings), Silent())
        assert (work / "0.safetensors").exists() == is_kept


def test_a_folder_of_somebody_else_is_in_the_way(tmp_path: Path) -> None:
    work = tmp_path / "s.json.work"
    work.mkdir()
    (work / "mine.txt").write_bytes(b"")
    with pytest.raises(UsageError, match="is in the way: no calibration made it"):
        calibrate(job(tmp_path / "s.json"), Silent())
    assert (work / "mine.txt").exists()


def test_one_sweep_writes_a_folder(tmp_path: Path) -> None:
    missing: Any = None
    out = tmp_path / "sweep"
    out.mkdir()
    with (
        locked(out / ".writing.lock"),
        pytest.raises(HostError, match=r"another calibration is writing `.*sweep`"),
    ):
        sweep_bundle(missing, missing, missing, out, 0.05, Silent())
    assert not list(out.iterdir())
