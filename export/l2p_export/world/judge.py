"""Judges whether an image shows what a caption of the small world says, only by segmentation and geometry.

The background is the colour of the border. Objects are the regions that differ from it. A colour is the median of an
object's interior, a shape is the renderer's shape with the highest overlap, and a relation compares centres. Nothing
here is learned. The judge may select a corpus (`train corpus --judged`), but gives no gradient.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from l2p_export.world.captions import PHRASES, caption
from l2p_export.world.render import UNIT_AREA, inside_px
from l2p_export.world.scenes import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, Description, Thing
from l2p_runtime.errors import HostError, UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

WORKING_PX = 256
"""Larger images are first downscaled by the integer factor that brings their short side nearest to this."""

NAMED_DISTANCE = 60.0
"""Maximum distance of a colour from the named one, in sRGB levels (0 to 255, Euclidean). Every even mix of two colours,
or of a colour and a background, is farther from both."""

FOREGROUND_DISTANCE = 40.0
"""Pixels that differ more from the background than this, in sRGB levels, belong to an object."""

UNIFORM_SHARE = 0.95
"""Minimum share of the border that is background, and of an object's interior that has the object's colour."""

BORDER = 0.01
"""Width of the border that the background colour is taken from, in short sides."""

EDGE = 0.02
"""Pixels nearer to an object's outline than this, in short sides, are not used for its colour."""

SPECK = 0.001
"""Minimum area of an object, in short sides squared; smaller regions are ignored. A scene's smallest has 0.031."""

LEAST_FIT = 0.85
"""Minimum intersection over union (IoU) with the shape of equal area and centre. A square has 0.83 with a circle."""

LEAST_LEAD = 0.03
"""Minimum lead in IoU of the best shape over the next: half one shape and half another is neither."""

LEAST_SOLIDITY = 0.9
"""Minimum share of its convex hull that an object fills: less is a bite, a hole or a ragged outline."""

MOST_OBJECTS = 8
"""Maximum number of objects, the largest first; no caption names as many."""

_SHARPENING = 2.0
"""Factor that steepens outlines before they are compared: it undoes blur, and drops shading and noise."""


@dataclass(frozen=True, slots=True)
class Seen:
    """An object found in an image.

    Attributes:
        colour: one of `COLOURS`, or None for another colour or a mixture.
        shape: one of `SHAPES`, or None where none fits.
        x: centre from the left, in short sides of the image.
        y: centre from the top, in short sides.
        area: in short sides squared.
    """

    colour: str | None
    shape: str | None
    x: float
    y: float
    area: float


