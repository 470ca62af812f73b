from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from l2p_export.checkpoint.demo import demo_dimensions
from l2p_export.families.z_image_l2p.dimensions import published_dimensions
from l2p_export.families.z_image_l2p.specs import model_spec
from l2p_runtime.contract import RotarySpec
from l2p_runtime.errors import ArtifactError, UsageError
from l2p_runtime.policies import (
    POSITIONS,
    Frequencies,
    Policy,
    TimeDependent,
    axis_frequencies,
    linear,
    native,
    ntk,
    vision_yarn,
    yarn,
)
from l2p_runtime.positions import caption_tables, rope_tables

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


@pytest.mark.parametrize("policy", POSITIONS)
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
    for policy in (linear, ntk, yarn, vision_yarn):
        np.testing.assert_array_equal(policy(REAL.rotary, 0, 10_000)[0], native(REAL.rotary, 0, 1)[0])


def test_a_policy_of_ones_own() -> None:
    def still(rotary: object, axis: int, grid: int) -> tuple[np.ndarray, float]:
        return np.zeros(REAL.rotary.axis_channels[axis] // 2), 2.0

    cosine, sine = rope_tables(REAL, 3, 5, 32, still)
    assert (cosine == 2).all()
    assert (sine == 0).all()


def on_grid(rows: int, columns: int) -> RotarySpec:
    return replace(REAL.rotary, base_grid=(rows, columns))


def restated(spec: RotarySpec, axis: int, grid: int, policy: str) -> list[float]:
    """Frequencies of one image axis, pair by pair, from the formulas of docs/model.md."""
    channels, trained = spec.axis_channels[axis], spec.base_grid[axis - 1]
    stretch, found = max(grid / trained, 1.0), []
    for pair in range(channels // 2):
        plain = spec.theta ** (-2 * pair / channels)
        if policy == "linear":
            found.append(plain / stretch)
        elif policy == "ntk":
            found.append((spec.theta * stretch ** (channels / (channels - 2))) ** (-2 * pair / channels))
        else:
            turns = [trained / (2 * math.pi * n) for n in (32.0, 1.0)]
            low, high = (channels * math.log(turn) / (2 * math.log(spec.theta)) for turn in turns)
            low, high = (0.0, max(high, 0.0)) if policy == "vision-yarn" else (max(math.floor(low), 0), math.ceil(high))
            ramp = min(max((pair - low) / max(high - low, 0.001), 0.0), 1.0)
            found.append(plain * (1 - ramp) + plain / stretch * ramp)
    return found


@pytest.mark.parametrize("policy", ["linear", "ntk", "yarn", "vision-yarn"])
@given(base=st.tuples(st.integers(7, 64), st.integers(7, 64)), grid=st.tuples(st.integers(1, 512), st.integers(1, 512)))
def test_policies_are_those_of_the_formulas(policy: str, base: tuple[int, int], grid: tuple[int, int]) -> None:
    spec = on_grid(*base)
    for axis, (frequencies, factor) in enumerate(axis_frequencies(spec, grid, policy)[1:], start=1):
        np.testing.assert_allclose(frequencies, restated(spec, axis, grid[axis - 1], policy), rtol=1e-12)
        stretch = max(grid[axis - 1] / base[axis - 1], 1.0)
        np.testing.assert_allclose(factor, 0.1 * math.log(stretch) + 1 if policy == "yarn" else 1.0)


@pytest.mark.parametrize("policy", ["linear", "yarn"])
@pytest.mark.parametrize(("base", "grid"), [(64, 128), (64, 96), (16, 64)])
def test_policies_are_those_of_transformers(policy: str, base: int, grid: int) -> None:
    channels = REAL.rotary.axis_channels[1]
    config = PretrainedConfig()
    config.hidden_size, config.num_attention_heads, config.max_position_embeddings = channels, 1, grid
    config.rope_parameters = {
        "rope_type": policy,
        "rope_theta": 256.0,
        "factor": grid / base,
        "original_max_position_embeddings": base,
    }
    expected, factor = ROPE_INIT_FUNCTIONS[policy](config, "cpu")
    frequencies, ours = axis_frequencies(on_grid(base, base), (grid, grid), policy)[1]
    np.testing.assert_allclose(frequencies, expected.numpy(), rtol=1e-6)
    np.testing.assert_allclose(ours, factor)


def test_rows_and_columns_are_stretched_each_by_its_own_ratio() -> None:
    _, (rows, _), (columns, _) = axis_frequencies(on_grid(16, 32), (64, 32), "linear")
    trained, _ = native(REAL.rotary, 1, 1)
    np.testing.assert_array_equal(rows, trained / 4)
    np.testing.assert_array_equal(columns, trained)


@pytest.mark.parametrize(("grid", "stands_for"), [((16, 16), "native"), ((16, 17), "linear"), ((64, 8), "linear")])
def test_auto_is_native_up_to_the_trained_grid(grid: tuple[int, int], stands_for: str) -> None:
    model = replace(REAL, rotary=on_grid(16, 16))
    for table, expected in zip(
        rope_tables(model, *grid, 32, "auto"), rope_tables(model, *grid, 32, stands_for), strict=True
    ):
        np.testing.assert_array_equal(table, expected)


def test_the_temperature_scales_scores_by_the_ratio_of_logarithms() -> None:
    warm, plain = (axis_frequencies(on_grid(16, 16), (64, 64), name) for name in ("linear+temperature", "linear"))
    for (frequencies, factor), (expected, _) in zip(warm, plain, strict=True):
        np.testing.assert_array_equal(frequencies, expected)
        # Queries and keys are both multiplied: ln 4096 / ln 256 = 1.5 between them.
        np.testing.assert_allclose(factor**2, 1.5)


def test_a_policy_that_depends_on_time_is_called_once_an_axis() -> None:
    called = []

    def policy(rotary: RotarySpec, axis: int, grid: int, time: float) -> Frequencies:
        called.append((axis, grid, time))
        return native(rotary, axis, grid)[0] * (1 + time), np.full(rotary.axis_channels[axis] // 2, 2.0)

    cosine, _ = rope_tables(REAL, 3, 5, 32, TimeDependent(policy), 0.25)
    assert called == [(0, 1, 0.25), (1, 3, 0.25), (2, 5, 0.25)]
    np.testing.assert_allclose(cosine[-1, 0], 2 * math.cos(32 * 1.25), rtol=1e-6)


def returning(value: object) -> Policy:
    return lambda rotary, axis, grid: value  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("dype", "auto, native, linear, ntk, yarn"),
        (returning((np.zeros(3), 1.0)), r"frequencies \[3\]"),
        (returning((np.zeros(16), np.ones(2))), r"factors \[2\]"),
        (returning((np.full(16, np.nan), 1.0)), "NaN"),
        (returning((np.zeros(16), np.inf)), "NaN or Inf"),
        (returning(None), "NoneType"),
        (returning((np.zeros(16),)), "expected"),
        (returning((["a"] * 16, 1.0)), "no numbers"),
    ],
)
def test_wrong_policies_are_refused(policy: str | Policy, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        rope_tables(REAL, 1, 1, 32, policy)


def test_the_error_of_a_policy_comes_through() -> None:
    def policy(rotary: object, axis: int, grid: int) -> Frequencies:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        rope_tables(REAL, 1, 1, 32, policy)


@pytest.mark.parametrize("grid", [(0, 64), (64, 0), (-1, 64), (513, 64), (64, 513)])
def test_a_trained_grid_that_the_axes_do_not_hold(grid: tuple[int, int]) -> None:
    with pytest.raises(ArtifactError, match="the trained grid has"):
        on_grid(*grid)
