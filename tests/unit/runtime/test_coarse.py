from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from l2p_runtime.backends.host import HostDevice
from l2p_runtime.coarse import Coarse, check_coarse, cubic_taps, mix_enlarged
from l2p_runtime.errors import UsageError


@given(
    size=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    enlarged=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    sigma=st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
def test_enlarging_is_torchs_bicubic(size: tuple[int, int], enlarged: tuple[int, int], sigma: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    coarse, noise = (rng.standard_normal((1, 3, *shape), np.float32) for shape in (size, enlarged))
    wide = torch.nn.functional.interpolate(torch.from_numpy(coarse).double(), enlarged, mode="bicubic").numpy()
    expected = sigma * noise + (1 - sigma) * wide
    mix_enlarged(HostDevice(), noise, coarse, sigma)
    np.testing.assert_allclose(noise, expected, atol=2e-6)


def test_the_same_size_is_the_image_itself() -> None:
    taps, weights = cubic_taps(5, 5)
    np.testing.assert_array_equal(weights, np.tile(np.float32([0, 1, 0, 0]), (5, 1)))
    np.testing.assert_array_equal(taps[:, 1], np.arange(5))


def test_sigmas_fall_in_equal_parts_from_where_noise_was_mixed_in() -> None:
    assert Coarse(64, 64, renoise=0.9, steps=4).sigmas == pytest.approx((0.9, 0.675, 0.45, 0.225, 0.0))


@pytest.mark.parametrize(
    "values",
    [{"renoise": 0.0}, {"renoise": 1.0}, {"renoise": float("nan")}, {"steps": 0}, {"guidance": -1.0}],
)
def test_values_out_of_range(values: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Coarse(64, 64, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize(("height", "width"), [(128, 64), (128, 128), (256, 256), (64, 128), (32, 64)])
def test_a_coarse_image_that_is_no_smaller_one_of_the_same_shape(height: int, width: int) -> None:
    with pytest.raises(UsageError, match="coarse image"):
        check_coarse(Coarse(height, width), 128, 128)


def test_a_shape_that_patches_round_is_taken() -> None:
    check_coarse(Coarse(1024, 1792), 4096, 7296)
