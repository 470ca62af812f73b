from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from l2p_runtime import arguments
from l2p_runtime.errors import UsageError

CHECKS: dict[str, Any] = {
    "integer": lambda value: arguments.integer("it", value),
    "whole number": lambda value: arguments.whole_number("it", value, -3, 2**40),
    "real number": lambda value: arguments.real_number("it", value),
    "flag": lambda value: arguments.flag("it", value),
    "text": lambda value: arguments.text("it", value),
    "one of": lambda value: arguments.one_of("it", value, ("a", "b")),
    "size": lambda value: arguments.size("it", value),
    "path": lambda value: arguments.path("it", value),
    "function": lambda value: arguments.function("it", value),
}
ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.complex_numbers(),
    st.text(),
    st.binary(),
    st.lists(st.integers()),
    st.dictionaries(st.text(), st.none()),
    npst.arrays(npst.scalar_dtypes(), npst.array_shapes(min_dims=0)),
)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("check", CHECKS)
@given(value=ANYTHING)
def test_anything_passes_or_is_refused_in_one_short_line(check: str, value: object) -> None:
    told = "it passes"
    try:
        CHECKS[check](value)
    except UsageError as error:
        told = str(error)
    assert told.startswith("it ")
    assert told.isprintable()
    assert len(told) < 400


@given(number=st.integers(0, 255))
def test_integers_of_every_kind_become_the_same_python_int(number: int) -> None:
    for kind in (int, np.uint8, np.int16, np.uint32, np.int64, np.uint64):
        found = arguments.whole_number("it", kind(number), 0, 255)
        assert type(found) is int
        assert found == number


@given(number=st.floats(width=16))
def test_floats_of_every_kind_become_the_same_python_float(number: float) -> None:
    for kind in (float, np.float16, np.float32, np.float64):
        found = arguments.real_number("it", kind(number))
        assert type(found) is float
        assert found == number or (math.isnan(found) and math.isnan(number))


def test_a_path_is_text_or_a_path(tmp_path: Path) -> None:
    assert arguments.path("it", str(tmp_path)) == arguments.path("it", tmp_path) == tmp_path
