"""Traces of the session's builds for a test's own folder: it then makes its graphs without tracing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from l2p_engines.store.stages import STAGES, stages

if TYPE_CHECKING:
    from conftest import Bundles


def copy_traces(store: Path, home: Path, *labels: str) -> None:
    """Copy the finished traces with these labels, as `head.fp32`, into a folder where stages are kept."""
    for stage in stages(store):
        if stage.kind == "trace" and stage.label in labels:
            for path in (*(file.path for file in stage.files), f"{STAGES}/{stage.key}.json"):
                (home / path).parent.mkdir(parents=True, exist_ok=True)
                partial = home / f"{path}.{os.getpid()}"
                shutil.copyfile(store / path, partial)
                partial.replace(home / path)


@contextmanager
def text_traces(bundles: Bundles, home: Path) -> Iterator[None]:
    """Traces of the small text encoder: in FP32 of the session's bundle, in FP16 of the first test that made one."""
    bundles.path("tiny-16-fused")
    kept = bundles.root / "text-traces"
    (kept / STAGES).mkdir(parents=True, exist_ok=True)
    copy_traces(bundles.store, home, "text_encoder.fp32")
    copy_traces(kept, home, "text_encoder.fp16")
    yield
    copy_traces(home, kept, "text_encoder.fp16")
