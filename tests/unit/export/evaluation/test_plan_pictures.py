"""The gate of pictures under a precision plan: how many may be lost, and what the ledger says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from l2p_export.evaluation import plan_pictures as verify_pictures
from l2p_export.evaluation.drawers import DrawOptions
from l2p_export.evaluation.plan_pictures import PictureComparison, PictureJob, compare_pictures, entry_of
from l2p_runtime.contract import pictures_comparison
from l2p_runtime.errors import UnsupportedError
from l2p_runtime.progress import Silent

PICTURES = pictures_comparison("fp32", "fp16")
BUNDLE = cast("Any", SimpleNamespace(root=Path("bundle"), store=None))


@pytest.mark.parametrize(
    ("first", "found", "status"),
    [(5, 5, "passed"), (5, 6, "passed"), (5, 4, "passed"), (5, 3, "failed"), (100, 98, "passed"), (100, 97, "failed")],
)
def test_few_pictures_may_be_lost(first: int, found: int, status: str) -> None:
    assert entry_of(PICTURES, "4x4", PictureComparison(found, first, (50.0,))).status == status


def test_the_worst_picture_is_told() -> None:
    entry = entry_of(PICTURES, "6x4", PictureComparison(2, 3, (70.0, 48.0, 60.0)))
    assert (entry.network, entry.case, entry.psnr_db) == ("end-to-end", "6x4", 48.0)
    assert entry.reason == ("2 of 3 right by the judge, where 3 were; at least 48.0 dB, half of them 60.0 dB or more")


def open_drawer(root: Path, options: DrawOptions) -> Any:
    """Draws grey, a level lighter under each longer name; no `bf16`."""
    del root

    def draw(texts: Sequence[str], seeds: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        del seeds
        if options.plan == "bf16":
            raise UnsupportedError("no way to run it")
        for _ in texts:
            yield np.full((64, 96, 3), 100 + len(options.plan or ""), np.uint8)

    return SimpleNamespace(height_px=64, width_px=96, draw=draw)


@pytest.mark.parametrize(
    ("first", "others", "statuses"),
    [("fp32", ("bf16", "fp8-plain"), ["not run", "passed"]), ("bf16", ("fp16", "fp8"), ["not run", "not run"])],
)
def test_a_plan_that_does_not_run_here_is_listed(
    first: str, others: tuple[str, ...], statuses: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_pictures, "open_drawer", open_drawer)
    entries = compare_pictures(BUNDLE, PictureJob("onnx", first, others, 3, None), Silent())
    assert [entry.status for entry in entries] == statuses
    assert [str(entry.comparison) for entry in entries] == [f"{first} pictures -> {name} pictures" for name in others]
    assert {entry.case for entry in entries} == {"96x64"}
    figures = [entry.psnr_db for entry in entries if entry.status == "passed"]
    # Five levels of 255.
    assert figures == [pytest.approx(34.15, abs=0.01)] * len(figures)
