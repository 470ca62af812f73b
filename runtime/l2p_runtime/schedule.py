"""The sampling schedule: shifted flow matching with Euler steps (docs/model.md, "Schedule and sampler")."""

from __future__ import annotations


def sigmas(steps: int, shift: float) -> tuple[float, ...]:
    """Sigma of each step and the final 0: `steps` + 1 values, descending from 1.

    sigma_i runs linearly from 1 towards 0 and is shifted to s sigma / (1 + (s - 1) sigma).
    """
    linear = (1.0 - index / steps for index in range(steps))
    return (*(shift * sigma / (1.0 + (shift - 1.0) * sigma) for sigma in linear), 0.0)


def model_time(sigma: float) -> float:
    """The time input of a network: 0 at pure noise, 1 at a clean image. Kept in float32, not rounded to BF16."""
    return 1.0 - sigma
