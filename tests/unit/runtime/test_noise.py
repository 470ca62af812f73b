from __future__ import annotations

import hashlib
import shutil
import statistics
import subprocess
import tracemalloc
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import mpmath  # type: ignore[import-untyped]
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from l2p_runtime import native, noise
from l2p_runtime.errors import InternalError, UsageError
from l2p_runtime.noise import normal_noise, normal_noise_numpy, torch_cpu_noise
from tools import make_normal_table

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

SOURCES = sorted((Path(__file__).resolve().parents[3] / "runtime/csrc").glob("*.cpp"))
SEEDS = [0, 1, 7, 2**32 - 1, 2**32, 2**63 + 7, 2**64 - 1]
# One image of which the windows below are parts; its sides are no multiples of 4.
WHOLE = (37, 53)
# The first eight values of seed 7, and a window elsewhere: a change here breaks every seed that users have noted.
GOLDEN = [
    "0x1.b0f0080000000p+0",
    "0x1.5995840000000p-1",
    "-0x1.34612e0000000p+0",
    "-0x1.5e347c0000000p+0",
    "-0x1.e20a2e0000000p-3",
    "0x1.a658780000000p-1",
    "-0x1.e4e7d80000000p-1",
    "0x1.b9ef780000000p+0",
]
GOLDEN_WINDOW = "92bd3c431f1180aedb00cb50c7022eb8bf9c074e07055718805d374c8a6835c0"
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.fixture(scope="session")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> native.NativeLibrary:
    """The installed native kernel, or one built from the source with CMakeLists.txt's flags."""
    installed = native._probe()[0]
    if installed is not None:
        return installed
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no native kernel installed and no C++ compiler to build one")
    path = tmp_path_factory.mktemp("native") / "libl2p_native.so"
    flags = "-std=c++17 -O3 -DNDEBUG -fPIC -shared -fvisibility=hidden -Wall -Wextra -Werror -pthread"
    exact = "-ffp-contract=off -fno-trapping-math"
    subprocess.run([compiler, *flags.split(), *exact.split(), *SOURCES, "-o", path], check=True)
    library = native._load(path)
    assert isinstance(library, native.NativeLibrary)
    return library


def with_kernel(library: native.NativeLibrary | None, seed: int, **window: Any) -> NDArray[np.float32]:
    with mock.patch.object(noise, "load_native", return_value=library):
        return normal_noise(seed, **window)


