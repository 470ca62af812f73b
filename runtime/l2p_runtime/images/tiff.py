"""Writes TIFF files of 8 or 16 bits per channel, compressed by Deflate with horizontal differences."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2p_runtime.errors import HostError
from l2p_runtime.files import atomic_file
from l2p_runtime.images.png import check_pixels, check_text

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ROWS = 64
_LEVEL = 1
_HORIZONTAL = 2


def write_tiff(path: Path, pixels: NDArray[Any], metadata: Mapping[str, str], compression: str) -> None:
    """Write an image; arguments and errors are those of `write_image`.

    The metadata is JSON in ImageDescription, with everything but ASCII escaped: texts of TIFF are ASCII.
    """
    import numpy as np
    import tifffile

    check_pixels(pixels)
    text = dict(check_text(metadata))
    options: dict[str, Any] = {}
    if compression == "zip":
        options = {"compression": "zlib", "compressionargs": {"level": _LEVEL}, "predictor": _HORIZONTAL}
    software = text.get("Software", "l2p-export").encode("ascii", "replace").decode()
    try:
        with atomic_file(path) as file:
            tifffile.imwrite(
                file,
                np.ascontiguousarray(pixels),
                photometric="rgb",
                rowsperstrip=_ROWS,
                description=json.dumps(text),
                software=software,
                metadata=None,
                **options,
            )
    except OSError as error:
        raise HostError(f"cannot write `{path}`: {error.strerror or error}") from error


def tiff_reads(path: Path, bits: int, size_px: tuple[int, int]) -> bool:
    """Whether a file is a complete image; see `reads`."""
    import tifffile

    try:
        with tifffile.TiffFile(path) as file:
            page = file.pages[0]
            if page.shape != (*size_px, 3) or str(page.dtype) != f"uint{bits}":
                return False
            return bool(page.asarray().shape == page.shape)
    except Exception:  # noqa: BLE001 - of a foreign file the library raises whatever comes up
        return False
