"""Flow matching: random sigmas for training, and an Euler sampler.

Source: docs/model.md, "Schedule and sampler".
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from l2p_runtime.schedule import sigmas


@torch.no_grad()
def sample(
    predict: Callable[[Tensor, Tensor, bool], Tensor], noise: Tensor, steps: int, guidance: float, shift: float
) -> Tensor:
    """Sample with Euler steps, from noise [B,C,H,W] at sigma 1.

    Args:
        predict: (mixed, time [B], whether with the caption) to x0 - noise.
        noise: unit normal values.
        steps: number of steps, each with one call with the caption.
        guidance: s in v_without + s (v_with - v_without); 1 makes no calls without a caption
            (docs/model.md, "Schedule and sampler").
        shift: of the sigma schedule.

    Returns:
        The clean sample [B,C,H,W].
    """
    x, levels = noise, sigmas(steps, shift)
    for level, following in itertools.pairwise(levels):
        time = x.new_full((len(x),), 1 - level)
        made = predict(x, time, True)
        if guidance != 1:
            without = predict(x, time, False)
            made = without + guidance * (made - without)
        x = x - made * (following - level)
    return x


def draw_sigmas(count: int, shift: float, draws: torch.Generator) -> Tensor:
    """Stratified random sigmas [count]: one from each of `count` equal parts of (0, 1], shifted like a sampler's."""
    u = (torch.randperm(count, generator=draws) + torch.rand(count, generator=draws)) / count
    u = 1 - u
    return shift * u / (1 + (shift - 1) * u)
