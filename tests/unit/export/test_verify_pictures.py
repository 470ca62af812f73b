"""The gate of pictures under a precision plan: how many may be lost, and what the ledger says."""

from __future__ import annotations

import numpy as np
import pytest

from l2p_export.verify_pictures import Pictures, compared


def pictures(right: int, *levels: int) -> Pictures:
    return Pictures(tuple(np.full((4, 6, 3), level, np.uint8) for level in levels), right)


@pytest.mark.parametrize(
    ("exact", "found", "status"),
    [(5, 5, "passed"), (5, 6, "passed"), (5, 4, "passed"), (5, 3, "failed"), (100, 98, "passed"), (100, 97, "failed")],
)
def test_few_pictures_may_be_lost(exact: int, found: int, status: str) -> None:
    entry = compared("fp32", pictures(exact, 9), "fp8", pictures(found, 9))
    assert entry.status == status
    assert entry.reason.startswith(f"{found} of 1 right by the judge, {exact} under fp32; at least 999.0 dB")


def test_the_worst_picture_is_told() -> None:
    entry = compared("fp32", pictures(3, 10, 10, 10), "fp16", pictures(3, 10, 11, 20))
    assert (entry.stage, entry.network, entry.case) == ("fp32 pictures -> fp16 pictures", "end-to-end", "6x4")
    assert entry.psnr_db == pytest.approx(20 * np.log10(255 / 10))
    assert "half of them 48.1 dB or more" in entry.reason
