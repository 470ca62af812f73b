"""The kernels between networks: native code and NumPy give the same bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from l2p_runtime import native
from l2p_runtime.backends import host_kernels
from l2p_runtime.backends.host_kernels import (
    euler,
    euler_numpy,
    mix_enlarged,
    mix_enlarged_numpy,
    pixels,
    pixels_numpy,
    threads_asked,
)
from l2p_runtime.coarse import cubic_taps
from l2p_runtime.errors import InternalError

ODD = [np.nan, np.inf, -np.inf, -0.0, 0.0, 1e-45, -1e-45, 3e38, -3e38, 1.0, -1.0]
sizes = st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 700))
seeds = st.integers(0, 2**32 - 1)
views = st.sampled_from(["whole", "rows", "columns", "planes turned", "unaligned"])


@pytest.fixture(autouse=True)
def _needs_native() -> None:
    if native.load_native() is None:
        pytest.skip("no native library installed")


def made(shape: tuple[int, ...], seed: int, view: str = "whole", scale: float = 1.0) -> NDArray[np.float32]:
    """Random values, some odd ones among them, as a view of a larger array."""
    rng = np.random.default_rng(seed)
    *leading, rows, columns = shape
    if view == "rows":
        values = rng.standard_normal((*leading, 2 * rows, columns), np.float32)[..., ::2, :]
    elif view == "columns":
        values = rng.standard_normal((*leading, rows, columns + 5), np.float32)[..., 3:-2]
    elif view == "planes turned":
        values = rng.standard_normal(shape, np.float32)[..., ::-1, :, :]
    elif view == "unaligned":
        raw = np.zeros(4 * int(np.prod(shape)) + 1, np.uint8)
        values = raw[1:].view(np.float32).reshape(shape)
        values[...] = rng.standard_normal(shape, np.float32)
    else:
        values = rng.standard_normal(shape, np.float32)
    values *= np.float32(scale)
    places = rng.integers(0, values.size, 11)
    values[np.unravel_index(places, values.shape)] = rng.permutation(ODD)
    return values


def same(a: NDArray[Any], b: NDArray[Any]) -> None:
    kind = {4: np.uint32, 2: np.uint16, 1: np.uint8}[a.itemsize]
    nan = np.isnan(a) if a.dtype.kind == "f" else np.zeros(a.shape, bool)
    assert np.array_equal(nan, np.isnan(b) if b.dtype.kind == "f" else nan)
    assert np.array_equal(np.ascontiguousarray(a).view(kind)[~nan], np.ascontiguousarray(b).view(kind)[~nan])


@given(sizes, st.integers(1, 2), seeds, views, st.booleans(), st.floats(-8, 8), st.floats(-2, 2))
@settings(max_examples=60, deadline=None)
def test_euler(
    size: tuple[int, int, int], batch: int, seed: int, view: str, guided: bool, guidance: float, step: float
) -> None:
    shape = (batch, *size)
    prediction, negative = made(shape, seed + 1, view), made(shape, seed + 2) if guided else None
    got, wanted = (made(shape, seed, view) for _ in range(2))
    with np.errstate(all="ignore"):
        euler(got, prediction, negative, guidance, step)
        euler_numpy(wanted, prediction, negative, guidance, step)
    same(got, wanted)


@given(sizes, seeds, views, st.sampled_from(["uint8", "uint16", "float16"]))
@settings(max_examples=60, deadline=None)
def test_pixels(size: tuple[int, int, int], seed: int, view: str, dtype: str) -> None:
    _, rows, columns = size
    image = made((3, rows, columns), seed, view)
    got, wanted = (np.ones((rows, columns, 3), dtype) for _ in range(2))
    # NumPy warns of NaN that become integers.
    with np.errstate(invalid="ignore"):
        pixels(got, image)
        pixels_numpy(wanted, image)
    same(got, wanted)


@pytest.mark.parametrize(("dtype", "top"), [("uint8", 255), ("uint16", 65535)])
def test_ties_go_to_the_even_number(dtype: str, top: int) -> None:
    """Every value halfway between two, and its neighbours in float32."""
    ties = ((np.arange(top, dtype=np.float64) + 0.5) * 2 / top - 1).astype(np.float32)
    values = np.concatenate([np.nextafter(ties, np.float32(-2)), ties, np.nextafter(ties, np.float32(2))])
    image = np.broadcast_to(values, (3, 1, values.size))
    got, wanted = (np.ones((1, values.size, 3), dtype) for _ in range(2))
    pixels(got, np.ascontiguousarray(image))
    pixels_numpy(wanted, image)
    assert np.array_equal(got, wanted)
    assert {0, top - 1} <= set(got.ravel().tolist())


def test_every_float16_of_the_unit_interval() -> None:
    """Each of them, what lies between two, and their neighbours in float32; subnormal ones too."""
    halves = np.arange(0x3C01, dtype=np.uint16).view(np.float16).astype(np.float32)
    between = (halves[1:] + halves[:-1]) / 2
    values = np.concatenate(
        [halves, between, np.nextafter(between, np.float32(0)), np.nextafter(between, np.float32(2))]
    )
    image = np.ascontiguousarray(np.broadcast_to(values * 2 - 1, (3, 1, values.size)), np.float32)
    got, wanted = (np.ones((1, values.size, 3), np.float16) for _ in range(2))
    pixels(got, image)
    pixels_numpy(wanted, image)
    same(got, wanted)


def test_nan_becomes_zero_in_integers_and_stays_in_float16() -> None:
    image = np.full((3, 1, 2), np.nan, np.float32)
    for dtype in ("uint8", "uint16", "float16"):
        out = np.ones((1, 2, 3), dtype)
        pixels(out, image)
        assert np.isnan(out).all() if dtype == "float16" else not out.any()


@given(
    st.tuples(st.integers(1, 12), st.integers(1, 12)),
    st.tuples(st.integers(0, 60), st.integers(0, 500)),
    seeds,
    views,
    st.floats(0, 1),
)
@settings(max_examples=60, deadline=None)
def test_mix_enlarged(coarse_size: tuple[int, int], more: tuple[int, int], seed: int, view: str, sigma: float) -> None:
    size = (coarse_size[0] + more[0], coarse_size[1] + more[1])
    coarse = made((3, *coarse_size), seed, view)
    tables = [table for axis in (0, 1) for table in cubic_taps(coarse_size[axis], size[axis])]
    got, wanted = (made((3, *size), seed + 1, view) for _ in range(2))
    with np.errstate(all="ignore"):
        mix_enlarged(got, coarse, *tables, sigma)
        mix_enlarged_numpy(wanted, coarse, *tables, sigma)
    same(got, wanted)


def test_taps_in_any_order() -> None:
    """Those of one pixel may lie anywhere: what was enlarged for one is not taken for another."""
    rng = np.random.default_rng(0)
    coarse = rng.standard_normal((3, 9, 9), np.float32)
    taps = [rng.integers(0, 9, (length, 4)).astype(np.int32) for length in (50, 30)]
    weights = [rng.standard_normal((length, 4), np.float32) for length in (50, 30)]
    tables = (taps[0], weights[0], taps[1], weights[1])
    got, wanted = (np.ones((3, 50, 30), np.float32) for _ in range(2))
    mix_enlarged(got, coarse, *tables, 0.3)
    mix_enlarged_numpy(wanted, coarse, *tables, 0.3)
    same(got, wanted)


@pytest.mark.parametrize("wrong", [(0, -1), (0, 4), (1, -1), (1, 6)])
def test_a_tap_outside_of_the_image_is_refused(wrong: tuple[int, int]) -> None:
    coarse, image = np.ones((3, 4, 6), np.float32), np.full((3, 8, 8), 5, np.float32)
    tables = [table.copy() for size in (4, 6) for table in cubic_taps(size, 8)]
    axis, tap = wrong
    tables[2 * axis][3, 2] = tap
    with pytest.raises(InternalError, match="returned 1"):
        mix_enlarged(image, coarse, *tables, 0.5)  # type: ignore[arg-type]
    assert (image == 5).all()


@pytest.mark.parametrize("threads", ["0", "1", "3", "1000000", "many"])
def test_threads_change_no_bits(threads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    image, prediction = made((1, 3, 130, 300), 1), made((1, 3, 130, 300), 2)
    wanted = image.copy()
    with np.errstate(all="ignore"):
        euler(image, prediction, prediction, 2.0, 0.25)
        euler_numpy(wanted, prediction, prediction, 2.0, 0.25)
    same(image, wanted)
    assert threads_asked() >= 0


def test_arrays_that_the_kernels_do_not_take_go_to_numpy() -> None:
    """Values that are not next to each other, other dtypes, and nothing at all."""
    image = np.ones((1, 3, 4, 8), np.float32)[..., ::2]
    euler(image, np.ones((1, 3, 4, 4), np.float32), None, 1.0, 0.5)
    assert (image == 0.5).all()
    double = np.ones((1, 3, 4, 4))
    euler(double, np.ones((1, 3, 4, 4)), None, 1.0, 0.5)
    assert (double == 0.5).all()
    out = np.ones((4, 8, 3), np.uint8)[:, ::2]
    pixels(out, np.ones((3, 4, 4), np.float32))
    assert (out == 255).all()
    euler(np.ones((1, 3, 0, 4), np.float32), np.ones((1, 3, 0, 4), np.float32), None, 1.0, 0.5)


def test_without_the_library_numpy_does_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    image, out, again = made((3, 9, 9), 4), np.ones((9, 9, 3), np.float16), np.ones((9, 9, 3), np.float16)
    pixels(out, image)
    monkeypatch.setenv(native.SWITCH, "0")
    pixels(again, image)
    same(out, again)


@pytest.mark.parametrize(
    ("kernel", "call"),
    [
        ("euler", lambda: euler(np.ones((1, 3, 2, 2), np.float32), np.ones((1, 3, 2, 2), np.float32), None, 1.0, 1.0)),
        ("pixels", lambda: pixels(np.ones((2, 2, 3), np.uint8), np.ones((3, 2, 2), np.float32))),
    ],
)
def test_a_kernel_that_fails_is_an_error(
    kernel: str, call: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    library = native.load_native()
    assert library is not None
    broken = replace(library, **{kernel: lambda *_: 2})
    monkeypatch.setattr(host_kernels, "load_native", lambda: broken)
    with pytest.raises(InternalError, match=f"`{kernel}` returned 2"):
        call()


def test_the_kernels_refuse_null() -> None:
    library = native.load_native()
    assert library is not None
    some = np.ones(64, np.float32).ctypes.data
    taps = np.zeros(64, np.int32).ctypes.data
    assert library.euler(None, 0, 0, some, 0, 0, None, 0, 0, 1, 1, 1, 1.0, 1.0, 1) == 1
    assert library.euler(some, 0, 0, None, 0, 0, None, 0, 0, 1, 1, 1, 1.0, 1.0, 1) == 1
    assert library.pixels(None, 8, some, 0, 0, 1, 1, 1) == 1
    assert library.pixels(some, 12, some, 0, 0, 1, 1, 1) == 1
    sizes_ = (1, 1, 1, 0.5, 0.5, 1)
    for missing in range(6):
        addresses = [some, some, taps, some, taps, some]
        addresses[missing] = None  # type: ignore[call-overload]
        image, coarse, *tables = addresses
        assert library.mix_enlarged(image, 0, 0, coarse, 0, 0, 1, 1, *tables, *sizes_) == 1
