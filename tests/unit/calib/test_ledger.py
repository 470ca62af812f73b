from __future__ import annotations

import numpy as np
import pytest

from l2p_calib.ledger import EQUAL_PSNR_DB, compare, require_passed
from l2p_runtime.contract import BASE_PRECISIONS, BasePrecision, LedgerEntry, graph_comparison
from l2p_runtime.errors import ParityError

EXPECTED = np.random.default_rng(0).standard_normal((4, 5)).astype(np.float32)


GRAPH = graph_comparison("mine")
BASES: dict[str, BasePrecision] = {"mine": "fp32", "careful": "fp8"}


def _compare(found: np.ndarray, base: BasePrecision = "fp32") -> LedgerEntry:
    return compare(EXPECTED, found, GRAPH, network="head", case="c", base=base)


def test_equal_outputs_pass() -> None:
    entry = _compare(EXPECTED.copy())
    assert (entry.status, entry.relative, entry.max_abs, entry.psnr_db) == ("passed", 0.0, 0.0, EQUAL_PSNR_DB)
    assert entry.cosine == pytest.approx(1.0, abs=1e-12)


def test_measures_by_hand() -> None:
    found = EXPECTED.copy()
    found[1, 2] += np.float32(0.5)
    entry = _compare(found)
    difference = float(found[1, 2]) - float(EXPECTED[1, 2])
    assert entry.status == "failed"
    assert entry.max_abs == pytest.approx(difference)
    assert entry.relative == pytest.approx(difference / np.linalg.norm(EXPECTED.astype(np.float64)))
    peak = np.abs(EXPECTED).max()
    assert entry.psnr_db == pytest.approx(10 * np.log10(peak**2 / (difference**2 / 20)), rel=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_value_that_is_not_finite_fails(bad: float) -> None:
    found = EXPECTED.copy()
    found[0, 0] = bad
    entry = _compare(found, "fp16")
    assert entry.status == "failed"
    assert "NaN or Inf" in entry.reason


def test_another_shape_fails() -> None:
    assert _compare(EXPECTED[:2]).status == "failed"


def test_black_where_there_was_a_picture_fails_everywhere() -> None:
    for base in BASE_PRECISIONS:
        assert _compare(np.zeros_like(EXPECTED), base).status == "failed"


def test_the_gate_names_what_failed() -> None:
    require_passed([_compare(EXPECTED.copy()), LedgerEntry(GRAPH, "head", "c", "not run", "too large")], BASES)
    with pytest.raises(ParityError, match=r"head in torch float32 -> mine graph on c: relative error 1\.0"):
        require_passed([_compare(np.zeros_like(EXPECTED))], BASES)
    rounded = LedgerEntry(graph_comparison("careful"), "trunk", "c", "failed", "r", 0.2, relative=0.3)
    with pytest.raises(ParityError) as caught:
        require_passed([rounded], BASES)
    assert "`calibrate --sensitivity` makes a plan" in caught.value.hint