@dataclass(frozen=True, slots=True)
class Found:
    """Background and objects of an image.

    Attributes:
        background: one of `BACKGROUNDS`, or None if the border has another colour or several.
        objects: the largest first, at most `MOST_OBJECTS`; empty if the border has several colours.
    """

    background: str | None
    objects: tuple[Seen, ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Agreement of an image with a description.

    Attributes:
        background: the background is the named one, or any of `BACKGROUNDS` if the caption names none.
        colours: each thing has its own object, of its colour.
        shapes: each thing has its own object, of its shape.
        relation: the first is where the caption says, farther along the axis than across; None without a relation.
        count: there are as many objects as things.
        passed: all of these.
        found: background and objects of the image.
        text: the verdict in one line.
    """

    background: bool
    colours: bool
    shapes: bool
    relation: bool | None
    count: bool
    passed: bool
    found: Found
    text: str


def judge(image: NDArray[np.uint8], description: Description) -> Verdict:
    """Judge whether an image shows what a description says.

    Args:
        image: sRGB uint8 pixels [H,W,3]. Designed for 64 to 4096 px; smaller images get a verdict too.
        description: what it should show.

    Raises:
        UsageError: the image is not uint8 [H,W,3] or has no pixel.
    """
    return compare(look(image), description)


def require_judge() -> None:
    """Check that images can be judged on this machine.

    Raises:
        HostError: scikit-image is not installed.
    """
    try:
        import skimage  # noqa: F401
    except ImportError as error:
        raise HostError(
            f"judging needs scikit-image, which cannot be imported: {error}", hint="pip install 'l2p-export[train]'"
        ) from error


def look(image: NDArray[np.uint8]) -> Found:
    """Find the background and the objects of an image.

    Args:
        image: sRGB pixels [H,W,3].

    Raises:
        UsageError: the image is not uint8 [H,W,3] or has no pixel.
    """
    from skimage import measure

    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise UsageError(
            f"an image of {image.dtype} {list(image.shape)} cannot be judged; wanted uint8 [H,W,3]",
            hint="give sRGB pixels as `Pipeline.generate` returns them by default",
        )
    border = _border(image)
    ground = np.median(border, axis=0)
    if np.mean(_distance(border, ground) <= FOREGROUND_DISTANCE) < UNIFORM_SHARE:
        return Found(None, ())
    pixels = _shrink(image)
    short_px = min(pixels.shape[:2])
    labels = measure.label(_distance(pixels, ground) > FOREGROUND_DISTANCE)
    regions = [region for region in measure.regionprops(labels) if region.area >= SPECK * short_px**2]
    regions.sort(key=lambda region: -region.area)
    objects = tuple(_see(pixels, labels, region, ground) for region in regions[:MOST_OBJECTS])
    return Found(_nearest(ground, BACKGROUNDS), objects)


def compare(found: Found, description: Description) -> Verdict:
    """Compare the objects of an image with a description. Each thing is matched with the object that fits it best."""
    things = description.things
    candidates = (*found.objects, *[None] * len(things))
    given = max(itertools.permutations(candidates, len(things)), key=lambda given: _likeness(given, description))
    background = found.background is not None and description.background in {None, found.background}
    colours = all(seen is not None and seen.colour == thing.colour for seen, thing in zip(given, things, strict=True))
    shapes = all(seen is not None and seen.shape == thing.shape for seen, thing in zip(given, things, strict=True))
    relation = None if description.relation is None else _relation(given) == description.relation
    count = len(found.objects) == len(things)
    passed = background and colours and shapes and count and relation is not False
    text = f"right: {caption(description)}" if passed else f"wrong: {'; '.join(_faults(found, given, description))}"
    return Verdict(background, colours, shapes, relation, count, passed, found, text)


def _border(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The outermost pixels [N,3], as they are: shrinking would make a plain background of noise."""
    width = max(1, round(BORDER * min(image.shape[:2])))
    sides = image[:width], image[-width:], image[width:-width, :width], image[width:-width, -width:]
    return np.concatenate([side.reshape(-1, 3) for side in sides]).astype(np.float32)


def _shrink(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Downscale by area averaging until the short side is near `WORKING_PX`; incomplete squares are cropped."""
    factor = max(1, round(min(image.shape[:2]) / WORKING_PX))
    height, width = image.shape[0] // factor, image.shape[1] // factor
    rows = image[: height * factor].reshape(height, factor, -1).sum(axis=1, dtype=np.uint32)
    squares = rows[:, : width * factor * 3].reshape(height, width, factor, 3).sum(axis=2)
    averages: NDArray[np.float32] = (squares / factor**2).astype(np.float32)
    return averages


def _see(pixels: NDArray[np.float32], labels: NDArray[Any], region: Any, ground: NDArray[np.float32]) -> Seen:
    """Measure colour, shape, centre and area of one connected region."""
    from skimage import morphology

    short_px = min(labels.shape)
    top, left, bottom, right = region.bbox
    # The padding holds the soft edge, which lies partly outside the region.
    top, left = max(0, top - 3), max(0, left - 3)
    box = slice(top, bottom + 3), slice(left, right + 3)
    own, others = labels[box] == region.label, (labels[box] != region.label) & (labels[box] != 0)
    colour, covered = None, own.astype(np.float32)
    interior = morphology.isotropic_erosion(own, max(1, EDGE * short_px))
    if interior.any():
        contrast = np.median(pixels[box][interior], axis=0) - ground
        inside = (pixels[box] - ground) @ contrast / max(float(contrast @ contrast), FOREGROUND_DISTANCE**2)
        # A mix with the background is a soft edge or a shade; anything else is a second colour.
        blend = ground + np.clip(inside, 0, 1)[..., None] * contrast
        same = _distance(pixels[box], blend) <= NAMED_DISTANCE
        if same[interior].mean() >= UNIFORM_SHARE and np.median(inside[interior]) > 0.5:
            colour = _nearest(ground + contrast, COLOURS)
            covered = np.where(others, 0, _sharpen(inside - 0.5))
    area = covered.sum(dtype=np.float64)
    rows, columns = (np.arange(size, dtype=np.float32) + 0.5 for size in covered.shape)
    centre_y, centre_x = float(covered.sum(axis=1) @ rows / area), float(covered.sum(axis=0) @ columns / area)
    shape = None
    if interior.any():
        shape = _shape(covered, columns[None, :] - np.float32(centre_x), rows[:, None] - np.float32(centre_y))
    return Seen(colour, shape, (left + centre_x) / short_px, (top + centre_y) / short_px, float(area) / short_px**2)


def _shape(covered: NDArray[np.float32], x: NDArray[np.floating], y: NDArray[np.floating]) -> str | None:
    """The shape whose coverage fits an object's best; x and y are relative to the object's centre."""
    from skimage import morphology

    area = float(covered.sum())
    fits = {}
    for shape in SHAPES:
        ideal = _sharpen(inside_px(shape, x, y, (area / UNIT_AREA[shape]) ** 0.5))
        common = float(np.minimum(covered, ideal).sum())
        fits[shape] = common / (2 * area - common)
    best, second = sorted(fits, key=lambda shape: -fits[shape])[:2]
    if fits[best] < LEAST_FIT or fits[best] - fits[second] < LEAST_LEAD:
        return None
    mask = covered >= 0.5
    hull = morphology.convex_hull_image(mask, offset_coordinates=False)
    return best if mask.sum() >= LEAST_SOLIDITY * hull.sum() else None


def _sharpen(inside: NDArray[Any]) -> NDArray[np.float32]:
    """Coverage of a pixel, 0 to 1, from its signed distance to the middle of a soft edge."""
    return np.clip(0.5 + _SHARPENING * inside, 0, 1).astype(np.float32)


def _distance(pixels: NDArray[np.float32], colour: NDArray[np.float32]) -> NDArray[np.float32]:
    difference = pixels - colour
    squares: NDArray[np.float32] = np.einsum("...c,...c->...", difference, difference)
    return np.sqrt(squares)


def _nearest(colour: NDArray[np.float32], names: Mapping[str, tuple[int, int, int]]) -> str | None:
    distances = {name: float(np.linalg.norm(colour - np.asarray(value))) for name, value in names.items()}
    best = min(distances, key=lambda name: distances[name])
    return best if distances[best] <= NAMED_DISTANCE else None


def _likeness(given: tuple[Seen | None, ...], description: Description) -> tuple[int, int, bool]:
    """Sort key of a match: number of things with colour and shape, then of colours and shapes, then the relation."""
    pairs = [(seen, thing) for seen, thing in zip(given, description.things, strict=True) if seen is not None]
    same = [(seen.colour == thing.colour) + (seen.shape == thing.shape) for seen, thing in pairs]
    return same.count(2), sum(same), _relation(given) == description.relation


def _relation(given: tuple[Seen | None, ...]) -> str | None:
    """Relation of the first of two objects to the second; None if it lies as far across as along."""
    if len(given) != 2 or given[0] is None or given[1] is None:
        return None
    x, y = given[0].x - given[1].x, given[0].y - given[1].y
    for relation, (along_x, along_y) in RELATIONS.items():
        if x * along_x + y * along_y > abs(x * along_y) + abs(y * along_x):
            return relation
    return None


def _faults(found: Found, given: tuple[Seen | None, ...], description: Description) -> list[str]:
    """All reasons why an image fails."""
    faults = []
    if found.background is None or description.background not in {None, found.background}:
        wanted = f" where {description.background} was wanted" if description.background else ""
        faults.append(f"{f'a {found.background}' if found.background else 'no plain'} background{wanted}")
    for seen, thing in zip(given, description.things, strict=True):
        if seen is None:
            faults.append(f"no {thing.colour} {thing.shape}")
        elif (seen.colour, seen.shape) != (thing.colour, thing.shape):
            faults.append(f"{_name(seen)} where {_name(thing)} was wanted")
    faults += [f"{_name(seen)} too many" for seen in found.objects if not any(seen is one for one in given)]
    if description.relation is not None and None not in given and _relation(given) != description.relation:
        first, second = (f"the {thing.colour} {thing.shape}" for thing in description.things)
        where, wanted = (
            PHRASES[name][0] if name else "diagonal to" for name in (_relation(given), description.relation)
        )
        faults.append(f"{first} is {where} {second} where {wanted} was wanted")
    return faults


def _name(thing: Thing | Seen) -> str:
    colour = f"a {thing.colour}" if thing.colour is not None else "an oddly coloured"
    return f"{colour} {thing.shape or 'object of unknown shape'}"
