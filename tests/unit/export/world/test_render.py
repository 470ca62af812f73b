"""Scenes that are rendered many at once, and what lies where in them, cell by cell."""

from __future__ import annotations

import numpy as np
import pytest

from l2p_export.training.corpus.rendered import world_scenes
from l2p_export.training.loop.loop import CPU
from l2p_export.world.batched import render_batch, what_lies_where
from l2p_export.world.render import LABELS, UNIT_AREA, render
from l2p_export.world.scenes import BACKGROUNDS, COLOURS, SHAPES, Placed, Scene, Thing


@pytest.mark.parametrize("shape", SHAPES)
def test_a_thing_covers_its_area(shape: str) -> None:
    thing = Thing("blue", shape)
    (shares,) = what_lies_where([Scene("grey", (Placed(thing, 0.6, 0.4, 0.2),))], 8, 8, CPU).numpy()
    assert shares.shape == (8, 8, len(LABELS))
    np.testing.assert_allclose(shares.sum(-1), 1, atol=1e-6)
    assert shares[..., LABELS.index(thing)].mean() == pytest.approx(UNIT_AREA[shape] * 0.2**2, rel=0.05)
    named = {LABELS.index(thing), LABELS.index("grey")}
    assert not shares[..., [index for index in range(len(LABELS)) if index not in named]].any()


def test_places_are_in_short_sides() -> None:
    red, green = Thing("red", "circle"), Thing("green", "square")
    scene = Scene("black", (Placed(red, 0.5, 0.5, 0.3), Placed(green, 1.5, 0.5, 0.3)))
    other = Scene("white", (Placed(green, 0.5, 0.5, 0.3),))
    _, shares = what_lies_where([other, scene], 4, 8, CPU).numpy()
    assert shares[1, 1].argmax() == LABELS.index(red)
    assert shares[2, 6].argmax() == LABELS.index(green)
    assert shares[0, 3, LABELS.index("black")] == 1


@pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 160), (128, 72)])
def test_many_at_once_are_what_each_is_alone(height: int, width: int) -> None:
    scenes = world_scenes(24, 3).scenes
    assert {len(scene.placed) for scene in scenes} == {1, 2}
    images = render_batch(scenes, height, width, CPU).permute(0, 2, 3, 1).numpy()
    for image, scene in zip(images, scenes, strict=True):
        difference = np.abs(image.astype(int) - render(scene, height, width))
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.001


def test_everything_has_a_label_of_its_own() -> None:
    assert len(set(LABELS)) == len(LABELS) == len(BACKGROUNDS) + len(COLOURS) * len(SHAPES)
