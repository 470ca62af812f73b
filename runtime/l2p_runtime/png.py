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

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_RGB = 2
_FILTER_UP = 2
_ROWS = 256
_LEVEL = 6
_KEYWORD_MAX = 79


def write_png(path: str | Path, pixels: NDArray[Any], text: Mapping[str, str] | None = None) -> None:
    """Write an image. The file appears complete, or not at all.

    Args:
        path: the file; an existing one is replaced.
        pixels: [H,W,3] uint8 or uint16, as `Pipeline.generate` returns them.
        text: keyword (Latin-1, 1 to 79 characters) to UTF-8 text, written as iTXt chunks.

    Raises:
        UsageError: pixels of another shape or dtype, or text that a PNG file cannot hold.
        HostError: the file cannot be written.
    """
    file_path, checked = checked_path("path", path), _checked_text(text)
    _check(pixels)
    try:
        with atomic_file(file_path) as file:
            _write(file, pixels, checked, _LEVEL)
    except OSError as error:
        raise HostError(f"cannot write `{file_path}`: {error.strerror or error}") from error


def encode_png(pixels: NDArray[Any], text: Mapping[str, str] | None = None, *, level: int = _LEVEL) -> bytes:
    """An image as the bytes of a PNG file.

    Args:
        pixels: [H,W,3] uint8 or uint16.
        text: as `write_png` takes it.
        level: of the compression, 1 (fast) to 9 (small).

    Raises:
        UsageError: pixels, text or level that a PNG file cannot have.
    """
    checked = _checked_text(text)
    _check(pixels)
    file = io.BytesIO()
    _write(file, pixels, checked, whole_number("level", level, 1, 9))
    return file.getvalue()


def _check(pixels: object) -> None:
    import numpy as np

    if not isinstance(pixels, np.ndarray):
        raise UsageError(f"pixels are a {type(pixels).__name__}, expected an array [H,W,3] of uint8 or uint16")
    fits = pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.size > 0
    if not fits or pixels.dtype not in (np.uint8, np.uint16):
        hint = "draw with dtype uint8 or uint16" if pixels.dtype.kind == "f" else ""
        raise UsageError(
            f"pixels are {pixels.dtype} {list(pixels.shape)}, expected [H,W,3] of uint8 or uint16", hint=hint
        )


def _checked_text(text: Mapping[str, str] | None) -> Mapping[str, str]:
    """Text that an iTXt chunk can hold.

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


def _write(file: BinaryIO, pixels: NDArray[Any], text: Mapping[str, str], level: int) -> None:
    height, width, _ = pixels.shape
    file.write(_SIGNATURE)
    _chunk(file, b"IHDR", struct.pack(">IIBBBBB", width, height, 8 * pixels.dtype.itemsize, _RGB, 0, 0, 0))
    for keyword, value in text.items():
        _chunk(file, b"iTXt", keyword.encode("latin-1") + b"\0\0\0\0\0" + value.encode())
    packer = zlib.compressobj(level)
    for rows in _filtered_rows(pixels):
        if data := packer.compress(rows.tobytes()):
            _chunk(file, b"IDAT", data)
    _chunk(file, b"IDAT", packer.flush())
    _chunk(file, b"IEND", b"")


def _filtered_rows(pixels: NDArray[Any]) -> Iterator[NDArray[np.uint8]]:
    """Rows of bytes: the number of the filter, then the difference from the row above."""
    import numpy as np

    above = np.zeros((1, pixels.shape[1] * 3 * pixels.dtype.itemsize), np.uint8)
    for start in range(0, len(pixels), _ROWS):
        rows = np.ascontiguousarray(pixels[start : start + _ROWS].astype(pixels.dtype.newbyteorder(">")))
        flat = rows.view(np.uint8).reshape(len(rows), -1)
        out = np.full((len(rows), flat.shape[1] + 1), _FILTER_UP, np.uint8)
        out[:, 1:] = flat - np.concatenate([above, flat[:-1]])
        above = flat[-1:]
        yield out


def _chunk(file: BinaryIO, kind: bytes, data: bytes) -> None:
    file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))
