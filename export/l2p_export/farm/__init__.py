"""Render-farm jobs that draw frames with a bundle: one file per farm manager, and what all jobs share."""

from __future__ import annotations

from pathlib import Path

from l2p_export.farm.deadline_cloud import deadline_cloud_files
from l2p_export.farm.job import Argument, CueOptions, DrawJob, Needs
from l2p_export.farm.opencue import opencue_files
from l2p_export.farm.openjd import openjd_files
from l2p_runtime.files import write_text

MANAGERS = {"openjd": openjd_files, "deadline-cloud": deadline_cloud_files, "opencue": opencue_files}
"""Manager to what makes its files: (job, folder) to name and text, the one that refers to the others last."""

__all__ = ["MANAGERS", "Argument", "CueOptions", "DrawJob", "Needs", "write_job"]


def write_job(manager: str, job: DrawJob, folder: Path, *, dry_run: bool = False) -> tuple[Path, ...]:
    """Write a job's files.

    Args:
        manager: one of `MANAGERS`.
        job: the job.
        folder: where its files are written; it is made if it is not there.
        dry_run: only check that the manager takes the job.

    Returns:
        The files.

    Raises:
        UsageError: the manager cannot express the job.
        OSError: a file cannot be written.
    """
    files = MANAGERS[manager](job, folder)
    if not dry_run:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            write_text(folder / name, text)
    return tuple(folder / name for name in files)
