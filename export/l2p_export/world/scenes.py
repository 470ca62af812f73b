"""Scenes of the small world: one or two plain shapes on a plain background, their descriptions and their positions.

A `Description` is what a caption says; a `Scene` is one way to draw it. A digest of a combination's names decides
whether it is held out, so that no training run on any machine sees a held-out combination.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from l2p_runtime.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 88, 200),
    "yellow": (240, 205, 30),
}
"""Colour of an object to its sRGB value."""

BACKGROUNDS: Mapping[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "grey": (128, 128, 128),
    "black": (16, 16, 16),
}
"""Background to its sRGB value; the first is meant where a caption names none."""

DEFAULT_BACKGROUND = next(iter(BACKGROUNDS))
SHAPES = ("circle", "square", "triangle")
RELATIONS: Mapping[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}
"""Relation of the first object to the second: direction along x and y, y downwards."""

HELD_OUT_IN = 6
"""One of this many combinations is held out."""

REACH = 1.2
"""Maximum distance of a shape's points from its centre, in radii: a triangle's corner."""

GAP = 0.06
"""Minimum distance between the outlines of two objects, in short sides."""

HALF_APART = 0.25
"""Distance of each of two objects from the middle of the image, in short sides."""

STRAY = 0.03
"""Maximum random offset of a centre along each axis, in short sides: 4 px of 128."""


@dataclass(frozen=True, slots=True)
class Thing:
    """A shape of a colour."""

    colour: str
    shape: str


@dataclass(frozen=True, slots=True)
class Description:
    """Content of a caption.

    Attributes:
        things: one or two different things.
        relation: of the first thing to the second; None for one thing.
        background: None if the caption names none.
    """

    things: tuple[Thing, ...]
    relation: str | None = None
    background: str | None = None

    @property
    def held_out(self) -> bool:
        """True if its combination is excluded from training: two things, or one thing and its background."""
        names = sorted(f"{thing.colour} {thing.shape}" for thing in self.things)
        if len(names) == 1:
            names.append(self.background or DEFAULT_BACKGROUND)
        digest = hashlib.sha256("+".join(names).encode()).digest()
        return int.from_bytes(digest[:4], "big") % HELD_OUT_IN == 0


@dataclass(frozen=True, slots=True)
class Placed:
    """One drawn thing: centre from the left and the top, and radius, all in short sides of the image."""

    thing: Thing
    x: float
    y: float
    radius: float


@dataclass(frozen=True, slots=True)
class Scene:
    """A description with positions; `background` is drawn even if the caption names none."""

    background: str
    placed: tuple[Placed, ...]


def draw_description(random: np.random.Generator, *, held_out: bool = False) -> Description:
    """Draw a random description from the training combinations, or from the held-out ones.

    Two objects are twice as likely as one. A background is named with probability 1/2.
    """
    while True:
        count = 1 if random.random() < 1 / 3 else 2
        things = tuple(
            Thing(tuple(COLOURS)[random.integers(len(COLOURS))], SHAPES[random.integers(len(SHAPES))])
            for _ in range(count)
        )
        relation = tuple(RELATIONS)[random.integers(len(RELATIONS))] if count == 2 else None
        background = tuple(BACKGROUNDS)[random.integers(len(BACKGROUNDS))] if random.random() < 1 / 2 else None
        description = Description(things, relation, background)
        if len(set(things)) == count and description.held_out == held_out:
            return description


def place(description: Description, random: np.random.Generator, aspect: tuple[float, float] = (1.0, 1.0)) -> Scene:
    """Draw positions for the things of a description.

    Args:
        description: what to draw.
        random: source of the positions.
        aspect: height and width of the image in short sides.

    Returns:
        A scene whose objects lie inside the image with a margin, apart from each other, and farther along the
        relation's axis than across it.

    Raises:
        UsageError: two things and no relation.
    """
    background = description.background or DEFAULT_BACKGROUND
    if len(description.things) == 1:
        (placed,) = (_near(thing, (0.0, 0.0), (0.20, 0.24), random, aspect) for thing in description.things)
        return Scene(background, (placed,))
    if description.relation is None:
        raise UsageError("two things without a relation cannot be placed", hint=f"name one of {', '.join(RELATIONS)}")
    along_x, along_y = RELATIONS[description.relation]
    while True:
        first, second = (
            _near(thing, (side * along_x, side * along_y), (0.14, 0.17), random, aspect)
            for thing, side in zip(description.things, (HALF_APART, -HALF_APART), strict=True)
        )
        along = (first.x - second.x) * along_x + (first.y - second.y) * along_y
        if along >= REACH * (first.radius + second.radius) + GAP:
            return Scene(background, (first, second))


def scenes_digest(captioned: Iterable[tuple[str, Scene]]) -> str:
    """Hex SHA-256 of captions with their scenes, in order."""
    rows = [[text, asdict(scene)] for text, scene in captioned]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _near(
    thing: Thing,
    offset: tuple[float, float],
    radii: tuple[float, float],
    random: np.random.Generator,
    aspect: tuple[float, float],
) -> Placed:
    """A thing near `offset` from the middle of the image, along x and y."""
    height, width = aspect
    x, y = (
        float(size / 2 + part + random.uniform(-STRAY, STRAY))
        for size, part in zip((width, height), offset, strict=True)
    )
    return Placed(thing, x, y, float(random.uniform(*radii)))
