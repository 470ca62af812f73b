"""Pixels and metadata as they are sent: previews, and PNG files in base64."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from l2p_runtime import __version__
from l2p_runtime.images.png import encode_png

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def small_preview(pixels: NDArray[Any], longest_px: int) -> NDArray[np.uint8]:
    """Pixels [H,W,3] as uint8 [h,w,3], every n-th row and column, so that no side exceeds `longest_px`."""
    import numpy as np

    step = max(1, -(-max(pixels.shape[:2]) // longest_px))
    small = pixels[::step, ::step]
    return np.ascontiguousarray(small if small.dtype == np.uint8 else np.rint(small.astype(np.float32) * 255), np.uint8)


def png_base64(pixels: NDArray[Any], text: Mapping[str, str]) -> bytes:
    """A PNG file as base64 in ASCII, which JSON can hold.

    Args:
        pixels: [H,W,3] uint8, or float16 in [0,1], which becomes 16 bits per channel.
        text: keyword to text that the file holds.
    """
    import numpy as np

    if pixels.dtype == np.float16:
        pixels = np.rint(pixels.astype(np.float32) * 65535).astype(np.uint16)
    # The caller waits while this is packed: level 6 made a smooth image 8 % smaller, in eight times the time.
    return base64.b64encode(encode_png(pixels, text, level=1))


def picture_text(report: Mapping[str, Any], prompt: str | None, negative_prompt: str | None) -> dict[str, str]:
    """Metadata for a file of an image, from its report."""
    names = ("seed", "steps", "guidance", "shift", "positions", "plan", "backend", "bundle", "base_grid", "coarse")
    return {
        "Software": f"l2p-export {__version__}",
        "prompt": prompt or "",
        "negative_prompt": negative_prompt or "",
        "seed": str(report["seed"]),
        "bundle": str(report["bundle"]),
        "parameters": json.dumps(
            {name: report[name] for name in (*names, "trained") if name in report} | {"rng": "philox"}
        ),
    }
