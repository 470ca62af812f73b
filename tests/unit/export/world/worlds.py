"""Images of the small world for tests: right captions, near misses, and changes that leave the content alone."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from l2p_export.world.render import render
from l2p_export.world.scenes import (
    BACKGROUNDS,
    COLOURS,
    RELATIONS,
    SHAPES,
    Description,
    Thing,
    draw_description,
    place,
)

Pixels = NDArray[np.uint8]
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


def examples(
    count: int, height_px: int, width_px: int, *, held_out: bool = False
) -> Iterator[tuple[Pixels, Description]]:
    random = np.random.default_rng([height_px, width_px, held_out])
    short_px = min(height_px, width_px)
    for _ in range(count):
        description = draw_description(random, held_out=held_out)
        scene = place(description, random, (height_px / short_px, width_px / short_px))
        yield render(scene, height_px, width_px), description


def means_the_same(first: Description, true: Description) -> bool:
    mirrored = true
    if true.relation is not None:
        mirrored = replace(true, things=true.things[::-1], relation=OPPOSITE[true.relation])
    background = first.background in {None, true.background or "white"}
    return background and (first.things, first.relation) in {(one.things, one.relation) for one in (true, mirrored)}


def near_misses(true: Description) -> Iterator[tuple[str, Description]]:
    """All descriptions that differ in one word, and those with two words of a kind swapped."""
    for index, thing in enumerate(true.things):
        others = [("colour", Thing(colour, thing.shape)) for colour in COLOURS if colour != thing.colour]
        others += [("shape", Thing(thing.colour, shape)) for shape in SHAPES if shape != thing.shape]
        for kind, other in others:
            things = (*true.things[:index], other, *true.things[index + 1 :])
            if len(set(things)) == len(things):
                yield kind, replace(true, things=things)
    for background in BACKGROUNDS:
        if background != (true.background or "white"):
            yield "background", replace(true, background=background)
    if true.relation is None:
        return
    for relation in RELATIONS:
        if relation != true.relation:
            yield "relation", replace(true, relation=relation)
    first, second = true.things
    yield "swapped things", replace(true, things=(second, first))
    if first.colour != second.colour and first.shape != second.shape:
        swapped = Thing(second.colour, first.shape), Thing(first.colour, second.shape)
        yield "swapped colours", replace(true, things=swapped)
        yield "swapped shapes", replace(true, things=swapped[::-1])


def _blurred(image: Pixels, random: np.random.Generator) -> Pixels:
    sigma_px = 0.01 * min(image.shape[:2])
    return _levels(ndimage.gaussian_filter(image.astype(np.float32), (sigma_px, sigma_px, 0)))


def _noisy(image: Pixels, random: np.random.Generator) -> Pixels:
    return _levels(image + random.normal(0, 8, image.shape))


def _jpeg(image: Pixels, random: np.random.Generator) -> Pixels:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=85)
    return np.asarray(Image.open(file))


def _tinted(image: Pixels, random: np.random.Generator) -> Pixels:
    return _levels(image + random.normal(0, 10, 3))


def _wobbly(image: Pixels, random: np.random.Generator) -> Pixels:
    """Move each pixel by a smooth field of 0.5 % of the short side, which is 3 % of a radius."""
    short_px = min(image.shape[:2])
    places = np.mgrid[: image.shape[0], : image.shape[1]].astype(np.float64)
    for axis in range(2):
        field = ndimage.gaussian_filter(random.normal(size=image.shape[:2]), 0.04 * short_px)
        places[axis] += field * (0.005 * short_px / field.std())
    moved = np.empty(image.shape, np.float32)
    for channel in range(3):
        plane = image[..., channel].astype(np.float32)
        moved[..., channel] = ndimage.map_coordinates(plane, places, order=1, mode="nearest")
    return _levels(moved)


def _levels(pixels: NDArray[np.floating]) -> Pixels:
    levels: Pixels = np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
    return levels


CHANGES: dict[str, Callable[[Pixels, np.random.Generator], Pixels]] = {
    "blurred": _blurred,
    "noisy": _noisy,
    "blurred and noisy": lambda image, random: _noisy(_blurred(image, random), random),
    "jpeg": _jpeg,
    "tinted": _tinted,
    "wobbly": _wobbly,
}