def same_bits(a: NDArray[np.float32], b: NDArray[np.float32]) -> bool:
    return a.shape == b.shape and np.array_equal(a.view(np.uint32), b.view(np.uint32))


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def philox_by_hand(seed: int, counter: list[int]) -> list[int]:
    """Philox-4x32-10 on Python ints, as the paper writes it."""
    c, k = list(counter), [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


# The stream


@pytest.mark.parametrize(("counter", "key", "wanted"), KNOWN_ANSWERS)
def test_philox_known_answers(counter: str, key: str, wanted: str) -> None:
    k0, k1 = words(key)
    result = noise.philox4x32(tuple(np.array([c], np.uint64) for c in words(counter)), (k0, k1))
    assert [int(w[0]) for w in result] == words(wanted)
    assert philox_by_hand(k0 | k1 << 32, words(counter)) == words(wanted)


def test_golden_values() -> None:
    values = normal_noise_numpy(7, channels=1, rows=(0, 1), cols=(0, 8))
    assert [float(v).hex() for v in values[0, 0]] == GOLDEN


def test_golden_window(kernel: native.NativeLibrary) -> None:
    for library in (None, kernel):
        values = with_kernel(library, 2**63 + 7, image_index=5, rows=(11, 40), cols=(6, 71))
        assert hashlib.sha256(values.astype("<f4").tobytes()).hexdigest() == GOLDEN_WINDOW


@pytest.mark.parametrize("seed", SEEDS)
def test_counter_is_x_div_4_then_y_channel_image(seed: int) -> None:
    values = normal_noise_numpy(seed, image_index=9, channels=3, rows=(1000, 1002), cols=(70001, 70010))
    for c, y, x in np.ndindex(values.shape):
        r = philox_by_hand(seed, [(70001 + x) // 4, 1000 + y, c, 9])[(70001 + x) % 4]
        wanted = statistics.NormalDist().inv_cdf((r + 0.5) / 2**32)
        assert values[c, y, x] == pytest.approx(wanted, rel=1e-7, abs=1e-9)


def test_seeds_images_and_channels_differ() -> None:
    window: dict[str, Any] = {"rows": (0, 8), "cols": (0, 8)}
    arrays = [normal_noise_numpy(seed, **window) for seed in SEEDS]
    arrays.append(normal_noise_numpy(7, image_index=1, **window))
    planes = {plane.tobytes() for array in arrays for plane in array}
    assert len(planes) == 3 * len(arrays)


def test_moments() -> None:
    values = normal_noise_numpy(7, rows=(0, 1024), cols=(0, 1024)).astype(np.float64)
    n = values.size
    # Five standard errors each.
    assert abs(values.mean()) < 5 / n**0.5
    assert abs(values.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((values**3).mean()) < 5 * (15 / n) ** 0.5
    assert abs((values**4).mean() - 3) < 5 * (96 / n) ** 0.5
    for a, b in (
        (values[:, :, 1:], values[:, :, :-1]),
        (values[:, 1:], values[:, :-1]),
        (values[1:], values[:-1]),
    ):
        assert abs((a * b).mean()) < 5 / a.size**0.5


# The table


def test_table_is_what_its_generator_derives() -> None:
    rows = range(make_normal_table.OCTAVES * make_normal_table.SEGMENTS)
    assert make_normal_table.TABLE.read_bytes() == make_normal_table.make_table(rows).astype("<f8").tobytes()
    assert noise._table().shape == (len(rows), make_normal_table.DEGREE + 1)


@pytest.mark.parametrize("r", [0, 1, 2, 1000, 2**30, 2**31 - 1, 2**31, 2**31 + 1, 3 * 2**30, 2**32 - 1])
def test_normal_at_extremes(r: int) -> None:
    value = float(noise.words_to_normal(np.array([r], np.uint64))[0])
    with mpmath.workdps(40):
        wanted = mpmath.sqrt(2) * mpmath.erfinv(2 * (mpmath.mpf(r) + 0.5) / 2**32 - 1)
        assert abs(value - wanted) < 3e-12


def test_normal_is_within_the_stated_error_everywhere() -> None:
    # 200 words of each eighth of an octave, both ends among them; all of them where there are fewer.
    edges = np.array([(8 + s) * 2.0 ** (e - 3) for e in range(31) for s in range(8)] + [2.0**31])
    r = np.unique(np.concatenate([np.linspace(a, b - 1, 200) for a, b in pairwise(edges)]))
    r = np.unique(np.concatenate([[0], np.clip(r, 0, 2**31 - 1)]).astype(np.uint64))
    values = noise.words_to_normal(r)
    inverse = statistics.NormalDist().inv_cdf
    wanted = np.array([inverse((int(word) + 0.5) / 2**32) for word in r])
    assert np.abs(values - wanted).max() < 3e-12
    assert (np.diff(values) > 0).all()
    assert np.array_equal(noise.words_to_normal(r ^ np.uint64(0xFFFFFFFF)), -values)


def test_damaged_table_is_said() -> None:
    with mock.patch.object(noise, "TABLE_ROWS", 255), pytest.raises(InternalError, match="14336 bytes, wanted 14280"):
        noise._table.__wrapped__()


# Windows, threads, stripes


@st.composite
def windows(draw: st.DrawFn) -> tuple[tuple[int, int], tuple[int, int]]:
    rows, cols = (sorted(draw(st.tuples(*[st.integers(0, side)] * 2))) for side in WHOLE)
    return (rows[0], rows[1]), (cols[0], cols[1])


@settings(deadline=None, max_examples=60)
@given(windows(), st.sampled_from(SEEDS), st.integers(0, 2**32 - 1), st.integers(0, 4))
def test_any_window_is_the_slice_of_the_whole(
    kernel: native.NativeLibrary,
    window: tuple[tuple[int, int], tuple[int, int]],
    seed: int,
    image: int,
    channels: int,
) -> None:
    rows, cols = window
    whole = normal_noise_numpy(seed, image_index=image, channels=4, rows=(0, WHOLE[0]), cols=(0, WHOLE[1]))
    wanted = whole[:channels, slice(*rows), slice(*cols)]
    part: dict[str, Any] = {"image_index": image, "channels": channels, "rows": rows, "cols": cols}
    assert same_bits(normal_noise_numpy(seed, **part), wanted)
    assert same_bits(with_kernel(kernel, seed, **part), wanted)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**64 - 1), *[st.tuples(st.integers(0, 2**32 - 80), st.integers(0, 70))] * 2)
def test_native_and_numpy_agree_anywhere(
    kernel: native.NativeLibrary, seed: int, rows: tuple[int, int], cols: tuple[int, int]
) -> None:
    window: dict[str, Any] = {"rows": (rows[0], sum(rows)), "cols": (cols[0], sum(cols))}
    assert same_bits(with_kernel(kernel, seed, **window), normal_noise_numpy(seed, **window))


def test_native_and_numpy_agree_on_a_million_values(kernel: native.NativeLibrary) -> None:
    window: dict[str, Any] = {"rows": (3, 515), "cols": (1, 1026)}
    assert same_bits(with_kernel(kernel, 12345, **window), normal_noise_numpy(12345, **window))


def test_threads_do_not_change_bits(kernel: native.NativeLibrary) -> None:
    window: dict[str, Any] = {"rows": (5, 305), "cols": (2, 303)}
    wanted = normal_noise_numpy(7, **window)
    for threads in (None, 1, 2, 3, 4, 5, 10**12):
        assert same_bits(with_kernel(kernel, 7, threads=threads, **window), wanted)


def test_numpy_steps_do_not_change_bits() -> None:
    window: dict[str, Any] = {"rows": (5, 25), "cols": (3, 102)}
    wanted = normal_noise_numpy(7, **window)
    for step in (1, 2, 7, 25, 60):
        with mock.patch.object(noise, "_STEP", step):
            assert same_bits(normal_noise_numpy(7, **window), wanted)


def test_numpy_memory_is_bounded_for_a_wide_image() -> None:
    out = np.empty((1, 2, 1 << 21), np.float32)
    normal_noise_numpy(7, channels=1, rows=(0, 1), cols=(0, 4))
    tracemalloc.start()
    try:
        normal_noise_numpy(7, channels=1, rows=(0, 2), cols=(0, 1 << 21), out=out)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 << 20


# The array written to


@pytest.mark.parametrize("layout", ["padded", "channels last", "every second", "upside down", "mirrored", "unaligned"])
@pytest.mark.parametrize("use_kernel", [True, False])
def test_out_in_any_layout(layout: str, use_kernel: bool, request: pytest.FixtureRequest) -> None:
    library = request.getfixturevalue("kernel") if use_kernel else None
    base = np.full((3, 12, 20), -99, np.float32)
    layouts: dict[str, Callable[[], NDArray[np.float32]]] = {
        "padded": lambda: base[:, 2:10, 3:14],
        "channels last": lambda: np.zeros((8, 11, 3), np.float32).transpose(2, 0, 1),
        "every second": lambda: np.zeros((3, 16, 22), np.float32)[:, ::2, ::2],
        "upside down": lambda: base[::-1, 9:1:-1, 3:14],
        "mirrored": lambda: base[:, 2:10, 13:2:-1],
        "unaligned": lambda: np.zeros(3 * 8 * 11 * 4 + 1, np.uint8)[1:].view(np.float32).reshape(3, 8, 11),
    }
    out = layouts[layout]()
    window: dict[str, Any] = {"rows": (1, 9), "cols": (5, 16)}
    result = with_kernel(library, 7, out=out, **window)
    assert result is out
    assert same_bits(np.ascontiguousarray(out), normal_noise_numpy(7, **window))
    if np.shares_memory(out, base):
        assert (base == -99).sum() == base.size - out.size


@pytest.mark.parametrize(
    "out",
    [np.zeros((3, 4, 5), np.float32), np.zeros((4, 4), np.float32), np.zeros((3, 4, 4)), np.zeros((3, 4, 4), ">f4")],
)
def test_out_that_does_not_fit(out: Any) -> None:
    with pytest.raises(UsageError, match=r"wanted a writeable float32 \[3, 4, 4\]"):
        normal_noise(7, rows=(0, 4), cols=(0, 4), out=out)


def test_out_that_is_read_only() -> None:
    out = np.zeros((3, 4, 4), np.float32)
    out.flags.writeable = False
    with pytest.raises(UsageError, match="read-only"):
        normal_noise(7, rows=(0, 4), cols=(0, 4), out=out)


# What calls may say


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, "seed is -1, wanted 0 <= seed < 2"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"seed": 7.0}, "seed is 7.0, expected a whole number"),
        ({"seed": True}, "seed is True, expected a whole number"),
        ({"seed": None}, "seed is None, expected a whole number"),
        ({"image_index": -1}, "image_index is -1"),
        ({"image_index": 2**32}, "image_index is 4294967296"),
        ({"channels": -1}, "channels is -1"),
        ({"channels": 2**32}, "channels is 4294967296"),
        ({"rows": (-1, 4)}, r"rows is \(-1, 4\)"),
        ({"rows": (5, 4)}, r"rows is \(5, 4\)"),
        ({"cols": (0, 2**32)}, r"cols is \(0, 4294967296\)"),
        ({"cols": (0, 4.5)}, "cols is 4.5, expected a whole number"),
    ],
)
@pytest.mark.parametrize("call", [normal_noise, normal_noise_numpy])
def test_bad_arguments(call: Any, change: dict[str, Any], message: str) -> None:
    arguments = {"seed": 7, "rows": (0, 4), "cols": (0, 4)} | change
    with pytest.raises(UsageError, match=message) as caught:
        call(**arguments)
    assert caught.value.hint


