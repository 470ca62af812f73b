from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l2p_runtime.contract import HeadSpec
from l2p_runtime.errors import HostError
from l2p_runtime.stripes import plan_stripes

CUT = HeadSpec(row_multiple=1, halo_rows=3, peak_values_per_px=96.0)
WHOLE = HeadSpec(row_multiple=2, halo_rows=None, peak_values_per_px=96.0)


@given(st.integers(1, 200), st.integers(7, 250))
def test_stripes_cover_every_row_once_within_the_budget(rows: int, fitting: int) -> None:
    stripes = plan_stripes(CUT, rows, 100, fitting * 100 + 99)
    assert [row for stripe in stripes for row in range(stripe.first, stripe.stop)] == list(range(rows))
    for stripe in stripes:
        assert stripe.read_first == max(stripe.first - 3, 0)
        assert stripe.read_stop == min(stripe.stop + 3, rows) or len(stripes) == 1
        assert stripe.read_stop - stripe.read_first <= fitting
    assert len({stripe.stop - stripe.first for stripe in stripes[:-1]}) <= 1


def test_a_head_that_fits_runs_whole() -> None:
    (stripe,) = plan_stripes(CUT, 64, 100, 6400)
    assert (stripe.first, stripe.stop, stripe.read_first, stripe.read_stop) == (0, 64, 0, 64)


def test_the_least_is_one_row_with_its_halo() -> None:
    assert len(plan_stripes(CUT, 64, 100, 700)) == 64
    with pytest.raises(HostError, match="700 bytes, 699 bytes are left"):
        plan_stripes(CUT, 64, 100, 699)


def test_a_head_without_a_halo_is_never_cut() -> None:
    assert len(plan_stripes(WHOLE, 64, 100, 6400)) == 1
    with pytest.raises(HostError, match="runs it whole"):
        plan_stripes(WHOLE, 64, 100, 6399)
