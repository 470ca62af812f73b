"""STUB until the real package is merged; not committed."""

from __future__ import annotations
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from l2p_runtime.errors import UsageError
from l2p_runtime.png import write_png


@dataclass(frozen=True)
class ImageFormat:
    dtype: str


def image_format(path, *, bits=None, compression=None, color=None, tiled=False):
    if Path(path).suffix.lower() != ".png":
        raise UsageError(f"`{path}`, expected a name ending in .png")
    return ImageFormat(f"uint{bits or 8}")


def write_image(path, pixels, metadata, format):
    write_png(path, pixels, metadata)


def reads(path, format, size):
    import numpy as np
    from PIL import Image

    try:
        with Image.open(path) as im:
            np.asarray(im)
            return im.size == (size[1], size[0])
    except Exception:
        return False
