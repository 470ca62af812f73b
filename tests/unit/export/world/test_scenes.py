from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from l2p_export.world.captions import PHRASES, caption, describe
from l2p_export.world.render import UNIT_AREA, inside_px, render
from l2p_export.world.scenes import (
    BACKGROUNDS,
    COLOURS,
    DEFAULT_BACKGROUND,
    GAP,
    REACH,
    RELATIONS,
    SHAPES,
    Description,
    Placed,
    Scene,
    Thing,
    draw_description,
    place,
)
from l2p_runtime.errors import UsageError

THINGS = tuple(Thing(colour, shape) for colour in COLOURS for shape in SHAPES)
HELD_OUT = {
    "a red square to the left of a green triangle",
    "a red square to the left of a yellow circle",
    "a red triangle to the left of a green circle",
    "a red triangle to the left of a green triangle",
    "a green circle to the left of a green triangle",
    "a green circle to the left of a yellow circle",
    "a green square to the left of a yellow triangle",
    "a green circle on a white background",
    "a blue circle on a black background",
    "a blue square on a black background",
    "a blue triangle on a black background",
    "a yellow triangle on a white background",
}
ASPECTS = [(1.0, 1.0), (1024 / 576, 1.0), (1.0, 2.0)]


def test_the_split_never_moves() -> None:
    pairs = [Description(pair, "left") for pair in itertools.combinations(THINGS, 2)]
    single = [Description((thing,), None, background) for thing in THINGS for background in BACKGROUNDS]
    assert {caption(description) for description in pairs + single if description.held_out} == HELD_OUT


def test_the_split_is_by_what_is_drawn() -> None:
    for first, second in itertools.permutations(THINGS, 2):
        held_out = Description((first, second), "left").held_out
        assert Description((second, first), "below", "black").held_out == held_out
    for thing in THINGS:
        assert Description((thing,)).held_out == Description((thing,), None, DEFAULT_BACKGROUND).held_out


@pytest.mark.parametrize("held_out", [False, True])
def test_descriptions_come_from_one_side_of_the_split(held_out: bool) -> None:
    random = np.random.default_rng(0)
    drawn = [draw_description(random, held_out=held_out) for _ in range(600)]
    assert all(description.held_out == held_out for description in drawn)
    assert all(len(set(description.things)) == len(description.things) for description in drawn)
    assert all((description.relation is None) == (len(description.things) == 1) for description in drawn)


def test_training_meets_every_word() -> None:
    random = np.random.default_rng(0)
    drawn = [draw_description(random) for _ in range(600)]
    assert {thing for description in drawn for thing in description.things} == set(THINGS)
    assert {description.relation for description in drawn} == {None, *RELATIONS}
    assert {description.background for description in drawn} == {None, *BACKGROUNDS}


@pytest.mark.parametrize("aspect", ASPECTS)
def test_things_lie_inside_apart_and_along_the_axis(aspect: tuple[float, float]) -> None:
    random = np.random.default_rng(1)
    for _ in range(100):
        description = draw_description(random)
        scene = place(description, random, aspect)
        assert tuple(placed.thing for placed in scene.placed) == description.things
        assert scene.background == (description.background or DEFAULT_BACKGROUND)
        for placed in scene.placed:
            reach = REACH * placed.radius + 0.02 - 1e-9
            assert reach <= placed.x <= aspect[1] - reach
            assert reach <= placed.y <= aspect[0] - reach
        if description.relation is not None:
            first, second = scene.placed
            x, y = first.x - second.x, first.y - second.y
            along_x, along_y = RELATIONS[description.relation]
            along, across = x * along_x + y * along_y, abs(x * along_y) + abs(y * along_x)
            assert along >= 2 * across
            assert math.hypot(x, y) >= REACH * (first.radius + second.radius) + GAP - 1e-9


def test_two_things_without_a_relation_have_no_places() -> None:
    with pytest.raises(UsageError, match="relation"):
        place(Description(THINGS[:2]), np.random.default_rng(0))


