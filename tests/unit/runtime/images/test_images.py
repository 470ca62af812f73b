"""Files of every format, read back by readers that share no code with the writers."""

from __future__ import annotations

import json
import sys
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import OpenEXR
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from l2p_runtime.errors import HostError, UsageError
from l2p_runtime.files import atomic_file
from l2p_runtime.images import COMPRESSIONS, ImageFormat, exr, image_format, png, reads, tiff, write_image
from l2p_runtime.images.color import REC_709, linear_rows, to_linear

Pixels = np.ndarray[Any, Any]
TEXT = {
    "Software": "l2p-export 0.1.0",
    "prompt": "ein Kreis, \u7ea2\u8272 \U0001f534\nund mehr",
    "seed": str(2**63 + 1),
}
FORMATS = [("x.png", "8"), ("x.PNG", "16"), ("x.tif", "8"), ("x.tiff", "16"), ("x.exr", "half"), ("x.exr", "float")]


def linear(value: float) -> float:
    """The standard's own words, in float64."""
    return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4


def random_pixels(size: tuple[int, int], form: ImageFormat, seed: int = 0) -> Pixels:
    top = np.iinfo(form.dtype).max
    return np.random.default_rng(seed).integers(0, top + 1, (*size, 3)).astype(form.dtype)


def read_back(path: Path, form: ImageFormat) -> Pixels:
    if form.kind == "exr":
        return np.asarray(OpenEXR.File(str(path)).channels()["RGB"].pixels)
    if form.kind == "tiff":
        return np.asarray(tifffile.imread(path))
    if form.bits == "8":
        with Image.open(path) as image:
            return np.asarray(image)
    return decode_16(path)


def decode_16(path: Path) -> Pixels:
    """Pillow reads 16 bits of RGB as 8: this one knows only what the writer's filter is."""
    data, place, packed, size = path.read_bytes(), 8, b"", (0, 0)
    while place < len(data):
        length, kind = int.from_bytes(data[place : place + 4]), data[place + 4 : place + 8]
        body = data[place + 8 : place + 8 + length]
        if kind == b"IHDR":
            size = int.from_bytes(body[4:8]), int.from_bytes(body[:4])
        packed += body if kind == b"IDAT" else b""
        place += 12 + length
    rows = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(size[0], -1)
    assert set(rows[:, 0]) == {2}
    return np.cumsum(rows[:, 1:], axis=0, dtype=np.uint8).view(">u2").reshape(*size, 3).astype(np.uint16)


def expected(pixels: Pixels, form: ImageFormat) -> Pixels:
    if form.kind != "exr":
        return pixels
    top = np.iinfo(pixels.dtype).max
    light = np.vectorize(linear)(np.arange(top + 1) / top).astype({"half": "f2", "float": "f4"}[form.bits])
    return np.asarray(light[pixels])


@pytest.mark.parametrize(("name", "bits"), FORMATS)
@pytest.mark.parametrize("size", [(1, 1), (1, 33), (70, 5), (129, 64)])
def test_pixels_come_back(name: str, bits: str, size: tuple[int, int], tmp_path: Path) -> None:
    form = image_format(tmp_path / name, bits=bits)
    pixels = random_pixels(size, form)
    write_image(tmp_path / name, pixels, TEXT, form)
    np.testing.assert_array_equal(read_back(tmp_path / name, form), expected(pixels, form))
    assert reads(tmp_path / name, form, size)
    assert not reads(tmp_path / name, form, (size[0], size[1] + 1))
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(("name", "bits"), FORMATS)
def test_arrays_of_any_layout(name: str, bits: str, tmp_path: Path) -> None:
    """Planes that were turned, crops, mirrors and columns left out: not contiguous, each of them."""
    form = image_format(name, bits=bits)
    planes = np.ascontiguousarray(random_pixels((40, 50), form).transpose(2, 0, 1)).transpose(1, 2, 0)
    for pixels in (planes, planes[3:33, 5:45], planes[::-1], planes[:, ::2]):
        assert not pixels.flags.c_contiguous
        write_image(tmp_path / name, pixels, {}, form)
        np.testing.assert_array_equal(read_back(tmp_path / name, form), expected(pixels, form))


