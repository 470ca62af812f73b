from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from l2p_runtime.backends.host_kernels import euler
from l2p_runtime.errors import UsageError
from l2p_runtime.guidance import own_guidance


@given(guidance=st.floats(0, 99))
def test_the_sampler_follows_the_formula_of_diffusers(guidance: float) -> None:
    """v_pos + g (v_pos - v_neg), the velocity being minus a prediction."""
    random = np.random.default_rng(3)
    image, positive, negative = random.standard_normal((3, 1, 3, 4, 5))
    expected = image - 0.25 * (positive + guidance * (positive - negative))
    found = image.astype(np.float32)
    scale = own_guidance(guidance, "diffusers")
    euler(found, positive.astype(np.float32), negative.astype(np.float32), scale, 0.25)  # type: ignore[arg-type]
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * (1 + guidance))


def test_no_guidance_is_none_in_either_convention() -> None:
    assert own_guidance(0, "diffusers") == own_guidance(1.0, "l2p") == 1.0
    assert own_guidance(None, "diffusers") is None


@pytest.mark.parametrize("guidance", [-0.1, 99.1, np.nan, np.inf, "1", True, [1.0]])
def test_what_is_no_guidance_of_diffusers(guidance: object) -> None:
    with pytest.raises(UsageError, match="guidance is "):
        own_guidance(guidance, "diffusers")  # type: ignore[arg-type]
