"""Writes OpenEXR files, half or float, scene-linear with Rec. 709 primaries."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

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
_MAGIC = bytes([0x76, 0x2F, 0x31, 0x01])
_TILED_FLAG = 0x200
_TYPES = {"half": 1, "float": 2}
_BLOCK_ROWS = (1, 1, 1, 16, 32, 16, 32, 32, 32, 256)
"""Rows of a block by the file's number of the compression: none, rle, zips, zip, piz, pxr24, b44, b44a, dwaa, dwab."""
_HEADER_BYTES_MAX = 1 << 24
_WORD_BYTES_MAX = 255
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
    """Whether a file is a complete image; see `reads`.

    By its header and its table of blocks: a file has no checksums, and of one that is cut the library warns on stdout,
    among the lines that a farm reads.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) != _MAGIC:
                return False
            tiled = bool(struct.unpack("<I", file.read(4))[0] & _TILED_FLAG)
            found = dict(_attributes(file))
            left, top, right, bottom = struct.unpack("<4i", found[b"dataWindow"])
            if (bottom - top + 1, right - left + 1) != size_px or _pixel_types(found[b"channels"]) != {
                _TYPES[form.bits]
            }:
                return False
            return _ends_with_its_blocks(file, size_px, found[b"compression"][0], tiled=tiled)
    except (OSError, ValueError, KeyError, IndexError, struct.error):
        return False


def _attributes(file: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """Name and value of each attribute of the header.

    Raises:
        ValueError: it is cut, or longer than any that is written here.
    """
    while name := _word(file):
        _word(file)
        (size,) = struct.unpack("<i", file.read(4))
        if not 0 <= size <= _HEADER_BYTES_MAX or file.tell() > _HEADER_BYTES_MAX:
            raise ValueError(f"an attribute of {size} bytes")
        yield name, file.read(size)


def _word(file: BinaryIO) -> bytes:
    word = b""
    while (letter := file.read(1)) != b"\0":
        if not letter or len(word) > _WORD_BYTES_MAX:
            raise ValueError("a name without an end")
        word += letter
    return word


def _pixel_types(channels: bytes) -> set[int]:
    """The types of all channels: each is a name, its type, and 12 more bytes."""
    found, place = set(), 0
    while channels[place]:
        place = channels.index(b"\0", place) + 1
        found.add(struct.unpack_from("<i", channels, place)[0])
        place += 16
    return found


def _ends_with_its_blocks(file: BinaryIO, size_px: tuple[int, int], compression: int, *, tiled: bool) -> bool:
    """Whether every block is in the file, and the last one ends it."""
    import numpy as np

    height, width = size_px
    side, rows = _TILE_PX, _BLOCK_ROWS[compression]
    count = -(-height // side) * -(-width // side) if tiled else -(-height // rows)
    offsets = np.frombuffer(file.read(8 * count), "<u8")
    end = file.seek(0, 2)
    if len(offsets) != count or not offsets.all() or int(offsets.max()) >= end:
        return False
    file.seek(int(offsets.max()) + (16 if tiled else 4))
    (size,) = struct.unpack("<i", file.read(4))
    return bool(file.tell() + size == end)
