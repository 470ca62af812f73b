"""The gate of pictures under a precision plan: how many may be lost, and what the ledger says."""

from __future__ import annotations

import pytest

from l2p_export.verify_pictures import Shown, entry_of


@pytest.mark.parametrize(
    ("first", "found", "status"),
    [(5, 5, "passed"), (5, 6, "passed"), (5, 4, "passed"), (5, 3, "failed"), (100, 98, "passed"), (100, 97, "failed")],
)
def test_few_pictures_may_be_lost(first: int, found: int, status: str) -> None:
    assert entry_of("a -> b", "4x4", Shown(found, first, (50.0,))).status == status


def test_the_worst_picture_is_told() -> None:
    entry = entry_of("fp32 pictures -> fp16 pictures", "6x4", Shown(2, 3, (70.0, 48.0, 60.0)))
    assert (entry.network, entry.case, entry.psnr_db) == ("end-to-end", "6x4", 48.0)
    assert entry.reason == ("2 of 3 right by the judge, where 3 were; at least 48.0 dB, half of them 60.0 dB or more")
