"""The sampler's arithmetic: sigmas, the guided Euler step, and pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from l2p_runtime.backends.host_kernels import euler, pixels
from l2p_runtime.schedule import model_time, sigmas

if TYPE_CHECKING:
    from numpy.typing import NDArray

# The table of docs/model.md, "Schedule and sampler", has five decimals: half of the last one is what it can tell.
PUBLISHED_DIGITS = 5.1e-6


@pytest.mark.parametrize(
    ("steps", "first", "last"),
    [
        (30, (1.0, 0.98864, 0.97674), (0.25, 0.17647, 0.09375, 0.0)),
        (8, (1.0, 0.95455, 0.9, 0.83333, 0.75, 0.64286, 0.5, 0.3, 0.0), ()),
        (4, (1.0, 0.9, 0.75, 0.5, 0.0), ()),
    ],
)
def test_sigmas_equal_the_published_tables(steps: int, first: tuple[float, ...], last: tuple[float, ...]) -> None:
    found = sigmas(steps, 3.0)
    assert len(found) == steps + 1
    assert found[: len(first)] == pytest.approx(first, abs=PUBLISHED_DIGITS)
    assert found[len(found) - len(last) :] == pytest.approx(last, abs=PUBLISHED_DIGITS)
    assert found[0] == 1.0
    assert found[-1] == 0.0


# diffusers shifts in float32, which spaces numbers below 1 by 6e-8; measured 1.1e-7 over these steps and shifts.
FLOAT32_SIGMA = 3.3e-7


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 30, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_sigmas_equal_diffusers_given_the_same_linear_levels(steps: int, shift: float) -> None:
    """Only with levels handed in: by itself diffusers shifts the ends of its range twice and stops at 1/1000."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, steps + 1)[:-1].tolist())
    found = np.asarray(sigmas(steps, shift))
    assert np.abs(found - scheduler.sigmas.double().numpy()).max() <= FLOAT32_SIGMA
    # Measured 1.2e-4 of 1000.
    times = [1000.0 * (1.0 - model_time(sigma)) for sigma in found[:-1]]
    assert times == pytest.approx(scheduler.timesteps.tolist(), abs=3.6e-4)


def test_a_whole_run_equals_diffusers() -> None:
    """Eight Euler steps over predictions that depend on the image; ours negates the prediction to a velocity."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    levels = sigmas(8, 3.0)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, 9)[:-1].tolist())
    random = np.random.default_rng(1)
    ours = random.standard_normal((2, 3, 16, 48), np.float32)
    theirs = torch.from_numpy(ours.copy())
    for sigma, following, timestep in zip(levels, levels[1:], scheduler.timesteps, strict=False):
        prediction = np.tanh(ours) - np.float32(0.5)
        their_velocity = -(torch.tanh(theirs) - 0.5)
        euler(ours, prediction, None, 1.0, following - sigma)
        theirs = scheduler.step(their_velocity, timestep, theirs).prev_sample
    # Measured 9.5e-7 on values up to 5.2.
    assert np.abs(ours - theirs.numpy()).max() <= 3e-6


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    height=st.sampled_from([1, 63, 64, 65, 130]),
    guidance=st.floats(0.0, 9.0),
    step=st.floats(-1.0, 0.0),
    seed=st.integers(0, 2**32 - 1),
)
def test_guided_step_equals_the_formula(batch: int, height: int, guidance: float, step: float, seed: int) -> None:
    """x + v (sigma_next - sigma) with v = v_neg + s (v_pos - v_neg), and v is minus what the network says."""
    random = np.random.default_rng(seed)
    image, positive, negative = (random.standard_normal((batch, 3, height, 20), np.float32) for _ in range(3))
    v_pos, v_neg = -positive.astype(np.float64), -negative.astype(np.float64)
    expected = image + (v_neg + guidance * (v_pos - v_neg)) * step
    untouched = positive.copy(), negative.copy()
    euler(image, positive, negative, guidance, step)
    # Float32 products of up to 9 times 8: measured 8.4e-6 at worst over 3000 draws.
    assert np.abs(image - expected).max() <= 2.5e-5
    assert np.array_equal(positive, untouched[0])
    assert np.array_equal(negative, untouched[1])


def test_guidance_of_one_is_the_positive_prediction_alone() -> None:
    random = np.random.default_rng(3)
    image, positive, negative = (random.standard_normal((1, 3, 32, 32), np.float32) for _ in range(3))
    guided, plain = image.copy(), image.copy()
    euler(guided, positive, negative, 1.0, -0.3)
    euler(plain, positive, None, 1.0, -0.3)
    # Measured 2.4e-7: the guided form rounds twice more.
    assert np.abs(guided - plain).max() <= 7.2e-7


@pytest.mark.parametrize(("dtype", "top"), [("uint8", 255), ("uint16", 65535)])
def test_every_code_comes_back_from_its_own_value(dtype: str, top: int) -> None:
    codes = np.arange(top + 1).reshape(-1, 1 if top == 255 else 256)
    image = np.repeat((codes / top * 2.0 - 1.0).astype(np.float32)[np.newaxis], 3, axis=0)
    assert np.array_equal(_pixels(image, dtype), np.repeat(codes[:, :, np.newaxis], 3, axis=2))


@pytest.mark.parametrize(("dtype", "top"), [("uint8", 255), ("uint16", 65535)])
def test_codes_are_the_nearest(dtype: str, top: int) -> None:
    """Clamp to [-1, 1], map to 0..top, round: in float64, and at most one code off where it is a tie within float32."""
    image = np.random.default_rng(4).standard_normal((3, 130, 70), np.float32)
    exact = (np.clip(image.astype(np.float64), -1.0, 1.0) + 1.0) * (top / 2.0)
    found = _pixels(image, dtype).astype(np.float64).transpose(2, 0, 1)
    # x + 1 below 2 is off by at most 6e-8 in float32, the product as much again: 0.0079, and 0.0038 measured.
    assert np.abs(found - exact).max() <= 0.5 + top * 1.2e-7
    assert found.min() == 0
    assert found.max() == top


def test_float16_pixels_are_in_zero_to_one() -> None:
    image = np.random.default_rng(5).standard_normal((3, 65, 33), np.float32)
    exact = (np.clip(image.astype(np.float64), -1.0, 1.0) + 1.0) / 2.0
    found = _pixels(image, "float16")
    assert found.dtype == np.float16
    assert np.array_equal(found, exact.astype(np.float32).transpose(1, 2, 0).astype(np.float16))


def test_outside_values_and_rounding_of_ties() -> None:
    image = np.array([-7.0, -1.0, 0.0, 1.0, 7.0, np.inf, -np.inf], np.float32).reshape(1, 1, -1).repeat(3, axis=0)
    # The middle is 127.5, which rounds to the even code.
    assert _pixels(image, "uint8")[0, :, 1].tolist() == [0, 0, 128, 255, 255, 255, 0]


def _pixels(image: NDArray[np.float32], dtype: str) -> NDArray[np.generic]:
    out = np.empty((*image.shape[1:], 3), dtype)
    pixels(out, image)
    return out
