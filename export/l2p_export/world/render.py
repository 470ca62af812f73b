"""Renders scenes of the small world at any size, with soft edges one pixel wide."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from l2p_export.world.scenes import BACKGROUNDS, COLOURS, REACH, SHAPES, Placed, Scene, Thing

if TYPE_CHECKING:
    from numpy.typing import NDArray

SQUARE_HALF_SIDE = 0.84
"""Half the side of a square, in radii: its corner lies at 1.19 radii."""

UNIT_AREA: Mapping[str, float] = {
    "circle": math.pi,
    "square": (2 * SQUARE_HALF_SIDE) ** 2,
    "triangle": 3 * math.sqrt(3) / 4 * REACH**2,
}
"""Shape to its area, in radii squared."""

LABELS: tuple[str | Thing, ...] = (*BACKGROUNDS, *(Thing(colour, shape) for colour in COLOURS for shape in SHAPES))
"""Everything that a pixel of a scene may show."""


def render(scene: Scene, height_px: int, width_px: int) -> NDArray[np.uint8]:
    """Draw a scene.

    Args:
        scene: centres and radii in short sides of the image.
        height_px: H.
        width_px: W.

    Returns:
        sRGB uint8 pixels [H,W,3]. An edge pixel is blended by the share of it that the object covers.
    """
    short_px = min(height_px, width_px)
    image = np.empty((height_px, width_px, 3), np.float32)
    image[...] = BACKGROUNDS[scene.background]
    for placed in scene.placed:
        _draw(image, placed, short_px)
    return np.rint(image).astype(np.uint8)


def _draw(image: NDArray[np.float32], placed: Placed, short_px: int) -> None:
    """Blend one object into its bounding box of the image."""
    centre_x, centre_y, radius = placed.x * short_px, placed.y * short_px, placed.radius * short_px
    reach = REACH * radius + 1
    rows = slice(max(0, math.floor(centre_y - reach)), min(image.shape[0], math.ceil(centre_y + reach)))
    columns = slice(max(0, math.floor(centre_x - reach)), min(image.shape[1], math.ceil(centre_x + reach)))
    y = (np.arange(rows.start, rows.stop, dtype=np.float32) + 0.5 - centre_y)[:, None]
    x = (np.arange(columns.start, columns.stop, dtype=np.float32) + 0.5 - centre_x)[None, :]
    covered = np.clip(0.5 + inside_px(placed.thing.shape, x, y, radius), 0, 1)[..., None]
    box = image[rows, columns]
    box += covered * (np.asarray(COLOURS[placed.thing.colour], np.float32) - box)


def inside_px(shape: str, x: NDArray[np.floating], y: NDArray[np.floating], radius: float) -> NDArray[np.floating]:
    """Depth of points inside a shape around the origin.

    Args:
        shape: one of `SHAPES`.
        x: places to the right of the origin, in pixels.
        y: places below the origin, in pixels; broadcast with `x`.
        radius: size of the shape, in pixels.

    Returns:
        Distance from the nearest side, in pixels; negative outside.
    """
    depth: NDArray[np.floating]
    if shape == "circle":
        depth = np.float32(radius) - np.hypot(x, y)
    elif shape == "square":
        depth = np.float32(SQUARE_HALF_SIDE * radius) - np.maximum(np.abs(x), np.abs(y))
    else:
        # An upright triangle of equal sides: three half planes, each half the circumradius from the centre.
        side = np.float32(math.sqrt(3) / 2) * np.abs(x) - y / np.float32(2)
        depth = np.float32(REACH * radius / 2) - np.maximum(side, y)
    return depth
