"""Writes PNG files of 8 or 16 bits per channel, with text in them (PNG third edition, W3C 2025).

The common imaging libraries write no 16-bit RGB, and the runtime depends only on NumPy.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from l2p_runtime.arguments import path as checked_path
from l2p_runtime.arguments import shown, whole_number
from l2p_runtime.arguments import text as checked_text
from l2p_runtime.errors import HostError, UsageError
from l2p_runtime.files import atomic_file
from l2p_runtime.images.color import linear_rows

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_RGB = 2
_FILTER_UP = 2
_PERCEPTUAL = 0
_PIECE_BYTES = 1 << 20
_CHUNK_BYTES_MAX = 1 << 28
_BAND_BYTES = 1 << 20
_LEVEL = 1
"""Of zlib, here packing only runs: of photos, smaller files than level 6 makes, in less than a tenth of its time."""
_KEYWORD_MAX = 79


def write_png(
    path: str | Path, pixels: NDArray[Any], text: Mapping[str, str] | None = None, *, linear: bool = False
) -> None:
    """Write an image. The file appears complete, or not at all.

    Args:
        path: the file; an existing one is replaced.
        pixels: [H,W,3] uint8 or uint16, as `Pipeline.generate` returns them.
        text: keyword (Latin-1, 1 to 79 characters) to UTF-8 text, written as iTXt chunks.
        linear: store scene-linear light instead of the sRGB-encoded pixels, and say so; only uint16.

    Raises:
        UsageError: pixels of another shape or dtype, or text that a PNG file cannot hold.
        HostError: the file cannot be written.
    """
    file_path, checked = checked_path("path", path), check_text(text)
    check_pixels(pixels)
    if linear and pixels.dtype.itemsize == 1:
        raise UsageError("8 bits are too few for linear light", hint="draw with dtype uint16")
    try:
        with atomic_file(file_path) as file:
            _write(file, pixels, checked, _LEVEL, linear=linear)
    except OSError as error:
        raise HostError(f"cannot write `{file_path}`: {error.strerror or error}") from error


def encode_png(pixels: NDArray[Any], text: Mapping[str, str] | None = None, *, level: int = _LEVEL) -> bytes:
    """An image as the bytes of a PNG file.

    Args:
        pixels: [H,W,3] uint8 or uint16.
        text: as `write_png` takes it.
        level: of zlib. 1 packs runs of equal bytes, which is best for photos; 2 to 9 search repeated patterns too, ever
            longer.

    Raises:
        UsageError: pixels, text or level that a PNG file cannot have.
    """
    checked = check_text(text)
    check_pixels(pixels)
    file = io.BytesIO()
    _write(file, pixels, checked, whole_number("level", level, 1, 9))
    return file.getvalue()


def png_reads(path: Path, bits: int, size_px: tuple[int, int]) -> bool:
    """Whether a file is a complete PNG image of a size and of RGB with some bits; inflates all of it, in pieces."""
    height, width = size_px
    left = height * (1 + width * 3 * bits // 8)
    unpacker = zlib.decompressobj()
    try:
        with path.open("rb") as file:
            if file.read(len(_SIGNATURE)) != _SIGNATURE:
                return False
            for kind, data in _chunks(file):
                if kind == b"IHDR" and data != struct.pack(">IIBBBBB", width, height, bits, _RGB, 0, 0, 0):
                    return False
                if kind == b"IDAT":
                    waiting = data
                    while waiting and left >= 0:
                        left -= len(unpacker.decompress(waiting, _PIECE_BYTES))
                        waiting = unpacker.unconsumed_tail
                if kind == b"IEND":
                    return left == 0 and unpacker.eof and not file.read(1)
    except (OSError, ValueError, struct.error, zlib.error):
        pass
    return False


def _chunks(file: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """Kind and data of each chunk.

    Raises:
        ValueError: it is cut, larger than any that is written here, or its checksum is wrong.
    """
    while header := file.read(8):
        size, kind = struct.unpack(">I4s", header)
        if size > _CHUNK_BYTES_MAX:
            raise ValueError(f"a chunk of {size} bytes")
        data, checksum = file.read(size), file.read(4)
        if checksum != struct.pack(">I", zlib.crc32(kind + data)):
            raise ValueError(f"the checksum of {kind!r} is wrong")
        yield kind, data


def check_pixels(pixels: object) -> None:
    """Refuse anything but [H,W,3] of uint8 or uint16.

    Raises:
        UsageError: it is something else.
    """
    import numpy as np

    if not isinstance(pixels, np.ndarray):
        raise UsageError(f"pixels are a {type(pixels).__name__}, expected an array [H,W,3] of uint8 or uint16")
    fits = pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.size > 0
    if not fits or pixels.dtype not in (np.uint8, np.uint16):
        hint = "draw with dtype uint8 or uint16" if pixels.dtype.kind == "f" else ""
        raise UsageError(
            f"pixels are {pixels.dtype} {list(pixels.shape)}, expected [H,W,3] of uint8 or uint16", hint=hint
        )


def check_text(text: Mapping[str, str] | None) -> Mapping[str, str]:
    """Text that an image file can hold.

    Raises:
        UsageError: no mapping of texts, a keyword of another length or with other characters, or no text.
    """
    if text is None:
        return {}
    if not isinstance(text, Mapping):
        raise UsageError(f"text is a {type(text).__name__}, expected a mapping of keyword to text")
    for keyword, value in text.items():
        checked_text("a keyword of text", keyword)
        printable = all(32 <= ord(letter) <= 126 or 161 <= ord(letter) <= 255 for letter in keyword)
        if not (1 <= len(keyword) <= _KEYWORD_MAX and printable) or keyword != keyword.strip():
            raise UsageError(
                f"a keyword of text is {shown(keyword)}, expected 1 to {_KEYWORD_MAX} printable characters of Latin-1"
            )
        checked_text(f"text `{keyword}`", value)
    return text


def _write(file: BinaryIO, pixels: NDArray[Any], text: Mapping[str, str], level: int, *, linear: bool = False) -> None:
    height, width, _ = pixels.shape
    file.write(_SIGNATURE)
    _chunk(file, b"IHDR", struct.pack(">IIBBBBB", width, height, 8 * pixels.dtype.itemsize, _RGB, 0, 0, 0))
    if linear:
        _chunk(file, b"gAMA", struct.pack(">I", 100_000))
    else:
        _chunk(file, b"sRGB", bytes([_PERCEPTUAL]))
    for keyword, value in text.items():
        _chunk(file, b"iTXt", keyword.encode("latin-1") + b"\0\0\0\0\0" + value.encode())
    packer = zlib.compressobj(level, strategy=zlib.Z_RLE if level == _LEVEL else zlib.Z_DEFAULT_STRATEGY)
    for rows in _filtered_rows(pixels, linear=linear):
        if data := packer.compress(rows.data):
            _chunk(file, b"IDAT", data)
    _chunk(file, b"IDAT", packer.flush())
    _chunk(file, b"IEND", b"")


def _filtered_rows(pixels: NDArray[Any], *, linear: bool) -> Iterator[NDArray[np.uint8]]:
    """Rows of bytes: the number of the filter, then the difference from the row above."""
    import numpy as np

    above = np.zeros((1, pixels.shape[1] * 3 * pixels.dtype.itemsize), np.uint8)
    band_rows = max(1, _BAND_BYTES // above.size)
    for start in range(0, len(pixels), band_rows):
        part = pixels[start : start + band_rows]
        if linear:
            part = np.rint(linear_rows(part, "float64") * np.iinfo(pixels.dtype).max)
        rows = np.ascontiguousarray(part.astype(pixels.dtype.newbyteorder(">")))
        flat = rows.view(np.uint8).reshape(len(rows), -1)
        out = np.empty((len(rows), flat.shape[1] + 1), np.uint8)
        out[:, 0] = _FILTER_UP
        np.subtract(flat[:1], above, out=out[:1, 1:])
        np.subtract(flat[1:], flat[:-1], out=out[1:, 1:])
        above = flat[-1:]
        yield out


def _chunk(file: BinaryIO, kind: bytes, data: bytes) -> None:
    file.write(struct.pack(">I4s", len(data), kind))
    file.write(data)
    file.write(struct.pack(">I", zlib.crc32(data, zlib.crc32(kind))))
