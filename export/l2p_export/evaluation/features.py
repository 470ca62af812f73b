"""Fixed features of an image, and the Frechet distance between two sets of images on them.

The distance is computed like FID (Heusel et al., arXiv 1706.08500), but its 56 features are defined here and need no
weights. They are not Inception's: compare its values only with each other, never with a published FID.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

from l2p_runtime.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOCKS = 4
"""Rows and columns of blocks whose mean colours are features."""

DIRECTIONS = 8
"""Number of edge directions over half a turn; the first is that of upright edges."""

DIMENSIONS = 3 * BLOCKS**2 + DIRECTIONS
"""Length of a feature vector."""

WORKING_PX = 64
"""Edges are measured after downscaling by the integer factor that brings the short side nearest to this."""


def features(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Compute colour and edge features of an image of any size.

    Args:
        image: sRGB pixels [H,W,3], at least 4 px per side.

    Returns:
        `DIMENSIONS` values: the mean red, green and blue (0 to 1) of each of 4 x 4 equal blocks, row by row; then the
        length of the edges in each direction, in short sides of the image, times their contrast.

    Raises:
        UsageError: the image is not uint8 [H,W,3] with sides of 4 px or more.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or min(image.shape[:2]) < BLOCKS:
        raise UsageError(
            f"an image of {image.dtype} {list(image.shape)} has no features; wanted uint8 [H,W,3], {BLOCKS} px or more",
            hint="give sRGB pixels as `Pipeline.generate` returns them by default",
        )
    return np.concatenate([_block_means(image).ravel(), _edges(image)])


def frechet_distance(first: NDArray[np.float64], second: NDArray[np.float64]) -> float | None:
    """Compute the Frechet distance of two sets of feature vectors, each taken as normally distributed.

    Args:
        first: [N,D].
        second: [M,D].

    Returns:
        |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), which is 0 for equal means and covariances. None if a set has no
        more images than dimensions, because its covariance then depends more on the count than on the images.
    """
    if min(len(first), len(second)) <= first.shape[1]:
        return None
    offset = first.mean(axis=0) - second.mean(axis=0)
    one, two = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    # tr((C1 C2)^(1/2)) from a symmetric matrix with the same eigenvalues, so that no complex root can appear.
    root = _root(one)
    common = np.sqrt(np.clip(np.linalg.eigvalsh(root @ two @ root), 0, None)).sum()
    distance = float(offset @ offset + np.trace(one) + np.trace(two) - 2 * common)
    return max(distance, 0.0)


def _block_means(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Mean colours [4,4,3]; if a side does not divide by 4, block sizes differ by a pixel."""
    means: NDArray[np.float64] = np.empty((BLOCKS, BLOCKS, 3))
    rows, columns = ([size * i // BLOCKS for i in range(BLOCKS + 1)] for size in image.shape[:2])
    for y, (top, bottom) in enumerate(itertools.pairwise(rows)):
        for x, (left, right) in enumerate(itertools.pairwise(columns)):
            means[y, x] = image[top:bottom, left:right].mean(axis=(0, 1)) / 255
    return means


def _edges(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Length times contrast of edges [8]: gradient magnitude summed over pixels and colours, by gradient direction."""
    pixels = _shrink(image) / 255
    down, along = np.gradient(pixels, axis=(0, 1))
    amount, angle = np.hypot(down, along), np.arctan2(down, along)
    direction = np.rint(angle / np.pi * DIRECTIONS).astype(np.int64) % DIRECTIONS
    sums = np.bincount(direction.ravel(), weights=amount.ravel(), minlength=DIRECTIONS)
    lengths: NDArray[np.float64] = sums / (3 * min(pixels.shape[:2]))
    return lengths


def _shrink(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Downscale by area averaging; incomplete squares are cropped."""
    factor = max(1, round(min(image.shape[:2]) / WORKING_PX))
    height, width = image.shape[0] // factor, image.shape[1] // factor
    squares = image[: height * factor, : width * factor].reshape(height, factor, width, factor, 3)
    means: NDArray[np.float64] = squares.mean(axis=(1, 3))
    return means


def _root(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """The square root of a symmetric matrix without negative eigenvalues."""
    values, vectors = np.linalg.eigh(matrix)
    root: NDArray[np.float64] = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    return root
