"""The host as a device: NumPy arrays, and the kernels between networks in NumPy or native code."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from l2p_runtime.errors import HostError, InternalError
from l2p_runtime.memory import available_host_bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_CHUNK_ROWS = 64


class HostDevice:
    """Host memory; implements `Device`."""

    name = "cpu"

    def alloc(self, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        """Uninitialised memory.

        Raises:
            HostError: the host has not that much.
        """
        import numpy as np

        try:
            return np.empty(shape, dtype)
        except MemoryError as error:
            raise HostError(f"no memory for {list(shape)} {dtype}: {error}", hint="draw a smaller image") from error

    def upload(self, values: NDArray[Any]) -> NDArray[Any]:
        """The values themselves when contiguous, else a contiguous copy."""
        import numpy as np

        return np.ascontiguousarray(values)

    def download(self, array: Any) -> NDArray[Any]:
        """The array itself."""
        values: NDArray[Any] = array
        return values

    def contiguous(self, view: Any) -> NDArray[Any]:
        """The view itself if its values are contiguous, else a copy."""
        import numpy as np

        return np.ascontiguousarray(view)

    def copy(self, target: Any, source: Any) -> None:
        """Copy values between equally shaped views."""
        if target.shape != source.shape:
            raise InternalError(f"copy from {source.shape} to {target.shape}")
        target[...] = source

    def launch(self, kernel: str, *arguments: Any) -> None:
        """Run one of `KERNELS`."""
        KERNELS[kernel](*arguments)

    def synchronize(self) -> None:
        """Nothing runs behind the caller's back on the host."""

    def available_bytes(self) -> int:
        """Memory the system could give now, within the limits of this process's container."""
        return available_host_bytes()

    def close(self) -> None:
        """Arrays of the host go when nobody refers to them."""


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
    import numpy as np

    for rows in _row_chunks(image.shape[-2]):
        guided = prediction[..., rows, :]
        if negative is not None:
            base = negative[..., rows, :]
            guided = base + np.float32(guidance) * (guided - base)
        image[..., rows, :] -= np.float32(step) * guided


def pixels(out: NDArray[Any], image: NDArray[np.float32]) -> None:
    """Turn image [3,H,W] in [-1,1] into out [H,W,3]: full-range uint8 or uint16, rounded; or float16 in [0,1]."""
    import numpy as np

    top = {"uint8": 255.0, "uint16": 65535.0, "float16": 1.0}[str(out.dtype)]
    for rows in _row_chunks(image.shape[-2]):
        unit = (np.clip(image[:, rows], -1.0, 1.0).transpose(1, 2, 0) + np.float32(1.0)) * np.float32(top / 2)
        out[rows] = unit if out.dtype == np.float16 else np.rint(unit)


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