@pytest.mark.parametrize("threads", [0, -1, 1.5])
def test_bad_threads(threads: Any) -> None:
    with pytest.raises(UsageError, match="threads is"):
        normal_noise(7, rows=(0, 4), cols=(0, 4), threads=threads)


def test_numpy_integers_are_integers(kernel: native.NativeLibrary) -> None:
    wanted = normal_noise_numpy(2**64 - 1, image_index=2, channels=2, rows=(1, 4), cols=(3, 9))
    given_: dict[str, Any] = {
        "image_index": np.uint8(2),
        "channels": np.int64(2),
        "rows": (np.uint16(1), np.int8(4)),
        "cols": (np.uint32(3), np.uint64(9)),
    }
    seed: Any = np.uint64(2**64 - 1)
    assert same_bits(normal_noise_numpy(seed, **given_), wanted)
    assert same_bits(with_kernel(kernel, seed, **given_), wanted)


def test_kernel_refuses_a_window_past_the_end(kernel: native.NativeLibrary) -> None:
    out = np.zeros(16, np.float32)
    table = noise._table().ctypes.data
    last = 2**32 - 1
    for channel, row, col in ((last, 0, 0), (0, last, 0), (0, 0, last)):
        assert kernel.normal_noise(7, 0, channel, 2, row, 2, col, 4, table, out.ctypes.data, 8, 4, 1) == 1
    assert kernel.normal_noise(7, 0, 0, 2, 0, 2, 0, 4, table, None, 8, 4, 1) == 1
    assert kernel.normal_noise(7, 0, 0, 2, 0, 2, 0, 4, None, out.ctypes.data, 8, 4, 1) == 1
    assert not out.any()


