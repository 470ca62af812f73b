"""Traces of the session's builds for a test's own folder: it then makes its graphs without tracing."""

from __future__ import annotations

import shutil
from pathlib import Path

from l2p_engines.store.stages import STAGES, stages


def copy_traces(store: Path, home: Path, *labels: str) -> None:
    """Copy the finished traces with these labels, as `head.fp32`, into a folder where stages are kept."""
    for stage in stages(store):
        if stage.kind == "trace" and stage.label in labels:
            for path in (*(file.path for file in stage.files), f"{STAGES}/{stage.key}.json"):
                (home / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(store / path, home / path)
