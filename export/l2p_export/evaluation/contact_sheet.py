"""The contact sheet of an evaluation: its first images in green and red frames."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

SHEET_IMAGES, SHEET_COLUMNS, SHEET_PX, FRAME_PX = 64, 8, 128, 4
"""Number of images, columns, side of the square that each fits into, and width of its frame."""

RIGHT, WRONG = (44, 160, 44), (214, 39, 40)
"""Frame colours of an image that passed, and of one that failed."""


def framed_tile(image: NDArray[np.uint8], *, passed: bool) -> NDArray[np.uint8]:
    """An image in its frame, downscaled by an integer factor if it is large."""
    factor = math.ceil(max(image.shape[:2]) / SHEET_PX)
    height, width = max(1, image.shape[0] // factor), max(1, image.shape[1] // factor)
    # A side shorter than the factor is averaged to one pixel.
    down, across = (min(factor, size) for size in image.shape[:2])
    squares = image[: height * down, : width * across].reshape(height, down, width, across, 3)
    tile = np.empty((height + 2 * FRAME_PX, width + 2 * FRAME_PX, 3), np.uint8)
    tile[:] = RIGHT if passed else WRONG
    tile[FRAME_PX:-FRAME_PX, FRAME_PX:-FRAME_PX] = np.rint(squares.mean(axis=(1, 3)))
    return tile


def contact_sheet(tiles: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Tiles of one size in rows of `SHEET_COLUMNS`; the rest of the last row is white."""
    height, width = tiles[0].shape[:2]
    columns = min(SHEET_COLUMNS, len(tiles))
    sheet = np.full((math.ceil(len(tiles) / columns) * height, columns * width, 3), 255, np.uint8)
    for index, tile in enumerate(tiles):
        top, left = index // columns * height, index % columns * width
        sheet[top : top + height, left : left + width] = tile
    return sheet
