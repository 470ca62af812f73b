"""Standard normal noise from a seed.

The contract: a seed gives the same noise, bit for bit, on every machine, backend, thread count and stripe.

- Words: Philox-4x32-10 with the 64-bit seed as key (low word, high word) and the counter (x div 4, y, channel, image
  index). The four output words belong to x = 4k .. 4k+3, so any window can be made without the rest of the image.
- Values: a word r stands for p = (r + 0.5) / 2^32 and becomes the normal value with that probability below it. The
  upper half of p mirrors the lower one. There, v = r + 0.5 is exact in float64; its exponent and top three mantissa
  bits choose a polynomial from `data/normal_table.f64`, the other mantissa bits are its argument t = -1..1, exactly.
- Rounding: Horner in float64, each multiply and each add rounded on its own, never fused; then once to float32.

No logarithm, sine or other function whose last bit differs between libraries is called. The table is within 3e-12 of
the true inverse normal distribution function. Values lie within +-6.338, where 2^-33 is left on either side.

`torch_cpu_noise` is outside this contract: it follows PyTorch's CPU generator, to a tolerance.
"""

from __future__ import annotations

import functools
import importlib.resources
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from l2p_runtime.arguments import integer
from l2p_runtime.errors import InternalError, UsageError
from l2p_runtime.native import NativeLibrary, load_native

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

TABLE_ROWS = 256
TABLE_COEFFICIENTS = 7
_WORD = 0xFFFFFFFF
# Counters per NumPy step: about 5 MiB of temporaries, which stay in the cache.
_STEP = 1 << 14
# Values per step of the torch stream, a multiple of 16: about 20 MiB of temporaries.
_TORCH_STEP = 1 << 19
_MAX_THREADS = 1024
_Range = tuple[int, int]


class _Window(NamedTuple):
    """A checked call: Python ints in range, and a writeable float32 array that fits."""

    seed: int
    image: int
    rows: _Range
    cols: _Range
    out: NDArray[np.float32]


def normal_noise(
    seed: int,
    *,
    image_index: int = 0,
    channels: int = 3,
    rows: tuple[int, int],
    cols: tuple[int, int],
    out: NDArray[np.float32] | None = None,
    threads: int | None = None,
) -> NDArray[np.float32]:
    """Make a window of standard normal noise, with the native kernel where it is loaded, else with NumPy.

    Args:
        seed: 0 <= seed < 2^64.
        image_index: which image of a batch, or which frame.
        channels: how many channels, from channel 0.
        rows: first row, and the one after the last, in the whole image.
        cols: first column, and the one after the last, in the whole image.
        out: float32 [channels, rows, cols] to write into; may be a view of a larger array.
        threads: how many threads the native kernel uses, None for all; the bits do not depend on it.

    Returns:
        Float32 [channels, rows, cols]: `out` where given, else a new array.

    Raises:
        UsageError: the seed, window, index or thread count is out of range, or `out` does not fit the window.
    """
    window = _checked(seed, rows, cols, image_index=image_index, channels=channels, out=out)
    if threads is not None and integer("threads", threads) < 1:
        raise UsageError(f"threads is {threads}, wanted 1 or more", hint="leave threads out to use all")
    native = load_native()
    if native is None or window.out.size == 0:
        _fill(window)
    else:
        _fill_native(native, window, min(threads or 0, _MAX_THREADS))
    return window.out


