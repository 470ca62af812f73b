from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import linalg

from l2p_export.evaluation.features import BLOCKS, DIMENSIONS, DIRECTIONS, features, frechet_distance
from l2p_export.world.render import render
from l2p_export.world.scenes import COLOURS, Placed, Scene, Thing
from l2p_runtime.errors import UsageError
from unit.export.world.worlds import examples

COLOUR_VALUES = DIMENSIONS - DIRECTIONS
SCENE = Scene("grey", (Placed(Thing("red", "circle"), 0.3, 0.4, 0.15), Placed(Thing("blue", "square"), 0.7, 0.5, 0.17)))


def test_a_block_is_its_mean_colour_and_nothing_elsewhere() -> None:
    image = np.zeros((64, 32, 3), np.uint8)
    image[16:32, 24:32, 1] = 255
    found = features(image)
    expected = np.zeros((BLOCKS, BLOCKS, 3))
    expected[1, 3, 1] = 1
    assert found.shape == (DIMENSIONS,) == (56,)
    np.testing.assert_array_equal(found[:COLOUR_VALUES].reshape(BLOCKS, BLOCKS, 3), expected)


@pytest.mark.parametrize(("axis", "direction"), [(1, 0), (0, DIRECTIONS // 2)])
@pytest.mark.parametrize("side_px", [64, 256, 1024])
def test_an_edge_across_the_image_has_its_length_and_its_direction(axis: int, direction: int, side_px: int) -> None:
    image = np.zeros((side_px, side_px, 3), np.uint8)
    image[(slice(None),) * axis + (slice(side_px // 2, None),)] = 255
    edges = features(image)[COLOUR_VALUES:]
    assert edges[direction] == pytest.approx(1)
    assert edges.sum() == pytest.approx(1)


def test_edges_between_colours_of_equal_brightness_count() -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, :32, 0] = 90
    image[:, 32:, 1] = 90
    assert features(image)[COLOUR_VALUES] == pytest.approx(2 / 3 * 90 / 255)


@pytest.mark.parametrize("size_px", [(128, 128), (512, 512), (1024, 1024), (130, 130)])
def test_features_hardly_depend_on_the_size(size_px: tuple[int, int]) -> None:
    small, large = features(render(SCENE, 64, 64)), features(render(SCENE, *size_px))
    np.testing.assert_allclose(large, small, atol=0.02)


@pytest.mark.parametrize(
    "image",
    [np.zeros((8, 8, 3)), np.zeros((8, 8), np.uint8), np.zeros((3, 8, 3), np.uint8), np.zeros((8, 8, 4), np.uint8)],
)
def test_what_is_no_image_has_no_features(image: NDArray[np.uint8]) -> None:
    with pytest.raises(UsageError, match="wanted uint8"):
        features(image)


def test_the_distance_is_that_of_the_published_formula() -> None:
    random = np.random.default_rng(0)
    first = random.normal(size=(40, 5)) @ random.normal(size=(5, 5))
    second = random.normal(size=(60, 5)) @ random.normal(size=(5, 5)) + random.normal(size=5)
    one, two = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    offset = first.mean(axis=0) - second.mean(axis=0)
    expected = offset @ offset + np.trace(one + two - 2 * linalg.sqrtm(one @ two).real)
    assert frechet_distance(first, second) == pytest.approx(expected)
    assert frechet_distance(second, first) == pytest.approx(expected)


def test_moved_and_spread_sets_have_the_distances_that_follow() -> None:
    values = np.random.default_rng(0).normal(size=(100, DIMENSIONS))
    centred = values - values.mean(axis=0)
    spread = np.trace(np.cov(values, rowvar=False))
    assert frechet_distance(values, values) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(values, values + 0.5) == pytest.approx(0.25 * DIMENSIONS)
    assert frechet_distance(centred, 3 * centred) == pytest.approx(4 * spread)


def test_features_that_never_change_are_no_obstacle() -> None:
    values = np.random.default_rng(0).normal(size=(100, DIMENSIONS))
    values[:, :30] = 0.25
    assert frechet_distance(values, values) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("counts", [(DIMENSIONS, 100), (100, DIMENSIONS), (1, 1)])
def test_no_more_images_than_features_give_no_number(counts: tuple[int, int]) -> None:
    first, second = (np.random.default_rng(count).normal(size=(count, DIMENSIONS)) for count in counts)
    assert frechet_distance(first, second) is None


def test_other_images_are_farther_than_more_of_the_same() -> None:
    def described(change: dict[str, str], seed: int) -> NDArray[np.float64]:
        made = []
        for index, (_, description) in enumerate(examples(120, 64, 64)):
            things = tuple(
                replace(thing, colour=change.get(thing.colour, thing.colour)) for thing in description.things
            )
            random = np.random.default_rng([seed, index])
            placed = tuple(Placed(thing, *random.uniform(0.25, 0.75, 2), 0.16) for thing in things)
            made.append(features(render(Scene(description.background or "white", placed), 64, 64)))
        return np.array(made)

    same = frechet_distance(described({}, 0), described({}, 1))
    recoloured = frechet_distance(described({}, 0), described(dict.fromkeys(COLOURS, "blue"), 1))
    assert same is not None
    assert recoloured is not None
    assert recoloured > 2 * same
