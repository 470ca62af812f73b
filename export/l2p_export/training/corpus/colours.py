"""Converts colours of image files to sRGB, and refuses those that 8 bits of sRGB cannot hold."""

from __future__ import annotations

import io
import struct
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
"""Colour space of an ICC profile to Pillow's mode."""

_SRGB_STEPS_MAX = 2
"""Maximum difference, in steps of 255, of what a profile of sRGB makes of a colour: profiles and tables are rounded."""

# Code points of ITU-T H.273 that are sRGB, or that viewers show as sRGB: BT.709 and unspecified.
_PRIMARIES, _TRANSFERS = (1, 2), (1, 2, 6, 13, 14, 15)
_HDR_TRANSFERS = {16: "PQ", 18: "HLG"}

_PNG_GAMMA, _GAMMA_TOLERANCE = 1 / 2.2, 0.02


def in_srgb(base: PillowImage, icc_profile: bytes | None) -> tuple[PillowImage, bool]:
    """A picture as RGB in sRGB, and whether its colours were converted.

    Args:
        base: mode L, RGB or CMYK.
        icc_profile: its profile; without one, grey and RGB are taken for sRGB, and CMYK for ideal inks.

    Raises:
        ValueError: the profile is for another kind of picture.
        ImageCms.PyCMSError: the profile is damaged.
    """
    from PIL import ImageCms

    if not icc_profile:
        return base.convert("RGB"), base.mode == "CMYK"
    profile = ImageCms.getOpenProfile(io.BytesIO(icc_profile))
    space = profile.profile.xcolor_space.strip()
    mode = _MODES.get(space)
    if base.mode == "L" and mode == "RGB":
        base = base.convert("RGB")
    if mode is None or base.mode != mode:
        raise ValueError(f"its ICC profile is for {space}, its pixels are {base.mode}")
    transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB")
    if _is_srgb(transform, mode):
        return base.convert("RGB"), False
    converted = ImageCms.applyTransform(base, transform)
    if converted is None:
        raise ValueError("its ICC profile cannot be applied")
    return converted, True


def require_standard_colours(data: bytes, image: PillowImage) -> None:
    """Refuse HDR, and colours that are stated without an ICC profile and are not sRGB.

    Raises:
        ValueError: says which.
    """
    stated = _stated_colours(data, image.format)
    if stated is not None:
        primaries, transfer = stated
        if transfer in _HDR_TRANSFERS:
            raise ValueError(f"it is HDR ({_HDR_TRANSFERS[transfer]}), expected sRGB")
        if primaries not in _PRIMARIES or transfer not in _TRANSFERS:
            raise ValueError(
                f"it states colour primaries {primaries} and transfer {transfer} (H.273), expected those of sRGB"
            )
    gamma = image.info.get("gamma")
    is_overruled = "srgb" in image.info or "icc_profile" in image.info
    if gamma is not None and not is_overruled and abs(gamma - _PNG_GAMMA) > _GAMMA_TOLERANCE:
        raise ValueError(f"it states a gamma of {gamma:g}, expected {_PNG_GAMMA:.3f}, which is sRGB's")


def _is_srgb(transform: Any, mode: str) -> bool:
    """Whether a transform to sRGB leaves colours as they are. The names of profiles do not say it reliably."""
    import numpy as np
    from PIL import Image, ImageCms

    if mode == "CMYK":
        return False
    ramp = np.linspace(0, 255, 18).astype(np.uint8)
    grid = np.stack(np.meshgrid(ramp, ramp, ramp), axis=-1).reshape(18, -1, 3) if mode == "RGB" else ramp[None]
    probe = Image.fromarray(grid)
    made, wanted = (
        np.asarray(found, np.int16) for found in (ImageCms.applyTransform(probe, transform), probe.convert("RGB"))
    )
    return bool(np.abs(made - wanted).max() <= _SRGB_STEPS_MAX)


def _stated_colours(data: bytes, form: str | None) -> tuple[int, int] | None:
    """Primaries and transfer (ITU-T H.273) that a file states in PNG's cICP or AVIF's `nclx`; None if it does not."""
    if form == "PNG":
        return _png_colours(data)
    at = data.find(b"colrnclx") if form == "AVIF" else -1
    if at < 0 or len(data) < at + 12:
        return None
    primaries, transfer = struct.unpack_from(">HH", data, at + 8)
    return primaries, transfer


def _png_colours(data: bytes) -> tuple[int, int] | None:
    at = 8
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"IDAT":
            return None
        if kind == b"cICP" and length == 4:
            return data[at + 8], data[at + 9]
        at += 12 + length
    return None