def test_places_follow_the_seed() -> None:
    description = Description(THINGS[:2], "above")
    assert place(description, np.random.default_rng(5)) == place(description, np.random.default_rng(5))
    assert place(description, np.random.default_rng(5)) != place(description, np.random.default_rng(6))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_has_its_area_and_reach(shape: str) -> None:
    line = np.linspace(-1.5, 1.5, 1501)
    inside = inside_px(shape, line[None, :], line[:, None], 1.0) >= 0
    assert inside.sum() * 0.002**2 == pytest.approx(UNIT_AREA[shape], rel=0.005)
    assert np.hypot(line[None, :], line[:, None])[inside].max() <= REACH + 1e-9
    rows, columns = np.nonzero(inside)
    assert (line[columns].mean(), line[rows].mean()) == pytest.approx((0, 0), abs=0.002)


def test_some_shape_uses_the_whole_reach() -> None:
    assert inside_px("triangle", np.zeros(1), np.full(1, -REACH), 1.0)[0] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("size", [(64, 64), (128, 224), (301, 200)])
@pytest.mark.parametrize("background", BACKGROUNDS)
def test_a_render_has_the_scene_s_colours_and_area(size: tuple[int, int], background: str) -> None:
    short_px = min(size)
    for thing in THINGS:
        image = render(Scene(background, (Placed(thing, 0.52, 0.49, 0.2),)), *size)
        assert image.shape == (*size, 3)
        assert tuple(image[0, 0]) == BACKGROUNDS[background]
        assert tuple(image[round(0.49 * short_px), round(0.52 * short_px)]) == COLOURS[thing.colour]
        ground, colour = np.asarray(BACKGROUNDS[background], float), np.asarray(COLOURS[thing.colour], float)
        covered = (image - ground) @ (colour - ground) / np.dot(colour - ground, colour - ground)
        assert covered.sum() / short_px**2 == pytest.approx(UNIT_AREA[thing.shape] * 0.2**2, rel=0.02)


def test_a_scene_is_the_same_at_every_size() -> None:
    random = np.random.default_rng(2)
    for _ in range(20):
        scene = place(draw_description(random), random)
        small, large = render(scene, 64, 64), render(scene, 512, 512)
        averaged = large.reshape(64, 8, 64, 8, 3).mean(axis=(1, 3))
        # A soft edge is the distance to the outline, an average the true cover: they part where outlines turn.
        assert np.abs(averaged - small).mean() < 1
        assert np.abs(averaged - small).max() < 64


def test_what_lies_outside_is_not_drawn() -> None:
    image = render(Scene("grey", (Placed(THINGS[0], 3.0, -2.0, 0.2),)), 64, 64)
    assert np.unique(image).tolist() == [128]


@pytest.mark.parametrize("relation", [None, *RELATIONS])
@pytest.mark.parametrize("background", [None, *BACKGROUNDS])
def test_a_caption_is_read_back(relation: str | None, background: str | None) -> None:
    random = np.random.default_rng(3)
    for things in itertools.permutations(THINGS, 2) if relation else zip(THINGS, strict=True):
        description = Description(things, relation, background)
        assert describe(caption(description)) == description
        assert describe(caption(description, random)) == description


def test_captions_vary_and_mostly_are_plain() -> None:
    random = np.random.default_rng(4)
    description = Description((Thing("red", "circle"), Thing("blue", "square")), "left", "grey")
    said = [caption(description, random) for _ in range(600)]
    assert len(set(said)) == 2 * len(PHRASES["left"])
    assert 0.7 < said.count(caption(description)) / len(said) < 0.85


@pytest.mark.parametrize(
    ("text", "things", "relation", "background"),
    [
        ("Red Circle", ["red circle"], None, None),
        (" the  red circle\nis over one blue square. ", ["red circle", "blue square"], "above", None),
        ("a yellow triangle against a gray background", ["yellow triangle"], None, "grey"),
        (
            "a green square under the green circle, on black background",
            ["green square", "green circle"],
            "below",
            "black",
        ),
    ],
)
def test_other_ways_to_say_it(text: str, things: list[str], relation: str | None, background: str | None) -> None:
    assert describe(text) == Description(tuple(Thing(*thing.split()) for thing in things), relation, background)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a cat",
        "a purple circle",
        "a red circle and a blue square",
        "a red circle left of",
        "a red circle left of a blue square left of a green square",
        "a red circle on a red background",
        "two red circles",
        "a red circle left of a red circle",
    ],
)
def test_what_the_small_world_lacks_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        describe(text)
