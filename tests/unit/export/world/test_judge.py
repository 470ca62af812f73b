from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
from numpy.typing import NDArray

from l2p_export.world.captions import describe
from l2p_export.world.judge import (
    LEAST_FIT,
    NAMED_DISTANCE,
    SPECK,
    Found,
    Seen,
    Verdict,
    compare,
    judge,
    look,
    require_judge,
)
from l2p_export.world.render import inside_px, render
from l2p_export.world.scenes import (
    BACKGROUNDS,
    COLOURS,
    RELATIONS,
    SHAPES,
    Description,
    Placed,
    Scene,
    Thing,
    draw_description,
)
from l2p_runtime.errors import HostError, UsageError
from unit.export.world.worlds import CHANGES, Pixels, examples, means_the_same, near_misses

# One object in the middle of a white image of 128 px: x and y in short sides from its centre.
Y, X = (np.mgrid[:128, :128] + 0.5) / 128 - 0.5

PART = {"colour": "colours", "shape": "shapes", "relation": "relation", "background": "background"}


# What is right passes.


@pytest.mark.parametrize(
    ("height_px", "width_px", "count"),
    [
        (64, 64, 60),
        (128, 128, 60),
        (96, 192, 30),
        (256, 256, 15),
        (512, 512, 5),
        pytest.param(64, 64, 2000, marks=pytest.mark.slow),
        pytest.param(128, 128, 2000, marks=pytest.mark.slow),
        pytest.param(256, 256, 1000, marks=pytest.mark.slow),
        pytest.param(512, 512, 400, marks=pytest.mark.slow),
        pytest.param(1024, 576, 200, marks=pytest.mark.slow),
        pytest.param(576, 1024, 200, marks=pytest.mark.slow),
        pytest.param(4096, 4096, 5, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("held_out", [False, True])
def test_renders_pass(height_px: int, width_px: int, count: int, held_out: bool) -> None:
    drawn = examples(count, height_px, width_px, held_out=held_out)
    assert_share([judge(image, description) for image, description in drawn], at_least=0.99)


@pytest.mark.parametrize(
    ("size_px", "count"),
    [
        (64, 50),
        (128, 30),
        (256, 10),
        pytest.param(64, 1000, marks=pytest.mark.slow),
        pytest.param(128, 1000, marks=pytest.mark.slow),
        pytest.param(256, 500, marks=pytest.mark.slow),
        pytest.param(512, 200, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("change", ["blurred", "noisy", "blurred and noisy", "jpeg", "tinted", "wobbly"])
def test_small_changes_pass(change: str, size_px: int, count: int) -> None:
    random = np.random.default_rng(11)
    drawn = examples(count, size_px, size_px)
    verdicts = [judge(CHANGES[change](image, random), description) for image, description in drawn]
    assert_share(verdicts, at_least=0.98)


def test_a_caption_without_a_background_takes_any_plain_one() -> None:
    placed = (Placed(Thing("red", "circle"), 0.4, 0.5, 0.2),)
    description = Description((Thing("red", "circle"),))
    assert all(judge(render(Scene(background, placed), 64, 64), description).passed for background in BACKGROUNDS)
    beige = render(Scene("white", placed), 64, 64)
    beige[(beige == 245).all(axis=-1)] = (205, 190, 150)
    verdict = judge(beige, description)
    assert (verdict.background, verdict.found.background, verdict.passed) == (False, None, False)


# What is wrong fails.


@pytest.mark.parametrize(("size_px", "count"), [(64, 60), (128, 60), pytest.param(128, 2000, marks=pytest.mark.slow)])
def test_wrong_captions_fail(size_px: int, count: int) -> None:
    random = np.random.default_rng(12)
    drawn = [(look(image), true) for image, true in examples(count, size_px, size_px)]
    others = [(found, true, draw_description(random)) for found, true in drawn for _ in range(4)]
    verdicts = [compare(found, other) for found, true, other in others if not means_the_same(other, true)]
    assert len(verdicts) > 3 * count
    assert_share(verdicts, at_most=0.01)


@pytest.mark.parametrize(("size_px", "count"), [(64, 40), (128, 40), pytest.param(128, 1000, marks=pytest.mark.slow)])
def test_near_misses_fail(size_px: int, count: int) -> None:
    verdicts: dict[str, list[Verdict]] = {}
    for image, description in examples(count, size_px, size_px):
        found = look(image)
        for kind, other in near_misses(description):
            verdicts.setdefault(kind, []).append(compare(found, other))
    assert set(verdicts) == {
        "colour",
        "shape",
        "relation",
        "background",
        "swapped things",
        "swapped colours",
        "swapped shapes",
    }
    for kind, judged in verdicts.items():
        assert_share(judged, at_most=0.01)
        if kind in PART:
            assert all(wrong_parts(verdict) == [PART[kind]] for verdict in judged)


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_half_a_shape_fails(shape: str, background: str) -> None:
    for half in (X < 0, X > 0, Y < 0, (X < 0) & (Y > 0)):
        assert sole(cut(shape, half, background)).shape is None
    # What lies below the centre of a triangle may go: what stays is a triangle.
    assert shape == "triangle" or sole(cut(shape, Y > 0, background)).shape is None


@pytest.mark.parametrize("shape", SHAPES)
def test_a_bite_fails(shape: str) -> None:
    for angle in np.linspace(0, 2 * np.pi, 12, endpoint=False):
        ray = np.linspace(0, 0.3, 1000)
        inside = inside_px(shape, ray * np.cos(angle), ray * np.sin(angle), 0.2) >= 0
        edge = ray[inside].max()
        bite = np.hypot(X - edge * np.cos(angle), Y - edge * np.sin(angle)) < 0.6 * 0.2
        assert sole(cut(shape, bite, "white")).shape is None
        speck = np.hypot(X - edge * np.cos(angle), Y - edge * np.sin(angle)) < 0.15 * 0.2
        assert sole(cut(shape, speck, "white")).shape == shape


@pytest.mark.parametrize("shape", SHAPES)
def test_a_hole_or_a_patch_of_another_colour_fails(shape: str) -> None:
    patch = np.hypot(X, Y) < 0.4 * 0.2
    assert sole(cut(shape, patch, "white")).shape is None
    for colour, background in itertools.product(["green", "blue", "yellow"], BACKGROUNDS):
        for where in (patch, X < 0, Y > 0.02):
            image = cut(shape, np.zeros_like(patch), background)
            image[where & (inside_px(shape, X, Y, 0.2) > 0)] = COLOURS[colour]
            seen = look(image).objects
            assert len(seen) == 1
            assert seen[0].colour is None


@pytest.mark.parametrize(
    "mask",
    [
        np.abs(X) + np.abs(Y) < 0.25,
        (X / 1.4) ** 2 + Y**2 < 0.2**2,
        (np.abs(X) < 0.15) & (np.abs(Y) < 0.2),
        np.flipud(inside_px("triangle", X, Y, 0.2) > 0),
        (np.abs(np.hypot(X, Y) - 0.16) < 0.04),
        (np.minimum(np.abs(X), np.abs(Y)) < 0.06) & (np.maximum(np.abs(X), np.abs(Y)) < 0.2),
        np.minimum(np.hypot(X - 0.12, Y), np.hypot(X + 0.12, Y)) < 0.14,
        np.hypot(X, Y) < 0.15 + 0.06 * np.sin(3 * np.arctan2(Y, X)),
        np.abs(X) ** 3.3 + np.abs(Y) ** 3.3 < 0.2**3.3,
        np.abs(Y) < 0.01,
    ],
    ids=["diamond", "ellipse", "oblong", "inverted", "ring", "cross", "peanut", "clover", "between", "line"],
)
def test_other_shapes_are_none(mask: NDArray[np.bool_]) -> None:
    image = np.full((128, 128, 3), BACKGROUNDS["white"], np.uint8)
    image[mask & (np.abs(X) < 0.4)] = COLOURS["red"]
    assert sole(image).shape is None


def test_mixed_colours_are_none() -> None:
    named = {**COLOURS, **BACKGROUNDS}
    for first, second in itertools.combinations(named.values(), 2):
        even = (np.asarray(first, float) + second) / 2
        assert min(np.linalg.norm(even - value) for value in (first, second)) > NAMED_DISTANCE
    for share, colour in ((0.0, "green"), (0.15, "green"), (0.4, None), (0.5, None), (0.6, None), (0.85, "yellow")):
        mixed = (1 - share) * np.asarray(COLOURS["green"]) + share * np.asarray(COLOURS["yellow"])
        image = np.full((128, 128, 3), BACKGROUNDS["white"], np.uint8)
        image[np.hypot(X, Y) < 0.2] = np.rint(mixed)
        assert sole(image).colour == colour


@pytest.mark.parametrize("size_px", [64, 128, 256])
def test_a_further_blob_fails_and_a_speck_does_not(size_px: int) -> None:
    thing = Thing("red", "circle")
    description = Description((thing,))
    image = render(Scene("white", (Placed(thing, 0.3, 0.3, 0.16),)), size_px, size_px)
    assert judge(image, description).passed
    side_px = round((3 * SPECK) ** 0.5 * size_px)
    for colour in (*COLOURS.values(), (90, 90, 90)):
        blob = image.copy()
        blob[-2 * side_px : -side_px, -2 * side_px : -side_px] = colour
        verdict = judge(blob, description)
        assert (verdict.passed, verdict.count, verdict.colours, verdict.shapes) == (False, False, True, True)
    side_px = int((0.9 * SPECK) ** 0.5 * size_px)
    image[-5 * side_px : -4 * side_px, -5 * side_px : -4 * side_px] = COLOURS["blue"]
    assert judge(image, description).passed


def test_two_of_one_colour_where_one_was_wanted_fail() -> None:
    thing = Thing("green", "square")
    twice = (Placed(thing, 0.25, 0.5, 0.15), Placed(thing, 0.75, 0.5, 0.15))
    verdict = judge(render(Scene("grey", twice), 128, 128), Description((thing,)))
    assert (verdict.colours, verdict.shapes, verdict.count, verdict.passed) == (True, True, False, False)
    assert verdict.text == "wrong: a green square too many"


def test_an_uneven_background_fails() -> None:
    thing = Thing("red", "circle")
    image = render(Scene("white", (Placed(thing, 0.5, 0.5, 0.2),)), 128, 128)
    white = (image == 245).all(axis=-1)
    for shade in (
        np.linspace(16, 245, 128)[None, :],
        np.where(X < 0, 128, 245),
        np.where(np.hypot(X, Y) < 0.4, 128, 245),
    ):
        uneven = np.where(white[..., None], np.broadcast_to(shade, white.shape)[..., None], image).astype(np.uint8)
        assert not judge(uneven, Description((thing,))).passed


@pytest.mark.parametrize("size_px", [64, 256, 1024])
def test_noise_fails(size_px: int) -> None:
    random = np.random.default_rng(13)
    description = describe("a red circle")
    noise = random.integers(0, 256, (size_px, size_px, 3), dtype=np.uint8)
    assert judge(noise, description).found == Found(None, ())
    around = render(Scene("grey", (Placed(description.things[0], 0.5, 0.5, 0.2),)), size_px, size_px)
    around = np.where((around == 128).all(axis=-1, keepdims=True), noise, around)
    assert not judge(around, description).passed


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (9, 2), (3, 64), (2000, 1)])
@pytest.mark.parametrize("level", [0, 128, 245, 255])
def test_tiny_and_empty_images_get_a_verdict(size: tuple[int, int], level: int) -> None:
    verdict = judge(
        np.full((*size, 3), level, np.uint8), describe("a red circle left of a blue square on a white background")
    )
    assert (verdict.passed, verdict.colours, verdict.shapes, verdict.relation, verdict.count) == (False,) * 5
    assert verdict.background == (level > 200)
    assert verdict.found.objects == ()


def test_no_image_breaks_the_judge() -> None:
    random = np.random.default_rng(14)
    for _ in range(200):
        height, width = random.integers(1, 70, 2)
        grain = int(random.integers(1, 12))
        palette = random.integers(0, 256, (random.integers(1, 4), 3), dtype=np.uint8)
        image = palette[random.integers(0, len(palette), (height // grain + 1, width // grain + 1))]
        image = image.repeat(grain, 0).repeat(grain, 1)[:height, :width]
        if random.random() < 0.7:
            image[:2] = image[-2:] = image[:, :2] = image[:, -2:] = 245
        verdict = judge(image, draw_description(random))
        assert verdict.text.startswith("right" if verdict.passed else "wrong")
        assert all(np.isfinite([seen.x, seen.y, seen.area]).all() for seen in verdict.found.objects)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((8, 8), np.uint8),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((8, 8, 3), np.float32),
        np.zeros((1, 8, 8, 3), np.uint8),
        np.zeros((0, 8, 3), np.uint8),
    ],
)
def test_what_is_no_image_is_refused(image: Pixels) -> None:
    with pytest.raises(UsageError, match="wanted uint8"):
        judge(image, describe("a red circle"))


# What was found is told.


@pytest.mark.parametrize(("height_px", "width_px"), [(64, 64), (128, 224), (700, 500)])
def test_objects_are_found_where_they_are(height_px: int, width_px: int) -> None:
    placed = (Placed(Thing("blue", "triangle"), 0.3, 0.62, 0.19), Placed(Thing("yellow", "circle"), 0.74, 0.3, 0.14))
    found = look(render(Scene("black", placed), height_px, width_px))
    assert found.background == "black"
    assert [(seen.colour, seen.shape) for seen in found.objects] == [("blue", "triangle"), ("yellow", "circle")]
    for seen, true, area in zip(found.objects, placed, (0.0675, 0.0616), strict=True):
        assert (seen.x, seen.y) == pytest.approx((true.x, true.y), abs=0.005)
        assert seen.area == pytest.approx(area, rel=0.03)


@pytest.mark.parametrize(
    ("caption", "text"),
    [
        ("a blue circle left of a red square on a grey background", None),
        ("a red square right of a blue circle", None),
        ("a blue square left of a red square", "a blue circle where a blue square was wanted"),
        ("a blue circle left of a green square", "a red square where a green square was wanted"),
        ("a blue circle above a red square", "the blue circle is to the left of the red square where above was wanted"),
        ("a blue circle left of a red square on a black background", "a grey background where black was wanted"),
        ("a blue circle on a white background", "a grey background where white was wanted; a red square too many"),
        (
            "a red circle left of a blue square",
            ("a blue circle where a red circle was wanted; a red square where a blue square was wanted"),
        ),
    ],
)
def test_the_text_says_what_is_wrong(caption: str, text: str | None) -> None:
    placed = (Placed(Thing("blue", "circle"), 0.25, 0.5, 0.16), Placed(Thing("red", "square"), 0.75, 0.55, 0.16))
    verdict = judge(render(Scene("grey", placed), 128, 128), describe(caption))
    assert verdict.passed == (text is None)
    assert verdict.text.removeprefix("wrong: ") == text or (text is None and verdict.text.startswith("right: "))


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("degrees", [0, 40, -40, 50, 90, 180])
def test_a_relation_holds_farther_along_than_across(relation: str, degrees: int) -> None:
    along_x, along_y = RELATIONS[relation]
    sine, cosine = np.sin(np.radians(degrees)), np.cos(np.radians(degrees))
    x, y = 0.25 * (along_x * cosine - along_y * sine), 0.25 * (along_x * sine + along_y * cosine)
    things = Thing("red", "circle"), Thing("blue", "circle")
    placed = Placed(things[0], 0.5 + x, 0.5 + y, 0.13), Placed(things[1], 0.5 - x, 0.5 - y, 0.13)
    verdict = judge(render(Scene("white", placed), 128, 128), Description(things, relation))
    assert verdict.relation == verdict.passed == (abs(degrees) < 45)


def test_a_square_is_too_far_from_a_circle() -> None:
    half = np.sqrt(np.pi) / 2
    line = np.linspace(-1.2, 1.2, 2000)
    x, y = line[None, :], line[:, None]
    square, circle = (np.abs(x) < half) & (np.abs(y) < half), np.hypot(x, y) < 1
    assert 0.8 < (square & circle).sum() / (square | circle).sum() < LEAST_FIT


# Helpers.


def assert_share(verdicts: list[Verdict], *, at_least: float = 0.0, at_most: float = 1.0) -> None:
    share = sum(verdict.passed for verdict in verdicts) / len(verdicts)
    surprising = [verdict.text for verdict in verdicts if verdict.passed != (at_least > 0)]
    assert at_least <= share <= at_most, surprising[:10]


def wrong_parts(verdict: Verdict) -> list[str]:
    return [
        part for part in ("background", "colours", "shapes", "relation", "count") if getattr(verdict, part) is False
    ]


def cut(shape: str, away: NDArray[np.bool_], background: str) -> Pixels:
    """A red shape of radius 0.2 in the middle of 128 px, with a part painted over."""
    image = render(Scene(background, (Placed(Thing("red", shape), 0.5, 0.5, 0.2),)), 128, 128)
    image[away] = BACKGROUNDS[background]
    return image


def sole(image: Pixels) -> Seen:
    (seen,) = look(image).objects
    return seen


def test_a_missing_judge_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    require_judge()
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(HostError, match="scikit-image") as caught:
        require_judge()
    assert "l2p-export[train]" in caught.value.hint