def normal_noise_numpy(
    seed: int,
    *,
    image_index: int = 0,
    channels: int = 3,
    rows: tuple[int, int],
    cols: tuple[int, int],
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Make the same bits as `normal_noise`, with NumPy only, in one thread and a few MiB of temporary memory.

    Args:
        seed: 0 <= seed < 2^64.
        image_index: which image of a batch, or which frame.
        channels: how many channels, from channel 0.
        rows: first row, and the one after the last, in the whole image.
        cols: first column, and the one after the last, in the whole image.
        out: float32 [channels, rows, cols] to write into; may be a view of a larger array.

    Returns:
        Float32 [channels, rows, cols]: `out` where given, else a new array.

    Raises:
        UsageError: the seed, window or index is out of range, or `out` does not fit the window.
    """
    window = _checked(seed, rows, cols, image_index=image_index, channels=channels, out=out)
    _fill(window)
    return window.out


def torch_cpu_noise(seed: int, count: int) -> NDArray[np.float32]:
    """Follow `torch.randn(count, generator=torch.Generator("cpu").manual_seed(seed))`, float32 and contiguous.

    The words are PyTorch's own (MT19937 from the seed's low 32 bits). Logarithm, sine and cosine differ in their last
    bits, between PyTorch's own kernels too. Measured against torch 2.13 on x86-64, 3 million values of each of ten
    seeds: within 1e-6 absolute of its AVX2 and AVX-512 kernels (three float32 steps), within 3e-6 of its plain ones.
    Below 16 values PyTorch works in float64, and no difference was found.

    Args:
        seed: 0 <= seed < 2^64; PyTorch ignores the upper 32 bits.
        count: how many values.

    Returns:
        Float32 [count]; reshape it as `torch.randn` was asked to.

    Raises:
        UsageError: the seed or the count is out of range.
    """
    seed, count = checked_seed(seed), integer("count", count)
    if count < 0:
        raise UsageError(f"count is {count}, wanted 0 or more", hint="give the number of values of the noise")
    # The legacy seeding is the one that PyTorch has, and NumPy has frozen its stream.
    draw = np.random.RandomState(seed & _WORD)
    out = np.empty(count, np.float32)
    if count < 16:
        _torch_scalar(draw, out)
        return out
    whole = count // 16 * 16
    for start in range(0, whole, _TORCH_STEP):
        _torch_blocks(draw, out[start : min(start + _TORCH_STEP, whole)])
    if count > whole:
        # PyTorch draws the tail, throws it away, and makes the last 16 values anew.
        _torch_words(draw, count - whole)
        _torch_blocks(draw, out[-16:])
    return out


def philox4x32(
    counter: tuple[NDArray[np.uint64], ...], key: tuple[int, int]
) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64]]:
    """Run the ten rounds of Philox-4x32 on many counters.

    Args:
        counter: four words of each counter, uint64 arrays of one shape with values below 2^32; overwritten.
        key: two words below 2^32.

    Returns:
        The four output words of each counter, as uint64 arrays of the same shape with values below 2^32.
    """
    c0, c1, c2, c3 = counter
    key0, key1 = key
    spare0, spare1 = np.empty_like(c0), np.empty_like(c0)
    for _ in range(10):
        # c1 and c3 take up the high halves and become c0 and c2; the low halves of the results become c1 and c3.
        np.multiply(c0, 0xD2511F53, out=c0)
        np.multiply(c2, 0xCD9E8D57, out=c2)
        np.right_shift(c2, 32, out=spare0)
        np.right_shift(c0, 32, out=spare1)
        c1 ^= spare0
        c1 ^= key0
        c3 ^= spare1
        c3 ^= key1
        c2 &= _WORD
        c0 &= _WORD
        c0, c1, c2, c3 = c1, c2, c3, c0
        key0, key1 = (key0 + 0x9E3779B9) & _WORD, (key1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def words_to_normal(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Turn words below 2^32 into normal values, not yet rounded to float32; the module says how.

    Args:
        words: uint64, any shape.

    Returns:
        Float64 of the same shape.
    """
    v = np.minimum(words, words ^ _WORD).astype(np.float64)
    v += 0.5
    bits = v.view(np.uint64)
    # Exponent and top three mantissa bits name the row; v = 0.5 is row 0.
    row = (bits >> 49).view(np.int64)
    row -= 1022 << 3
    # The other mantissa bits, under the exponent of 2, are a number in [2, 4).
    bits <<= 3
    bits &= 0x000FFFFFFFFFFFFF
    bits |= 0x4000000000000000
    v -= 3.0
    columns = _table_columns()
    z: NDArray[np.float64] = columns[-1].take(row)
    coefficient = np.empty_like(z)
    for column in columns[-2::-1]:
        z *= v
        # The rows are in range by construction; "clip" only spares take() its own buffer.
        z += column.take(row, out=coefficient, mode="clip")
    np.negative(z, out=z, where=words > _WORD >> 1)
    return z