def test_the_library_writes_other_layouts_wrong(tmp_path: Path) -> None:
    """Why EXR pixels are made contiguous; where this fails, the library was mended."""
    planes = np.random.default_rng(0).random((3, 8, 6)).astype(np.float16)
    header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
    OpenEXR.File(header, {"RGB": planes.transpose(1, 2, 0)}).write(str(tmp_path / "x.exr"))
    found = OpenEXR.File(str(tmp_path / "x.exr")).channels()["RGB"].pixels
    assert not np.array_equal(found, planes.transpose(1, 2, 0))


@pytest.mark.parametrize("name", ["x.exr", "x.tif"])
def test_every_compression(name: str, tmp_path: Path) -> None:
    lossy = {"b44", "b44a", "dwaa", "dwab"}
    for compression in COMPRESSIONS[image_format(name).kind]:
        for tiled in (False, True) if name == "x.exr" else (False,):
            form = image_format(name, compression=compression.upper(), tiled=tiled)
            smooth = np.linspace(20000, 60000, 90 * 70 * 3).reshape(90, 70, 3).astype(form.dtype)
            write_image(tmp_path / name, smooth, {}, form)
            tolerance = 0.02 if compression in lossy else 0.0
            np.testing.assert_allclose(read_back(tmp_path / name, form), expected(smooth, form), rtol=0, atol=tolerance)
            assert reads(tmp_path / name, form, (90, 70))


def test_an_exr_file_says_what_its_values_are(tmp_path: Path) -> None:
    form = image_format("x.exr", tiled=True)
    write_image(tmp_path / "x.exr", random_pixels((9, 9), form), TEXT, form)
    header = OpenEXR.File(str(tmp_path / "x.exr")).header()
    np.testing.assert_allclose(header["chromaticities"], REC_709)
    assert header["type"] == OpenEXR.tiledimage
    assert header["compression"] == OpenEXR.ZIP_COMPRESSION
    assert {key: header[key] for key in ("l2p:prompt", "l2p:seed", "Software")} == {
        "l2p:prompt": TEXT["prompt"],
        "l2p:seed": TEXT["seed"],
        "Software": TEXT["Software"],
    }


@given(st.dictionaries(st.sampled_from(["prompt", "seed", "negative_prompt"]), st.text(max_size=300)))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_comes_back(tmp_path: Path, text: dict[str, str]) -> None:
    text = {key: value.replace("\0", " ").encode("utf-8", "replace").decode() for key, value in text.items()}
    for name in ("x.png", "x.tif", "x.exr"):
        form = image_format(name)
        write_image(tmp_path / name, random_pixels((2, 2), form), text, form)
        if form.kind == "exr":
            header = OpenEXR.File(str(tmp_path / name)).header()
            found = {key.removeprefix("l2p:"): value for key, value in header.items() if key.startswith("l2p:")}
        elif form.kind == "tiff":
            with tifffile.TiffFile(tmp_path / name) as file:
                found = json.loads(file.pages[0].description)
        else:
            with Image.open(tmp_path / name) as image:
                found = image.text
        assert found == text


def test_linear_png_files_have_16_bits_and_say_so(tmp_path: Path) -> None:
    form = image_format("x.png", bits=16, color="linear")
    pixels = random_pixels((5, 6), form)
    write_image(tmp_path / "x.png", pixels, {}, form)
    light = np.rint(np.vectorize(linear)(pixels / 65535) * 65535)
    np.testing.assert_array_equal(decode_16(tmp_path / "x.png"), light)
    with Image.open(tmp_path / "x.png") as image:
        assert image.info["gamma"] == 1.0
        assert "srgb" not in image.info


def test_linear_light_by_rows_is_that_of_the_whole() -> None:
    pixels = np.random.default_rng(1).integers(0, 65536, (200, 3, 3)).astype(np.uint16)
    np.testing.assert_array_equal(linear_rows(pixels, "float32"), to_linear(pixels / 65535).astype(np.float32))
    np.testing.assert_allclose(to_linear(np.array([0.04045, 0.040451])), [0.0031308, 0.0031309], atol=1e-6)


