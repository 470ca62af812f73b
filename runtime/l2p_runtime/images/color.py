"""The transfer function of sRGB (IEC 61966-2-1), between encoded values and scene-linear light, both in [0,1]."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ROWS = 64
"""Rows that are converted at a time, so that float32 copies stay small beside the image."""

REC_709 = (0.64, 0.33, 0.30, 0.60, 0.15, 0.06, 0.3127, 0.3290)
"""Chromaticities x, y of red, green, blue and white (D65), which sRGB has too."""


def to_linear(encoded: NDArray[Any]) -> NDArray[Any]:
    """Scene-linear light of encoded values, of their dtype."""
    import numpy as np

    return np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)


def linear_rows(pixels: NDArray[Any], dtype: str) -> NDArray[np.floating[Any]]:
    """sRGB-encoded pixels [H,W,3] of uint8 or uint16 as scene-linear ones, contiguous, by rows.

    Args:
        pixels: full-range integers, of any layout in memory.
        dtype: of the result, as `float16`.
    """
    import numpy as np

    table = to_linear(np.arange(np.iinfo(pixels.dtype).max + 1) / np.iinfo(pixels.dtype).max).astype(dtype)
    out = np.empty(pixels.shape, dtype)
    for first in range(0, len(pixels), ROWS):
        np.take(table, pixels[first : first + ROWS], out=out[first : first + ROWS])
    return out
