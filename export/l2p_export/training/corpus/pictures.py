"""Decodes image files as viewers show them: upright, on white, in 8-bit sRGB. docs/training.md, "Pictures"."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from l2p_export.training.corpus.colours import in_srgb, require_standard_colours
from l2p_runtime.errors import ArtifactError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image as PillowImage

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "AVIF", "JPEG2000")
"""Pillow's names of the formats that are read. Others are not: its EPS reader starts an interpreter, for example."""

PIXELS_MAX = 1 << 27
"""Maximum pixels of a picture; Pillow refuses from 1.8e8 on."""

FILE_BYTES_MAX = 1 << 30

TURNED, ON_WHITE, TO_SRGB, TO_8_BITS = "turned upright", "put on white", "converted to sRGB", "reduced to 8 bits"
CHANGES = (TURNED, ON_WHITE, TO_SRGB, TO_8_BITS)
"""What may be changed when a picture is decoded."""

_ORIENTATION, _BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 0x0112, 258, 262, 339
"""Tags of TIFF and EXIF."""

_WHITE_IS_ZERO, _SIGNED = 0, 2
_TURNS = (
    "FLIP_LEFT_RIGHT",
    "ROTATE_180",
    "FLIP_TOP_BOTTOM",
    "TRANSPOSE",
    "ROTATE_270",
    "TRANSVERSE",
    "ROTATE_90",
)
"""What turns EXIF orientations 2 to 8 upright; names of `Image.Transpose`."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A decoded picture: uint8 sRGB pixels [H,W,3], and which of `CHANGES` were made."""

    pixels: NDArray[np.uint8]
    changes: tuple[str, ...]


def decode_picture(data: bytes, name: str, hint: str) -> Picture:
    """Decode an image file.

    Args:
        data: the file.
        name: of the file, for errors.
        hint: of errors.

    Raises:
        ArtifactError: damaged, not an image, larger than `PIXELS_MAX`, or one that has no single right reading
            (animations, HDR, values without a stated range); names the reason.
    """
    import numpy as np
    from PIL import Image

    Image.init()
    # A build of Pillow may lack some.
    formats = [form for form in FORMATS if form in Image.OPEN]
    with _faults_naming(name, hint), Image.open(io.BytesIO(data), formats=formats) as image:
        _require_one_picture(image)
        require_standard_colours(data, image)
        is_turned = _orientation(image) != 1
        image.load()
        base, alpha, is_reduced = _channels(image, data)
        colours, is_converted = in_srgb(base, image.info.get("icc_profile"))
        is_transparent = alpha is not None and alpha.getextrema()[0] != 255
        if is_transparent:
            white = Image.new("RGB", colours.size, "white")
            white.paste(colours, mask=alpha)
            colours = white
        # Pillow turns a TIFF when it loads it; then this is 1.
        orientation = _orientation(image)
        if orientation != 1:
            colours = colours.transpose(Image.Transpose[_TURNS[orientation - 2]])
        made = (is_turned, is_transparent, is_converted, is_reduced)
        return Picture(np.asarray(colours), tuple(what for what, is_so in zip(CHANGES, made, strict=True) if is_so))


class _UnreadableError(Exception):
    """A picture that is refused; its text says why."""


@contextmanager
def _faults_naming(name: str, hint: str) -> Iterator[None]:
    """Refuse a picture by its file's name, whatever the reader raises."""
    from PIL import UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            # Pillow warns about metadata that it passes over, and about sizes that are checked here.
            warnings.simplefilter("ignore")
            yield
    except UnidentifiedImageError as error:
        known = ", ".join(FORMATS)
        raise ArtifactError(
            f"`{name}` is no readable image, expected one of {known} in a kind that Pillow opens", hint=hint
        ) from error
    except Exception as error:  # readers of damaged files raise what their parsing happens to hit
        raise ArtifactError(f"`{name}` is no readable image: {error or type(error).__name__}", hint=hint) from error


def _require_one_picture(image: PillowImage) -> None:
    """Check the size, and that the file holds one picture."""
    if min(image.size) < 1 or image.width * image.height > PIXELS_MAX:
        raise _UnreadableError(f"it has {image.width}x{image.height} pixels, expected 1 to {PIXELS_MAX:,}")
    # A file of several JPEGs, as cameras and phones write it: others than the first are previews and gain maps.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise _UnreadableError(f"it has {getattr(image, 'n_frames', 2)} frames or pages, expected one")