@pytest.mark.parametrize(("name", "bits"), FORMATS)
def test_what_is_not_whole_does_not_read(
    name: str, bits: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    form, path, size = image_format(name, bits=bits), tmp_path / name, (80, 70)
    assert not reads(path, form, size)
    write_image(path, random_pixels(size, form), {}, form)
    whole = path.read_bytes()
    middle = len(whole) // 2
    changed = bytearray(whole)
    changed[middle : middle + 40] = bytes(40)
    for content in (b"", whole[:middle], whole[:-1], whole[:40], bytes(changed), b"\x00" * 4096, b"not a picture"):
        if content == bytes(changed) and form.kind == "exr":
            continue  # EXR has no checksum; a frame appears whole or not at all
        path.write_bytes(content)
        assert not reads(path, form, size) or (content == whole[:-1] and form.kind == "tiff"), content[:20]
    path.unlink()
    path.mkdir()
    assert not reads(path, form, size)
    assert capfd.readouterr() == ("", ""), "lines on stdout are a farm's"


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.exr"])
def test_a_name_that_no_file_can_have_does_not_read(name: str, tmp_path: Path) -> None:
    assert not reads(tmp_path / ("x" * 300 + name), image_format(name), (1, 1))


def test_another_depth_does_not_read(tmp_path: Path) -> None:
    for name, few, many in (("x.png", "8", "16"), ("x.tif", "8", "16"), ("x.exr", "half", "float")):
        form = image_format(name, bits=few)
        write_image(tmp_path / name, random_pixels((8, 8), form), {}, form)
        assert not reads(tmp_path / name, image_format(name, bits=many), (8, 8))


@pytest.mark.parametrize(
    ("name", "options", "needle"),
    [
        ("x.jpg", {}, "expected one ending in .png, .tif, .tiff, .exr"),
        ("x.jxl", {}, "expected one ending in"),
        ("x", {}, "expected one ending in"),
        ("x.png", {"bits": "half"}, "bits is 'half', PNG files have 8, 16"),
        ("x.exr", {"bits": 8}, "bits is '8', EXR files have half, float"),
        ("x.exr", {"color": "sRGB"}, "EXR files are scene-linear"),
        ("x.png", {"color": "linear"}, "8 bits are too few for linear light"),
        ("x.tif", {"color": "linear", "bits": 16}, "TIFF files cannot say so"),
        ("x.png", {"color": "P3"}, "color is 'P3'"),
        ("x.png", {"compression": "piz"}, "compression is 'piz', PNG files have zip"),
        ("x.exr", {"compression": "lzw"}, "EXR files have zip, zips, piz"),
        ("x.tif", {"tiled": True}, "TIFF files have no tiles here"),
    ],
)
def test_what_a_format_has_not_is_refused(name: str, options: dict[str, Any], needle: str) -> None:
    with pytest.raises(UsageError, match=needle):
        image_format(name, **options)


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for library in ("OpenEXR", "tifffile"):
        monkeypatch.setitem(sys.modules, library, None)
    assert image_format("x.png").kind == "png"
    for name, library in (("x.exr", "OpenEXR"), ("x.tiff", "tifffile")):
        with pytest.raises(HostError, match=library) as caught:
            image_format(name)
        assert caught.value.hint == "pip install 'l2p-export[images]'"


@pytest.mark.parametrize(("name", "module"), [("x.png", png), ("x.tif", tiff), ("x.exr", exr)])
def test_a_full_disk_leaves_what_was_there(
    name: str, module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        """A file on a disk with room for 100 bytes."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, data: bytes) -> int:
            if self.file.tell() + len(data) > 100:
                raise OSError(28, "No space left on device")
            return int(self.file.write(data))

        def __getattr__(self, attribute: str) -> Any:
            return getattr(self.file, attribute)

    @contextmanager
    def full(path: Path) -> Any:
        with atomic_file(path) as file:
            yield Full(file)

    monkeypatch.setattr(module, "atomic_file", full)
    form = image_format(name)
    (tmp_path / name).write_bytes(b"before")
    with pytest.raises(HostError, match="cannot write"):
        write_image(tmp_path / name, random_pixels((60, 60), form), {}, form)
    assert (tmp_path / name).read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.exr"])
def test_other_pixels_are_refused(name: str, tmp_path: Path) -> None:
    form = image_format(name)
    for pixels in (np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((0, 4, 3), np.uint8), None):
        with pytest.raises(UsageError, match="pixels are"):
            write_image(tmp_path / name, pixels, {}, form)
    assert not list(tmp_path.iterdir())
