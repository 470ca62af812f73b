"""The kernels between networks on the host: native code where the library is loaded, and NumPy with the same bits."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from l2p_runtime.errors import InternalError
from l2p_runtime.native import load_native

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_CHUNK_ROWS = 64
_BITS = {"uint8": 8, "uint16": 16, "float16": 0}
"""Of pixels, as the native kernel takes them."""


def noise(out: NDArray[np.float32], seed: int, image_index: int) -> None:
    """Fill out [3,H,W] with the standard normal noise of a seed (docs/design.md, "Seed contract")."""
    from l2p_runtime.noise import normal_noise

    channels, rows, columns = out.shape
    normal_noise(seed, image_index=image_index, channels=channels, rows=(0, rows), cols=(0, columns), out=out)


def euler(
    image: NDArray[np.float32],
    prediction: NDArray[np.float32],
    negative: NDArray[np.float32] | None,
    guidance: float,
    step: float,
) -> None:
    """One Euler step in place: image += velocity * step, all [B,3,H,W] float32.

    The velocity is minus the prediction; with guidance, negative + guidance * (positive - negative).
    """
    native = load_native()
    others = (prediction,) if negative is None else (prediction, negative)
    if native is None or not all(_has_lines(array, image.shape) for array in (image, *others)):
        euler_numpy(image, prediction, negative, guidance, step)
        return
    for index in _leading(image):
        base = (None, 0, 0) if negative is None else _plane(negative[index])
        planes = (*_plane(image[index]), *_plane(prediction[index]), *base)
        _require_done(native.euler(*planes, *image.shape[-3:], guidance, step, threads_asked()), "euler")


def pixels(out: NDArray[Any], image: NDArray[np.float32]) -> None:
    """Turn image [3,H,W] in [-1,1] into out [H,W,3]: full-range uint8 or uint16, rounded; or float16 in [0,1].

    NaN stays NaN in float16 and becomes 0 in the integers.
    """
    native, bits = load_native(), _BITS[str(out.dtype)]
    _, rows, columns = image.shape
    fits = out.shape == (rows, columns, 3) and out.flags.c_contiguous and out.flags.aligned
    if native is None or not fits or not _has_lines(image, (3, rows, columns)):
        pixels_numpy(out, image)
        return
    _require_done(native.pixels(out.ctypes.data, bits, *_plane(image), rows, columns, threads_asked()), "pixels")


def mix_enlarged(
    image: NDArray[np.float32],
    coarse: NDArray[np.float32],
    row_taps: NDArray[np.int32],
    row_weights: NDArray[np.float32],
    column_taps: NDArray[np.int32],
    column_weights: NDArray[np.float32],
    sigma: float,
) -> None:
    """Turn noise [3,H,W] into sigma * noise + (1 - sigma) * coarse [3,h,w] enlarged, in place.

    A pixel of the enlarged image is made of 4 x 4 coarse ones; taps [H,4] and [W,4] say of which, with their weights.
    """
    native = load_native()
    tables = (row_taps, row_weights, column_taps, column_weights)
    fits = all(table.flags.c_contiguous and table.flags.aligned for table in tables)
    if native is None or not fits or not all(_has_lines(array, array.shape) for array in (image, coarse)):
        mix_enlarged_numpy(image, coarse, *tables, sigma)
        return
    addresses = [table.ctypes.data for table in tables]
    sizes = (*_plane(image), *_plane(coarse), *coarse.shape[1:], *addresses, *image.shape)
    _require_done(native.mix_enlarged(*sizes, sigma, 1.0 - sigma, threads_asked()), "mix_enlarged")


def euler_numpy(
    image: NDArray[np.float32],
    prediction: NDArray[np.float32],
    negative: NDArray[np.float32] | None,
    guidance: float,
    step: float,
) -> None:
    """`euler` with NumPy only."""
    import numpy as np

    for rows in _row_chunks(image.shape[-2]):
        guided = prediction[..., rows, :]
        if negative is not None:
            base = negative[..., rows, :]
            guided = base + np.float32(guidance) * (guided - base)
        image[..., rows, :] -= np.float32(step) * guided


def pixels_numpy(out: NDArray[Any], image: NDArray[np.float32]) -> None:
    """`pixels` with NumPy only."""
    import numpy as np

    top = {"uint8": 255.0, "uint16": 65535.0, "float16": 1.0}[str(out.dtype)]
    for rows in _row_chunks(image.shape[-2]):
        unit = (np.clip(image[:, rows], -1.0, 1.0).transpose(1, 2, 0) + np.float32(1.0)) * np.float32(top / 2)
        out[rows] = unit if out.dtype == np.float16 else np.rint(unit)


def mix_enlarged_numpy(
    image: NDArray[np.float32],
    coarse: NDArray[np.float32],
    row_taps: NDArray[np.int32],
    row_weights: NDArray[np.float32],
    column_taps: NDArray[np.int32],
    column_weights: NDArray[np.float32],
    sigma: float,
) -> None:
    """`mix_enlarged` with NumPy only."""
    import numpy as np

    keep, take = np.float32(sigma), np.float32(1.0 - sigma)
    for rows in _row_chunks(image.shape[-2]):
        first, *others = (
            _weighted(coarse[:, taps], column_taps, column_weights) * weights[:, None]
            for taps, weights in zip(row_taps[rows].T, row_weights[rows].T, strict=True)
        )
        enlarged = functools.reduce(np.add, others, first)
        image[:, rows] = keep * image[:, rows] + take * enlarged


KERNELS: Mapping[str, Callable[..., None]] = {
    "noise": noise,
    "euler": euler,
    "pixels": pixels,
    "mix_enlarged": mix_enlarged,
}


def threads_asked() -> int:
    """How many threads `OMP_NUM_THREADS` asks for, which ONNX Runtime itself does not read; 0 for one per core.

    Threads that wait for each other keep their cores, and where other processes want those, each waits for its turn: 20
    steps of the 1k demo at 128 px took 5 s with two threads beside a process on each of two cores, and 1.4 s with one.
    """
    text = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    asked = int(text) if text.isascii() and text.isdigit() else 0
    return min(asked, os.cpu_count() or 1)


def _has_lines(array: NDArray[Any], shape: tuple[int, ...]) -> bool:
    """Whether a native kernel reads an array of this shape where it is: lines of float32, planes and rows anywhere."""
    size = array.itemsize
    fits = str(array.dtype) == "float32" and array.shape == shape and array.ndim >= 3 and array.size > 0
    return fits and array.flags.aligned and array.strides[-1] == size and not any(s % size for s in array.strides)


def _plane(array: NDArray[Any]) -> tuple[int, int, int]:
    """Address of [C,H,W], and the strides of planes and rows in values."""
    return array.ctypes.data, array.strides[0] // array.itemsize, array.strides[1] // array.itemsize


def _leading(array: NDArray[Any]) -> Iterable[tuple[int, ...]]:
    """Indices of each [C,H,W] of [...,C,H,W]."""
    import numpy as np

    return np.ndindex(array.shape[:-3])


def _require_done(status: int, kernel: str) -> None:
    if status != 0:
        raise InternalError(f"the native kernel `{kernel}` returned {status}, wanted 0", hint="set L2P_NATIVE=0")


def _weighted(
    values: NDArray[np.float32], taps: NDArray[np.int32], weights: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Sums [..., W] of four values [..., w] each, added in their order."""
    import numpy as np

    first, *others = (values[..., taps[:, index]] * weights[:, index] for index in range(taps.shape[1]))
    return functools.reduce(np.add, others, first)


def _row_chunks(rows: int) -> list[slice]:
    """Slices of some rows each, so that temporaries stay small beside the image."""
    return [slice(start, start + _CHUNK_ROWS) for start in range(0, rows, _CHUNK_ROWS)]