def _orientation(image: PillowImage) -> int:
    """EXIF orientation, 1 to 8; 1 if there is none, or none that can be read."""
    tags = getattr(image, "tag_v2", None)
    try:
        found = image.getexif().get(_ORIENTATION, 1) if tags is None else tags.get(_ORIENTATION, 1)
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError):
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _channels(image: PillowImage, data: bytes) -> tuple[PillowImage, PillowImage | None, bool]:
    """Split a picture into 8-bit colours (mode L, RGB or CMYK) and alpha, and say whether it had more bits."""
    mode = image.mode
    if mode in ("I", "F") or mode.startswith("I;16"):
        return _scaled(image), None, True
    if _tag(image, _SAMPLE_FORMAT, 1) == _SIGNED:
        raise _UnreadableError("its values are signed, and no file states their range")
    if mode == "CMYK" and image.format in ("JPEG", "MPO") and "adobe" not in image.info:
        raise _UnreadableError("it is CMYK without Adobe's marker, so nothing says whether 0 is no ink")
    is_wide = _bits(image, data) > 8
    if mode in ("P", "PA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    elif mode in ("La", "RGBa"):
        image = image.convert(mode.upper())
    elif mode in ("1", "L", "RGB") and "transparency" in image.info:
        return *_keyed(image, data), is_wide
    if image.mode in ("LA", "RGBA"):
        *colours, alpha = image.split()
        return _merged(colours), alpha, is_wide
    if image.mode in ("1", "YCbCr"):
        return image.convert("L" if mode == "1" else "RGB"), None, is_wide
    if image.mode not in ("L", "RGB", "CMYK"):
        raise _UnreadableError(f"its pixels are of Pillow's mode {mode}, expected grey, RGB, palette or CMYK")
    return image, None, is_wide


def _merged(bands: list[PillowImage]) -> PillowImage:
    from PIL import Image

    return bands[0] if len(bands) == 1 else Image.merge("RGB", bands)


def _scaled(image: PillowImage) -> PillowImage:
    """Grey of 16 bits or floats as 8-bit grey, by the range that the file states."""
    import numpy as np
    from PIL import Image

    if "transparency" in image.info:
        raise _UnreadableError("it has 16 bits and a transparent colour")
    values = np.asarray(image)
    if image.mode == "F":
        low, high = (float(found) for found in (values.min(), values.max()))
        # False for NaN too.
        if not (low >= 0 and high <= 1):
            raise _UnreadableError(f"its floats are from {low:g} to {high:g}, expected 0 to 1")
        shares: NDArray[np.floating[Any]] = values.astype(np.float32)
    elif image.mode == "I" and image.format not in ("PPM", "PNG"):  # both of 16 bits; PNG in older releases of Pillow
        raise _UnreadableError("its values are signed or of 32 bits, and no file states their range")
    else:
        bits = _tag(image, _BITS_PER_SAMPLE, 16)
        shares = values.astype(np.float32) / ((1 << bits) - 1)
    if _tag(image, _PHOTOMETRIC, 1) == _WHITE_IS_ZERO:
        shares = 1 - shares
    return Image.fromarray(np.rint(shares * 255).clip(0, 255).astype(np.uint8))


def _keyed(image: PillowImage, data: bytes) -> tuple[PillowImage, PillowImage]:
    """Colours and alpha of a picture in which one colour is transparent (PNG's tRNS, GIF)."""
    import numpy as np
    from PIL import Image

    bits = _bits(image, data)
    if bits > 8:
        raise _UnreadableError("it has 16 bits and a transparent colour")
    colours = image.convert("L") if image.mode == "1" else image
    key = np.asarray(image.info["transparency"])
    if image.mode == "L" and bits in (2, 4):
        # Pillow scales these pixels to 0 to 255, and not the key.
        key = key * (255 // ((1 << bits) - 1))
    is_key = np.asarray(colours) == key
    if image.mode == "RGB":
        is_key = is_key.all(axis=-1)
    return colours, Image.fromarray(np.where(is_key, 0, 255).astype(np.uint8))


def _bits(image: PillowImage, data: bytes) -> int:
    """Bits of a value in the file, where Pillow may give fewer; 8 if it does not say."""
    if image.format == "PNG":
        return data[24]
    return _tag(image, _BITS_PER_SAMPLE, 8)


def _tag(image: PillowImage, number: int, default: int) -> int:
    """A TIFF tag, or the first of its values."""
    tags: Any = getattr(image, "tag_v2", {})
    found = tags.get(number, default)
    return int(found[0]) if isinstance(found, tuple) and found else int(found)
