"""Image files that Pillow does not write: TIFFs of any tags, PNGs with extra chunks, ICC profiles."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image

ADOBE_RGB = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
"""XYZ under D50 of the red, green and blue of Adobe RGB (1998), annex C."""

ADOBE_GAMMA = 563 / 256


def tiff_file(values: bytes, width: int, height: int, tags: Mapping[int, tuple[int, ...]]) -> bytes:
    """An uncompressed little-endian TIFF of one strip; `tags` hold SHORTs: 258 bits, 262 photometric, and so on."""
    samples = len(tags[258])
    entries = {256: (width,), 257: (height,), 259: (1,), 273: (8,), 277: (samples,), 278: (height,), 279: (0,)} | tags
    body, extra = values + b"\0" * (len(values) % 2), b""
    at = 8 + len(body) + 2 + 12 * len(entries) + 4
    rows = b""
    for tag, found in sorted(entries.items()):
        if tag in (273, 279):
            rows += struct.pack("<HHII", tag, 4, 1, 8 if tag == 273 else len(values))
            continue
        data = struct.pack(f"<{len(found)}H", *found)
        if len(data) > 4:
            rows += struct.pack("<HHII", tag, 3, len(found), at + len(extra))
            extra += data
        else:
            rows += struct.pack("<HHI", tag, 3, len(found)) + data.ljust(4, b"\0")
    head = struct.pack("<2sHI", b"II", 42, 8 + len(body))
    return head + body + struct.pack("<H", len(entries)) + rows + bytes(4) + extra


def png_file(rows: bytes, width: int, height: int, depth: int, kind: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG from filtered rows; `chunks` come before the pixels."""
    head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    parts = [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*part) for part in parts)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def icc_profile(primaries: tuple[tuple[float, float, float], ...] = ADOBE_RGB, gamma: float = ADOBE_GAMMA) -> bytes:
    """A matrix profile of ICC version 2, with a pure power as its curve."""
    curve = b"curv" + bytes(4) + struct.pack(">IHxx", 1, round(gamma * 256))
    parts = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", 2) + b"a\0" + bytes(78),
        b"cprt": b"text" + bytes(4) + b"none\0\0\0\0",
        b"wtpt": _xyz((0.9642, 1.0, 0.8249)),
        **{name: _xyz(found) for name, found in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=True)},
        **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve),
    }
    at, table, body = 128 + 4 + 12 * len(parts), struct.pack(">I", len(parts)), b""
    for name, data in parts.items():
        padded = data + bytes(-len(data) % 4)
        table += struct.pack(">4sII", name, at + len(body), len(data))
        body += padded
    head = struct.pack(">I4sI4s4s4s", at + len(body), b"none", 0x02100000, b"mntr", b"RGB ", b"XYZ ")
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + struct.pack(">iii", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + table + body


def _xyz(values: tuple[float, float, float]) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">iii", *(round(value * 65536) for value in values))


def saved(pixels: NDArray[np.generic] | Image.Image, form: str, **options: object) -> bytes:
    """A picture as Pillow writes it."""
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(buffer, form, **options)
    return buffer.getvalue()
