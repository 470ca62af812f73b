from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from l2p_export.checkpoint.demo import demo_dimensions
from l2p_export.families.z_image_l2p.dimensions import published_dimensions
from l2p_export.families.z_image_l2p.specs import model_spec
from l2p_runtime.errors import UsageError
from l2p_runtime.positions import caption_tables, native, ntk, rope_tables, yarn

REAL = model_spec(published_dimensions("4k"))
DEMO = model_spec(demo_dimensions(64))


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 4))
def test_tokens_stand_where_the_published_model_puts_them(rows: int, columns: int, blocks: int) -> None:
    caption = 32 * blocks
    cosine, sine = rope_tables(DEMO, rows, columns, caption)
    padded = -(-rows * columns // 32) * 32
    assert cosine.shape == sine.shape == (padded + caption, 16)
    frequencies = [256.0 ** (-2 * i / channels) for channels in (8, 12, 12) for i in range(channels // 2)]
    row, column = rows - 1, columns - 1
    last = [(caption + 1, row, column)[axis] for axis, n in enumerate((4, 6, 6)) for _ in range(n)]
    expected = [math.cos(p * f) for p, f in zip(last, frequencies, strict=True)]
    np.testing.assert_allclose(cosine[row * columns + column], expected, atol=1e-7)
    # Pads stand at the origin: nothing turns.
    assert (cosine[rows * columns : padded] == 1).all()
    assert (sine[rows * columns : padded] == 0).all()
    np.testing.assert_allclose(sine[-1, 0], math.sin(caption), atol=1e-7)
    assert caption_tables((cosine, sine), caption)[0].shape == (caption, 16)


def test_tables_follow_the_padded_caption() -> None:
    short, long = (rope_tables(DEMO, 2, 2, caption)[1][0, 0] for caption in (32, 64))
    assert short == np.float32(math.sin(33))
    assert long == np.float32(math.sin(65))


@pytest.mark.parametrize("policy", ["ntk", "yarn"])
def test_up_to_the_trained_grid_every_policy_is_native(policy: str) -> None:
    for table, expected in zip(rope_tables(REAL, 64, 64, 32, policy), rope_tables(REAL, 64, 64, 32), strict=True):
        np.testing.assert_array_equal(table, expected)


def test_ntk_keeps_the_fastest_and_stretches_the_slowest() -> None:
    frequencies, factor = ntk(REAL.rotary, 1, 128)
    trained, _ = native(REAL.rotary, 1, 128)
    assert factor == 1.0
    assert frequencies[0] == trained[0] == 1.0
    # The exponent d/(d-2) makes the slowest pair turn exactly half as fast at twice the grid.
    assert frequencies[-1] == pytest.approx(trained[-1] / 2, rel=1e-12)


def test_yarn_interpolates_slow_pairs_and_keeps_fast_ones() -> None:
    frequencies, factor = yarn(REAL.rotary, 2, 128)
    trained, _ = native(REAL.rotary, 2, 128)
    assert factor == pytest.approx(1 + 0.1 * math.log(2))
    # Pair 11 is the first that turns less than once over 64 tokens: 48 ln(64 / 2 pi) / (2 ln 256) = 10.04.
    np.testing.assert_allclose(frequencies[11:], trained[11:] / 2)
    assert frequencies[0] == trained[0]
    assert (np.diff(frequencies / trained) <= 1e-12).all()


def test_the_time_axis_is_never_stretched() -> None:
    for policy in (ntk, yarn):
        np.testing.assert_array_equal(policy(REAL.rotary, 0, 10_000)[0], native(REAL.rotary, 0, 1)[0])


def test_a_policy_of_ones_own() -> None:
    def still(rotary: object, axis: int, grid: int) -> tuple[np.ndarray, float]:
        return np.zeros(REAL.rotary.axis_channels[axis] // 2), 2.0

    cosine, sine = rope_tables(REAL, 3, 5, 32, still)
    assert (cosine == 2).all()
    assert (sine == 0).all()


def test_wrong_policies_are_refused() -> None:
    with pytest.raises(UsageError, match="native, ntk, yarn"):
        rope_tables(REAL, 1, 1, 32, "dype")
    with pytest.raises(UsageError, match=r"frequencies \[3\]"):
        rope_tables(REAL, 1, 1, 32, lambda rotary, axis, grid: (np.zeros(3), 1.0))
