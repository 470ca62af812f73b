"""Image files: PNG, TIFF and OpenEXR, chosen by suffix; each appears complete or not at all."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from l2p_runtime.errors import HostError, UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

Kind = Literal["png", "tiff", "exr"]
Bits = Literal["8", "16", "half", "float"]
Color = Literal["sRGB", "linear"]

SUFFIXES: dict[str, Kind] = {".png": "png", ".tif": "tiff", ".tiff": "tiff", ".exr": "exr"}
BITS: dict[Kind, tuple[Bits, ...]] = {"png": ("8", "16"), "tiff": ("8", "16"), "exr": ("half", "float")}
"""Kind to the bits per channel that it takes; the first is the default."""
COMPRESSIONS: dict[Kind, tuple[str, ...]] = {
    "png": ("zip",),
    "tiff": ("zip", "none"),
    "exr": ("zip", "zips", "piz", "rle", "pxr24", "b44", "b44a", "dwaa", "dwab", "none"),
}
"""Kind to its compressions; the first is the default. Lossy: pxr24 with float, b44, b44a, dwaa and dwab."""
_LIBRARIES: dict[Kind, str] = {"tiff": "tifffile", "exr": "OpenEXR"}
_INSTALL = "pip install 'l2p-export[images]'"


@dataclass(frozen=True, slots=True)
class ImageFormat:
    """How an image is stored.

    Attributes:
        kind: of file.
        bits: per channel; `half` and `float` are floating point of 16 and 32 bits.
        compression: one of `COMPRESSIONS` of the kind.
        color: `sRGB`: encoded as IEC 61966-2-1 says; `linear`: scene-linear with Rec. 709 primaries and white D65.
        tiled: in tiles of 64 x 64 instead of scanlines; only EXR.
    """

    kind: Kind
    bits: Bits
    compression: str
    color: Color
    tiled: bool = False

    def __post_init__(self) -> None:
        name = self.kind.upper()
        for what, value, known in (
            ("bits", self.bits, BITS[self.kind]),
            ("compression", self.compression, COMPRESSIONS[self.kind]),
            ("color", self.color, ("sRGB", "linear")),
        ):
            if value not in known:
                raise UsageError(f"{what} is {str(value)[:40]!r}, {name} files have {', '.join(known)}")
        if self.kind == "exr" and self.color == "sRGB":
            raise UsageError("color is sRGB, EXR files are scene-linear", hint="write PNG or TIFF, or color linear")
        if self.color == "linear" and (self.kind, self.bits) not in (("png", "16"), ("exr", self.bits)):
            why = "8 bits are too few for linear light" if self.kind == "png" else "TIFF files cannot say so"
            raise UsageError(f"color is linear, and {why}", hint="write EXR, or PNG with 16 bits")
        if self.tiled and self.kind != "exr":
            raise UsageError(f"tiled is set, {name} files have no tiles here", hint="write EXR")

    @property
    def dtype(self) -> Literal["uint8", "uint16"]:
        """What to draw with `Pipeline.generate`.

        Also for EXR: from 0.5 to 1, uint16 is 32 times finer than float16, whose step there is 2^-11.
        """
        return "uint8" if self.bits == "8" else "uint16"


def image_format(
    path: str | Path,
    *,
    bits: str | int | None = None,
    compression: str | None = None,
    color: str | None = None,
    tiled: bool = False,
) -> ImageFormat:
    """The format of a file, by its suffix.

    Args:
        path: the file; .png, .tif, .tiff or .exr, in any case.
        bits: per channel, `8`, `16`, `half` or `float`; by default 8, in EXR half.
        compression: one of `COMPRESSIONS`; by default zip, which every reader knows.
        color: `sRGB` or `linear`; by default linear in EXR, else sRGB.
        tiled: see `ImageFormat`.

    Raises:
        UsageError: another suffix, or what the format does not have.
        HostError: the library that writes it is not installed.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        known = ", ".join(SUFFIXES)
        raise UsageError(f"`{path}` is no name of an image that can be written, expected one ending in {known}")
    kind = SUFFIXES[suffix]
    found = ImageFormat(
        kind,
        BITS[kind][0] if bits is None else str(bits),  # type: ignore[arg-type] # checked there
        COMPRESSIONS[kind][0] if compression is None else compression.lower(),
        ("linear" if kind == "exr" else "sRGB") if color is None else color,  # type: ignore[arg-type]
        tiled,
    )
    if (library := _LIBRARIES.get(kind)) is not None:
        try:
            importlib.import_module(library)
        except ImportError as error:
            raise HostError(
                f"{suffix} files need `{library}`, which cannot be imported: {error}", hint=_INSTALL
            ) from error
    return found


def write_image(path: str | Path, pixels: NDArray[Any], metadata: Mapping[str, str], form: ImageFormat) -> None:
    """Write an image. The file appears complete, or not at all.

    Args:
        path: the file; an existing one is replaced.
        pixels: [H,W,3] of `form.dtype`, sRGB-encoded, as `Pipeline.generate` returns them; of any layout in memory.
        metadata: keyword to text, kept in the file: PNG chunks, JSON in TIFF's description, EXR attributes.
        form: how it is stored.

    Raises:
        UsageError: pixels of another shape or dtype, or text that the file cannot hold.
        HostError: the file cannot be written.
    """
    file_path = Path(path)
    if form.kind == "png":
        from l2p_runtime.images.png import write_png

        write_png(file_path, pixels, metadata, linear=form.color == "linear")
    elif form.kind == "tiff":
        from l2p_runtime.images.tiff import write_tiff

        write_tiff(file_path, pixels, metadata, form.compression)
    else:
        from l2p_runtime.images.exr import write_exr

        write_exr(file_path, pixels, metadata, form)


def reads(path: str | Path, form: ImageFormat, size_px: tuple[int, int]) -> bool:
    """Whether a file is a complete image of a format and of (height, width); decodes all of it.

    A file that is absent, cut, changed or foreign is none; nothing is raised.
    """
    file_path = Path(path)
    # Unlike `is_file`, it takes a name that is too long for one of no file.
    if not os.path.isfile(file_path):  # noqa: PTH113
        return False
    if form.kind == "png":
        from l2p_runtime.images.png import png_reads

        return png_reads(file_path, int(form.bits), size_px)
    if form.kind == "tiff":
        from l2p_runtime.images.tiff import tiff_reads

        return tiff_reads(file_path, int(form.bits), size_px)
    from l2p_runtime.images.exr import exr_reads

    return exr_reads(file_path, form, size_px)