def _fill_native(native: NativeLibrary, window: _Window, threads: int) -> None:
    """Write the noise of a window that is not empty; threads 0 is all of them."""
    out, rows, cols = window.out, window.rows, window.cols
    size = out.itemsize
    # The kernel counts strides in floats and writes whole lines; an array that is laid out otherwise gets a copy.
    direct = out.flags.aligned and out.strides[2] == size and not (out.strides[0] % size or out.strides[1] % size)
    target = out if direct else np.empty(out.shape, np.float32)
    status = native.normal_noise(
        window.seed,
        window.image,
        *(0, out.shape[0]),
        *(rows[0], rows[1] - rows[0]),
        *(cols[0], cols[1] - cols[0]),
        _table().ctypes.data,
        target.ctypes.data,
        *(target.strides[0] // size, target.strides[1] // size),
        threads,
    )
    if status != 0:
        raise InternalError(f"the native noise kernel returned {status}, wanted 0", hint="set L2P_NATIVE=0")
    if target is not out:
        out[...] = target


def _fill(window: _Window) -> None:
    """Write the noise of a window a few thousand counters at a time."""
    out, key = window.out, (window.seed & _WORD, window.seed >> 32)
    for channel in range(out.shape[0]):
        for (y0, y1), (x0, x1) in _steps(window.rows, window.cols):
            shape = (y1 - y0, -(-x1 // 4) - x0 // 4)
            counter = tuple(np.empty(shape, np.uint64) for _ in range(4))
            counter[0][...] = np.arange(x0 // 4, x0 // 4 + shape[1], dtype=np.uint64)
            counter[1][...] = np.arange(y0, y1, dtype=np.uint64)[:, None]
            counter[2][...] = channel
            counter[3][...] = window.image
            values = words_to_normal(np.stack(philox4x32(counter, key), axis=-1)).reshape(shape[0], -1)
            x, y, skip = x0 - window.cols[0], y0 - window.rows[0], x0 % 4
            out[channel, y : y + shape[0], x : x + x1 - x0] = values[:, skip : skip + x1 - x0]


def _steps(rows: _Range, cols: _Range) -> Iterator[tuple[_Range, _Range]]:
    """Cut a window into ones of at most `_STEP` counters: parts of lines, or several whole lines."""
    if rows[0] == rows[1] or cols[0] == cols[1]:
        return
    first, last = cols[0] // 4, -(-cols[1] // 4)
    high = max(1, _STEP // (last - first))
    for y in range(rows[0], rows[1], high):
        for k in range(first, last, _STEP):
            part = (max(cols[0], 4 * k), min(cols[1], 4 * (k + _STEP)))
            yield (y, min(y + high, rows[1])), part


def _checked(
    seed: int, rows: _Range, cols: _Range, *, image_index: int, channels: int, out: NDArray[np.float32] | None
) -> _Window:
    """Check the arguments of a call, and make the array to fill where none was given."""
    seed, image, channels = checked_seed(seed), integer("image_index", image_index), integer("channels", channels)
    if not 0 <= image <= _WORD:
        raise UsageError(f"image_index is {image}, wanted 0 to 2^32 - 1", hint="count the images from 0")
    if not 0 <= channels <= _WORD:
        raise UsageError(f"channels is {channels}, wanted 0 to 2^32 - 1", hint="an RGB image has 3")
    rows, cols = _checked_range("rows", rows), _checked_range("cols", cols)
    shape = (channels, rows[1] - rows[0], cols[1] - cols[0])
    if out is None:
        out = np.empty(shape, np.float32)
    elif not isinstance(out, np.ndarray):
        raise UsageError(f"out is a {type(out).__name__}, wanted a NumPy array", hint="leave it out for a new one")
    elif out.shape != shape or out.dtype != np.float32 or not out.flags.writeable:
        raise UsageError(
            f"out is {out.dtype} {list(out.shape)}{'' if out.flags.writeable else ', read-only'}, "
            f"wanted a writeable float32 {list(shape)}",
            hint="give out the shape [channels, rows, cols] of the window, or leave it out",
        )
    return _Window(seed, image, rows, cols, out)


def _checked_range(name: str, values: _Range) -> _Range:
    if not isinstance(values, (tuple, list)) or len(values) != 2:
        raise UsageError(f"{name} is {values!r}, wanted two integers", hint=f"give {name} as (first, stop)")
    start, stop = integer(name, values[0]), integer(name, values[1])
    if not 0 <= start <= stop <= _WORD:
        raise UsageError(
            f"{name} is ({start}, {stop}), wanted 0 <= start <= stop < 2^32",
            hint=f"give {name} as the first one and the one after the last",
        )
    return start, stop


def checked_seed(seed: int) -> int:
    """The seed as a Python int.

    Raises:
        UsageError: no whole number, or outside 0 to 2^64 - 1.
    """
    seed = integer("seed", seed)
    if not 0 <= seed < 1 << 64:
        raise UsageError(f"seed is {seed}, wanted 0 <= seed < 2^64", hint="choose another seed, such as 7")
    return seed


@functools.cache
def _table() -> NDArray[np.float64]:
    """Read the table once: float64 [256, 7], contiguous, read-only, constant terms first.

    Raises:
        InternalError: the installed file has another size.
    """
    data = importlib.resources.files("l2p_runtime").joinpath("data", "normal_table.f64").read_bytes()
    wanted = TABLE_ROWS * TABLE_COEFFICIENTS * 8
    if len(data) != wanted:
        raise InternalError(f"normal_table.f64 has {len(data)} bytes, wanted {wanted}", hint="reinstall l2p-export")
    table = np.frombuffer(data, "<f8").astype(np.float64).reshape(TABLE_ROWS, TABLE_COEFFICIENTS)
    table.flags.writeable = False
    return table


@functools.cache
def _table_columns() -> NDArray[np.float64]:
    """The table as [7, 256], each coefficient's column contiguous."""
    columns = np.ascontiguousarray(_table().T)
    columns.flags.writeable = False
    return columns


def _torch_words(draw: np.random.RandomState, count: int) -> NDArray[np.uint32]:
    return draw.randint(0, 1 << 32, count, dtype=np.uint32)


def _torch_blocks(draw: np.random.RandomState, out: NDArray[np.float32]) -> None:
    """Box-Muller in blocks of 16: the first 8 uniforms give the radius, the last 8 the angle; rounded as PyTorch is."""
    uniform = (_torch_words(draw, out.size) & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)
    uniform = uniform.reshape(-1, 2, 8)
    # Float64 in between: rounding it to float32 hides most differences between the libraries' functions.
    log = np.log((np.float32(1) - uniform[:, 0]).astype(np.float64)).astype(np.float32)
    radius = np.sqrt(np.float32(-2) * log)
    angle = (np.float32(2 * np.pi) * uniform[:, 1]).astype(np.float64)
    blocks = out.reshape(-1, 2, 8)
    blocks[:, 0] = radius * np.cos(angle).astype(np.float32)
    blocks[:, 1] = radius * np.sin(angle).astype(np.float32)


def _torch_scalar(draw: np.random.RandomState, out: NDArray[np.float32]) -> None:
    """PyTorch below 16 values: float64 Box-Muller, one pair of 53-bit uniforms for two values."""
    pairs = -(-out.size // 2)
    words = _torch_words(draw, 4 * pairs).astype(np.uint64).reshape(pairs, 2, 2)
    # The first of two words is the upper half.
    uniform = ((words[..., 0] << 32 | words[..., 1]) & ((1 << 53) - 1)).astype(np.float64) * 2.0**-53
    radius = np.sqrt(-2.0 * np.log1p(-uniform[:, 1]))
    angle = 2.0 * np.pi * uniform[:, 0]
    values = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    out[...] = values.reshape(-1)[: out.size]