def test_kernel_failure_is_an_error(kernel: native.NativeLibrary) -> None:
    broken = replace(kernel, normal_noise=lambda *_: 2)
    with pytest.raises(InternalError, match="returned 2"):
        with_kernel(broken, 7, rows=(0, 4), cols=(0, 4))


# PyTorch's stream


@pytest.mark.parametrize("count", [*range(18), 31, 32, 33, 1000, 3 * 64 * 64, (1 << 19) + 21])
@pytest.mark.parametrize("seed", [*SEEDS, 2**31, 2**40 + 12345])
def test_torch_cpu_stream(seed: int, count: int) -> None:
    wanted = torch.randn(count, generator=torch.Generator("cpu").manual_seed(seed)).numpy()
    values = torch_cpu_noise(seed, count)
    assert values.dtype == np.float32
    if count < 16:
        np.testing.assert_array_max_ulp(values, wanted, maxulp=1)
    else:
        vectorised = torch.backends.cpu.get_cpu_capability().startswith("AVX")
        np.testing.assert_allclose(values, wanted, rtol=0, atol=1e-6 if vectorised else 3e-6)


@pytest.mark.parametrize(("seed", "count"), [(-1, 4), (2**64, 4), (7, -1), (7, 1.5), ("7", 4)])
def test_torch_cpu_bad_arguments(seed: Any, count: Any) -> None:
    with pytest.raises(UsageError, match=r"wanted|expected"):
        torch_cpu_noise(seed, count)
