from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from l2p_runtime.errors import HostError, UsageError
from l2p_runtime.images.png import encode_png, write_png

TEXT = {"prompt": "ein roter Kreis, \u7ea2\u8272 \U0001f534", "seed": "7"}


@pytest.mark.parametrize("size", [(1, 1), (3, 7), (300, 5), (257, 64)])
def test_8_bit_pixels_and_text_come_back(tmp_path: Path, size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    write_png(tmp_path / "x.png", pixels, TEXT)
    with Image.open(tmp_path / "x.png") as image:
        np.testing.assert_array_equal(np.asarray(image), pixels)
        assert image.text == TEXT


@pytest.mark.parametrize("level", [1, 6])
def test_a_file_as_bytes_is_the_file(tmp_path: Path, level: int) -> None:
    pixels = np.arange(300 * 7 * 3, dtype=np.uint8).reshape(300, 7, 3)
    write_png(tmp_path / "x.png", pixels, TEXT)
    made = encode_png(pixels, TEXT, level=level)
    assert (made == (tmp_path / "x.png").read_bytes()) == (level == 1)
    (tmp_path / "y.png").write_bytes(made)
    with Image.open(tmp_path / "y.png") as image:
        np.testing.assert_array_equal(np.asarray(image), pixels)
        assert image.text == TEXT


def test_16_bit_pixels_are_stored_whole(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 65536, (300, 31, 3), dtype=np.uint16)
    write_png(tmp_path / "x.png", pixels, {})
    np.testing.assert_array_equal(_decode_16(tmp_path / "x.png"), pixels)


def test_nothing_half_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "x.png"
    target.write_bytes(b"before")

    def fail(self: Path, other: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(HostError, match="No space left"):
        write_png(target, np.zeros((2, 2, 3), np.uint8), {})
    assert target.read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


def test_writers_with_one_process_id_leave_one_whole_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two containers on one folder: each writer is the first process of its own."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    images = [np.full((300, 200, 3), value, np.uint8) for value in (0, 255)]
    whole = {encode_png(image, {}) for image in images}
    with ThreadPoolExecutor(2) as pool:
        for _ in range(10):
            list(pool.map(lambda image: write_png(tmp_path / "x.png", image, {}), images))
            assert (tmp_path / "x.png").read_bytes() in whole
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="nowhere"):
        write_png(tmp_path / "nowhere" / "x.png", np.zeros((2, 2, 3), np.uint8), {})


PIXELS = np.zeros((2, 2, 3), np.uint8)


@pytest.mark.parametrize(
    ("pixels", "text", "needle"),
    [
        (PIXELS[0], {}, r"uint8 \[2, 3\], expected \[H,W,3\]"),
        (PIXELS[:0], {}, r"uint8 \[0, 2, 3\]"),
        (PIXELS[..., :2], {}, r"\[2, 2, 2\]"),
        (PIXELS.astype(np.float16), {}, "pixels are float16"),
        (PIXELS.astype(np.bool_), {}, "pixels are bool"),
        ([[0, 0, 0]], {}, "pixels are a list"),
        (None, {}, "pixels are a NoneType"),
        (PIXELS, "prompt", "text is a str, expected a mapping"),
        (PIXELS, {"prompt": 3}, "text `prompt` is 3, expected text"),
        (PIXELS, {3: "prompt"}, "keyword of text is 3, expected text"),
        (PIXELS, {"": "x"}, "keyword of text is '', expected 1 to 79"),
        (PIXELS, {"k" * 80: "x"}, "expected 1 to 79"),
        (PIXELS, {"\u7ea2": "x"}, "of Latin-1"),
        (PIXELS, {" prompt": "x"}, "keyword of text is ' prompt'"),
        (PIXELS, {"a\nb": "x"}, "keyword of text"),
        (PIXELS, {"prompt": "a\0b"}, "text `prompt` holds a null character"),
        (PIXELS, {"prompt": "\ud800"}, "text `prompt` holds what is no character at position 0"),
    ],
)
def test_what_no_png_file_can_hold(pixels: object, text: object, needle: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=needle):
        write_png(tmp_path / "x.png", pixels, text)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=needle):
        encode_png(pixels, text)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", [None, 3, b"x.png", "", "a\0b"])
def test_what_is_no_path(path: object) -> None:
    with pytest.raises(UsageError, match=r"path is .*expected a path"):
        write_png(path, PIXELS)  # type: ignore[arg-type]


@pytest.mark.parametrize("level", [0, 10, True, 1.5, "6", None])
def test_what_is_no_level(level: object) -> None:
    with pytest.raises(UsageError, match="level is"):
        encode_png(PIXELS, level=level)  # type: ignore[arg-type]


def test_a_path_is_text_or_a_path_and_text_is_optional(tmp_path: Path) -> None:
    write_png(str(tmp_path / "x.png"), PIXELS)
    assert (tmp_path / "x.png").read_bytes() == encode_png(PIXELS, {}, level=np.int64(1))  # type: ignore[arg-type]


def _decode_16(path: Path) -> np.ndarray:
    """Decode a 16-bit RGB file of filter 2 by hand; Pillow would cut it to 8 bits."""
    import struct
    import zlib

    data, at, packed = path.read_bytes(), 8, b""
    while at < len(data):
        (length,), kind = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        body = data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + body)
        if kind == b"IHDR":
            width, height, bits, colour = struct.unpack(">IIBB", body[:10])
            assert (bits, colour) == (16, 2)
        packed += body if kind == b"IDAT" else b""
        at += 12 + length
    rows = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(height, -1)
    assert (rows[:, 0] == 2).all()
    return np.cumsum(rows[:, 1:], axis=0, dtype=np.uint8).view(">u2").reshape(height, width, 3)
