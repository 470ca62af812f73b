"""Pictures as cameras, scanners and editors write them: decoded as viewers show them, or refused with the reason."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageCms

from l2p_export.training.corpus.pictures import ON_WHITE, TO_8_BITS, TO_SRGB, TURNED, Picture, decode_picture
from l2p_runtime.errors import ArtifactError
from unit.export.training.corpus.picture_files import ADOBE_GAMMA, ADOBE_RGB, icc_profile, png_file, saved, tiff_file

WIDTH, HEIGHT = 12, 8
RED, BLUE, WHITE = (220, 30, 30), (30, 30, 220), (255, 255, 255)

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""How a camera stores a picture under each EXIF orientation."""


def decoded(data: bytes) -> Picture:
    return decode_picture(data, "a picture", "look at it")


def refusal(data: bytes) -> str:
    with pytest.raises(ArtifactError, match="`a picture` is no readable image: ") as caught:
        decoded(data)
    assert caught.value.hint == "look at it"
    return str(caught.value)


@pytest.fixture
def picture() -> Image.Image:
    """Red on the left, blue on the right, and a black corner above on the left."""
    made = Image.new("RGB", (WIDTH, HEIGHT), RED)
    made.paste(BLUE, (WIDTH // 2, 0, WIDTH, HEIGHT))
    made.paste((0, 0, 0), (0, 0, 3, 2))
    return made


@pytest.fixture
def ramp() -> NDArray[np.float64]:
    """Grey from 0 to 1, [2,256]."""
    return np.linspace(0, 1, 256)[None].repeat(2, 0)


def same(found: Picture, wanted: Image.Image | NDArray[np.generic], off: int = 0) -> bool:
    pixels = np.asarray(wanted.convert("RGB") if isinstance(wanted, Image.Image) else wanted, np.int16)
    if pixels.ndim == 2:
        pixels = pixels[..., None].repeat(3, -1)
    return found.pixels.shape == pixels.shape and int(np.abs(found.pixels - pixels).max()) <= off


# Orientation.


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP", "AVIF", "JPEG"])
def test_pictures_are_turned_upright(picture: Image.Image, orientation: int, form: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = picture if orientation == 1 else picture.transpose(TURNS[orientation])
    options = {"lossless": True} if form == "WEBP" else {"quality": 100, "subsampling": 0} if form == "JPEG" else {}
    if form == "AVIF":
        options = {"quality": 100, "subsampling": "4:4:4"}
    found = decoded(saved(stored, form, exif=exif, **options))
    assert same(found, picture, off=0 if form in ("PNG", "TIFF", "WEBP") else 8)
    assert found.changes == (() if orientation == 1 else (TURNED,))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_no_such_orientation_is_passed_over(picture: Image.Image, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert same(decoded(saved(picture, "PNG", exif=exif)), picture)


def test_damaged_exif_is_passed_over(picture: Image.Image) -> None:
    assert same(decoded(saved(picture, "PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")), picture)


# Transparency.


def glass(picture: Image.Image) -> tuple[Image.Image, Image.Image]:
    """The picture with a hidden black left, a half transparent right, and how it looks on white."""
    alpha = Image.new("L", picture.size, 0)
    alpha.paste(128, (WIDTH // 2, 0, WIDTH, HEIGHT))
    made = picture.convert("RGBA")
    made.putalpha(alpha)
    white = Image.new("RGBA", picture.size, "white")
    return made, Image.alpha_composite(white, made).convert("RGB")


@pytest.mark.parametrize(("form", "mode"), [("PNG", "RGBA"), ("WEBP", "RGBA"), ("TIFF", "RGBA"), ("PNG", "LA")])
def test_transparency_is_put_on_white(picture: Image.Image, form: str, mode: str) -> None:
    made, on_white = glass(picture.convert(mode[:-1]))
    options = {"lossless": True, "exact": True} if form == "WEBP" else {}
    found = decoded(saved(made.convert(mode), form, **options))
    assert same(found, on_white, off=1)
    assert found.pixels[0, 0].tolist() == list(WHITE)
    assert found.changes == (ON_WHITE,)


def test_alpha_that_hides_nothing_is_no_change(picture: Image.Image) -> None:
    found = decoded(saved(picture.convert("RGBA"), "PNG"))
    assert (same(found, picture), found.changes) == (True, ())


@pytest.mark.parametrize(("samples", "photometric"), [(4, 2), (2, 1)])
def test_premultiplied_alpha(samples: int, photometric: int) -> None:
    """RGBa and La: colours are stored times alpha."""
    values = bytes([64] * (samples - 1) + [128, *[0] * (samples - 1), 0])
    data = tiff_file(values, 2, 1, {258: (8,) * samples, 262: (photometric,), 338: (1,)})
    found = decoded(data)
    # 64 / 128 is half of the range: 127 or 128 over white at half alpha.
    assert np.abs(found.pixels[0].astype(int) - [[191] * 3, [255] * 3]).max() <= 1
    assert found.changes == (ON_WHITE,)


def test_palettes(picture: Image.Image) -> None:
    flat = picture.quantize(4)
    assert same(decoded(saved(flat, "PNG")), picture)
    assert same(decoded(saved(flat, "GIF")), picture)
    blue = flat.getpixel((WIDTH - 1, 0))
    wanted = np.asarray(picture).copy()
    wanted[:, WIDTH // 2 :] = WHITE
    for form in ("PNG", "GIF"):
        found = decoded(saved(flat, form, transparency=blue))
        assert same(found, wanted), form
        assert found.changes == (ON_WHITE,)
    # A table of alphas, one per entry.
    found = decoded(saved(flat, "PNG", transparency=bytes(0 if index == blue else 255 for index in range(4))))
    assert same(found, wanted)


def test_a_transparent_colour(picture: Image.Image) -> None:
    wanted = np.asarray(picture).copy()
    wanted[:, WIDTH // 2 :] = WHITE
    assert same(decoded(saved(picture, "PNG", transparency=BLUE)), wanted)
    grey = Image.new("L", (4, 4), 7)
    grey.putpixel((0, 0), 0)
    found = decoded(saved(grey, "PNG", transparency=7))
    assert found.pixels[..., 0].tolist() == [[0, 255, 255, 255], *[[255] * 4] * 3]


@pytest.mark.parametrize(("depth", "key"), [(1, 1), (1, 0), (2, 1), (4, 9), (8, 77)])
def test_a_transparent_grey_of_few_bits(depth: int, key: int) -> None:
    per_byte = 8 // depth
    values = (np.arange(32) % (1 << depth)).astype(np.uint8)
    packed = [
        sum(int(value) << depth * (per_byte - 1 - place) for place, value in enumerate(values[at : at + per_byte]))
        for at in range(0, 32, per_byte)
    ]
    data = png_file(bytes([0, *packed]), 32, 1, depth, 0, (b"tRNS", struct.pack(">H", key)))
    wanted = np.where(values == key, 255, values.astype(int) * 255 // ((1 << depth) - 1))
    assert same(decoded(data), wanted[None])


# Bits and floats.


def test_grey_of_16_bits_is_scaled_by_its_range(ramp: NDArray[np.float64]) -> None:
    values = np.rint(ramp * 65535).astype(np.uint16)
    for form in ("PNG", "TIFF", "JPEG2000"):
        found = decoded(saved(values, form))
        assert same(found, np.rint(ramp * 255)), form
        assert found.changes == (TO_8_BITS,)
    assert same(decoded(saved(Image.fromarray(values), "PPM")), np.rint(ramp * 255))
    big = tiff_file(values.tobytes(), 256, 2, {258: (16,), 262: (1,)})
    assert same(decoded(big), np.rint(ramp * 255))


def test_grey_where_0_is_white(ramp: NDArray[np.float64]) -> None:
    wide = np.rint(ramp * 65535).astype("<u2").tobytes()
    narrow = np.rint(ramp * 255).astype(np.uint8).tobytes()
    floats = ramp.astype("<f4").tobytes()
    for values, tags in (
        (wide, {258: (16,)}),
        (narrow, {258: (8,)}),
        (floats, {258: (32,), 339: (3,)}),
    ):
        found = decoded(tiff_file(values, 256, 2, {**tags, 262: (0,)}))
        assert same(found, 255 - np.rint(ramp * 255), off=1), tags


def test_grey_of_12_bits_is_scaled_by_its_range() -> None:
    values = np.array([0, 4095, 2048, 1024])
    a, b = values[::2], values[1::2]
    packed = np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], axis=-1).astype(np.uint8).tobytes()
    found = decoded(tiff_file(packed, 4, 1, {258: (12,), 262: (1,)}))
    assert same(found, np.rint(values / 4095 * 255)[None])


@pytest.mark.parametrize("maximum", [1000, 4095, 65535])
def test_portable_grey_of_any_maximum(maximum: int) -> None:
    values = np.array([[0, maximum // 2, maximum]], ">u2")
    found = decoded(b"P5\n3 1\n%d\n" % maximum + values.tobytes())
    assert same(found, np.rint(values / maximum * 255), off=1)


def test_colours_of_16_bits_are_reduced() -> None:
    """Pillow cuts the lower byte, which is within one of 255 steps of the nearest."""
    values = np.random.default_rng(0).integers(0, 65536, (4, 5, 3))
    big = values.astype(">u2")
    png = png_file(b"".join(b"\0" + row.tobytes() for row in big), 5, 4, 16, 2)
    tiff = tiff_file(values.astype("<u2").tobytes(), 5, 4, {258: (16, 16, 16), 262: (2,)})
    for data in (png, tiff):
        found = decoded(data)
        assert same(found, np.rint(values / 65535 * 255), off=1)
        assert found.changes == (TO_8_BITS,)


def test_floats_are_from_0_to_1(ramp: NDArray[np.float64]) -> None:
    found = decoded(saved(ramp.astype(np.float32), "TIFF"))
    assert same(found, np.rint(ramp * 255))
    assert found.changes == (TO_8_BITS,)
    for low, high in ((0, 255), (-1, 1), (0, 1.5), (0, np.nan), (0, np.inf)):
        values = np.array([[low, high]], np.float32)
        assert "expected 0 to 1" in refusal(saved(values, "TIFF"))


@pytest.mark.parametrize(
    ("tags", "count"),
    [
        ({258: (32,), 339: (1,)}, 4),
        ({258: (32,), 339: (2,)}, 4),
        ({258: (16,), 339: (2,)}, 2),
        ({258: (8,), 339: (2,)}, 1),
    ],
)
def test_values_without_a_stated_range_are_refused(tags: dict[int, tuple[int, ...]], count: int) -> None:
    assert "no file states their range" in refusal(tiff_file(bytes(4 * count), 2, 2, {**tags, 262: (1,)}))


def test_wide_values_with_a_transparent_colour_are_refused() -> None:
    grey = png_file(bytes([0, 1, 2]), 1, 1, 16, 0, (b"tRNS", b"\1\2"))
    colour = png_file(bytes([0, *[1, 2] * 3]), 1, 1, 16, 2, (b"tRNS", b"\1\2" * 3))
    for data in (grey, colour):
        assert "16 bits and a transparent colour" in refusal(data)


# Colours.


def test_one_bit(picture: Image.Image) -> None:
    flat = picture.convert("1")
    for form in ("PNG", "TIFF", "BMP", "PPM"):
        assert same(decoded(saved(flat, form)), flat)


def test_cmyk(picture: Image.Image) -> None:
    inks = picture.convert("CMYK")
    for data in (saved(inks, "JPEG", quality=100), saved(inks, "TIFF")):
        found = decoded(data)
        assert same(found, picture, off=6)
        assert found.changes == (TO_SRGB,)


def test_cmyk_without_adobes_marker_is_refused(picture: Image.Image) -> None:
    data = saved(picture.convert("CMYK"), "JPEG")
    at = data.index(b"\xff\xee")
    (length,) = struct.unpack_from(">H", data, at + 2)
    assert data[at + 4 : at + 9] == b"Adobe"
    assert "CMYK without Adobe's marker" in refusal(data[:at] + data[at + 2 + length :])


def test_profiles_are_converted_to_srgb() -> None:
    rgb = np.random.default_rng(1).integers(40, 216, (6, 7, 3)).astype(np.uint8)
    found = decoded(saved(rgb, "PNG", icc_profile=icc_profile()))
    # By the definitions: Adobe RGB to XYZ under D50, to linear sRGB (Bradford), to sRGB.
    xyz = (rgb / 255) ** ADOBE_GAMMA @ np.array(ADOBE_RGB)
    srgb = np.array(((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410)))
    linear = (xyz @ np.linalg.inv(srgb)).clip(0, 1)
    wanted = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    assert same(found, np.rint(wanted * 255), off=2)
    assert np.abs(found.pixels.astype(int) - rgb).max() > 8
    assert found.changes == (TO_SRGB,)


def test_profiles_of_srgb_change_nothing() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    rgb = np.random.default_rng(2).integers(0, 256, (6, 7, 3)).astype(np.uint8)
    found = decoded(saved(rgb, "PNG", icc_profile=profile))
    assert (same(found, rgb), found.changes) == (True, ())
    # A grey picture beside a profile of colours, as editors leave it.
    assert same(decoded(saved(rgb[..., 0], "PNG", icc_profile=profile)), rgb[..., 0])


def test_a_profile_is_applied_under_alpha() -> None:
    rgba = Image.new("RGBA", (2, 1), (0, 200, 0, 255))
    rgba.putpixel((1, 0), (0, 0, 0, 0))
    found = decoded(saved(rgba, "PNG", icc_profile=icc_profile()))
    assert found.pixels[0, 1].tolist() == list(WHITE)
    assert found.changes == (ON_WHITE, TO_SRGB)


def test_profiles_that_do_not_fit_are_refused(picture: Image.Image) -> None:
    assert "ICC profile is for RGB, its pixels are CMYK" in refusal(
        saved(picture.convert("CMYK"), "TIFF", icc_profile=icc_profile())
    )
    assert "profile" in refusal(saved(picture, "PNG", icc_profile=b"no profile" * 20))


@pytest.mark.parametrize(
    ("colours", "says"), [((9, 16), "HDR (PQ)"), ((9, 18), "HDR (HLG)"), ((12, 13), "primaries 12")]
)
def test_colours_that_are_stated_without_a_profile(picture: Image.Image, colours: tuple[int, int], says: str) -> None:
    rows = b"\0" + bytes(3 * WIDTH)
    assert says in refusal(png_file(rows, WIDTH, 1, 8, 2, (b"cICP", bytes([*colours, 0, 1]))))
    assert decoded(png_file(rows, WIDTH, 1, 8, 2, (b"cICP", bytes([1, 13, 0, 1])))).changes == ()
    avif = bytearray(saved(picture, "AVIF"))
    at = avif.index(b"colrnclx") + 8
    assert decoded(bytes(avif)).changes == ()
    avif[at : at + 4] = struct.pack(">HH", *colours)
    assert says in refusal(bytes(avif))


@pytest.mark.parametrize(("gamma", "is_read"), [(45455, True), (100000, False), (55556, False)])
def test_gamma(gamma: int, is_read: bool) -> None:
    stated = (b"gAMA", struct.pack(">I", gamma))
    rows = b"\0" + bytes(3 * WIDTH)
    data = png_file(rows, WIDTH, 1, 8, 2, stated)
    if is_read:
        assert decoded(data).changes == ()
    else:
        assert "states a gamma of" in refusal(data)
    assert decoded(png_file(rows, WIDTH, 1, 8, 2, (b"sRGB", b"\0"), stated)).changes == ()


def test_other_modes_are_refused_by_name(picture: Image.Image) -> None:
    lab = tiff_file(bytes(12), 2, 2, {258: (8, 8, 8), 262: (8,)})
    assert "Pillow's mode LAB" in refusal(lab)


# Files.


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_several_frames_are_refused(picture: Image.Image, form: str) -> None:
    other = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    data = saved(picture, form, save_all=True, append_images=[other])
    assert "has 2 frames or pages, expected one" in refusal(data)


def test_the_first_picture_of_a_cameras_file(picture: Image.Image) -> None:
    preview = picture.resize((4, 4))
    found = decoded(saved(picture, "MPO", save_all=True, append_images=[preview], quality=100, subsampling=0))
    assert same(found, picture, off=8)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "AVIF", "JPEG2000", "PPM"])
def test_truncated_files_are_refused(form: str) -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (40, 40, 3)).astype(np.uint8)
    data = saved(Image.fromarray(pixels).convert("P" if form == "GIF" else "RGB"), form)
    for share in (0.0, 0.1, 0.5, 0.8):
        with pytest.raises(ArtifactError, match="`a picture` is no readable image"):
            decoded(data[: int(share * len(data))])


def test_sizes_are_bounded() -> None:
    # Headers only: nothing of this size is allocated.
    assert "expected 1 to 134,217,728" in refusal(png_file(b"", 1 << 14, (1 << 13) + 1, 8, 2))
    assert "decompression bomb" in refusal(png_file(b"", 1 << 16, 1 << 16, 8, 2))
    for width, height in ((0, 4), (4, 0)):
        for data in (
            png_file(b"", width, height, 8, 2),
            tiff_file(b"", width, height, {258: (8, 8, 8), 262: (2,)}),
            b"P6\n%d %d\n255\n" % (width, height),
        ):
            with pytest.raises(ArtifactError, match="is no readable image"):
                decoded(data)


def test_text_that_unpacks_to_much_is_refused() -> None:
    text = b"comment\0\0" + zlib.compress(bytes(3 << 20))
    assert refusal(png_file(b"\0" + bytes(3), 1, 1, 8, 2, (b"zTXt", text)))


def test_other_formats_are_not_opened(picture: Image.Image) -> None:
    """A PostScript file would be run by an interpreter."""
    for form in ("EPS", "PDF", "ICO", "TGA"):
        with pytest.raises(ArtifactError, match="is no readable image, expected one of JPEG, PNG"):
            decoded(saved(picture, form))


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"]),
    st.integers(0, 1 << 30),
    st.integers(0, 255),
)
def test_a_changed_byte_is_read_or_refused(form: str, place: int, value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (9, 7), RED).convert("P" if form == "GIF" else "RGB")
    data = bytearray(saved(image, form, **({} if form in ("BMP", "GIF") else {"exif": exif})))
    data[place % len(data)] = value
    try:
        pixels = decoded(bytes(data)).pixels
    except ArtifactError:
        return
    assert (pixels.dtype, pixels.ndim, pixels.shape[2]) == (np.uint8, 3, 3)


def test_the_readers_file_can_be_closed(picture: Image.Image) -> None:
    """Pixels outlive the file."""
    data = saved(picture, "BMP")
    found = decoded(data)
    assert same(found, Image.open(BytesIO(data)))
