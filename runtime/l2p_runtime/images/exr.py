"""Writes OpenEXR files, half or float, scene-linear with Rec. 709 primaries."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2p_runtime.errors import HostError
from l2p_runtime.files import atomic_file
from l2p_runtime.images.color import REC_709, linear_rows
from l2p_runtime.images.png import check_pixels, check_text

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from l2p_runtime.images import ImageFormat

_DTYPES = {"half": "float16", "float": "float32"}
_COMPRESSIONS = {"none": "no"}
"""Our names to the library's, where they differ."""
_TILE_PX = 64
_PREFIX = "l2p:"
"""Before the names of our attributes: a bare `seed` could be somebody else's."""


def write_exr(path: Path, pixels: NDArray[Any], metadata: Mapping[str, str], form: ImageFormat) -> None:
    """Write an image; arguments and errors are those of `write_image`.

    Every attribute is text: whole numbers wrap at 32 bits in OpenEXR 3.5.3.
    """
    import OpenEXR

    check_pixels(pixels)
    header: dict[str, Any] = {
        "compression": getattr(OpenEXR, f"{_COMPRESSIONS.get(form.compression, form.compression).upper()}_COMPRESSION"),
        "type": OpenEXR.tiledimage if form.tiled else OpenEXR.scanlineimage,
        "chromaticities": REC_709,
        **{name if name == "Software" else f"{_PREFIX}{name}": text for name, text in check_text(metadata).items()},
    }
    if form.tiled:
        tiles = OpenEXR.TileDescription()
        tiles.xSize = tiles.ySize = _TILE_PX
        header["tiles"] = tiles
    # Contiguous: OpenEXR 3.5.3 writes wrong pixels of any other array, without an error.
    light = linear_rows(pixels, _DTYPES[form.bits])
    try:
        with atomic_file(path) as file:
            OpenEXR.File(header, {"RGB": light}).write(file)
    except (OSError, RuntimeError) as error:
        raise HostError(f"cannot write `{path}`: {getattr(error, 'strerror', None) or error}") from error


def exr_reads(path: Path, form: ImageFormat, size_px: tuple[int, int]) -> bool:
    """Whether a file is a complete image; see `reads`."""
    import OpenEXR

    try:
        if _size(OpenEXR.File(str(path), header_only=True)) != size_px:
            return False
        with OpenEXR.File(str(path)) as file:
            pixels = file.parts[0].channels["RGB"].pixels
            return bool(pixels.shape == (*size_px, 3) and str(pixels.dtype) == _DTYPES[form.bits])
    except Exception:  # noqa: BLE001 - of a foreign file the library raises whatever comes up
        return False


def _size(file: Any) -> tuple[int, int]:
    (left, top), (right, bottom) = file.parts[0].header["dataWindow"]
    return int(bottom - top + 1), int(right - left + 1)
