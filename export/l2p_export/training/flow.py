"""Flow matching: the noise levels that training draws, and the Euler steps that a sampler takes.

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
    """Go from noise [B,C,H,W] at sigma 1 to a clean sample of the same shape.

    Args:
        predict: (mixed, time [B], with the caption or without) to x0 - noise.
        noise: unit normal values.
        steps: calls with the caption.
        guidance: s in v_without + s (v_with - v_without); 1 makes no calls without a caption
            (docs/model.md, "Schedule and sampler").
        shift: of the schedule.
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
    """Noise levels [count], one from each of `count` equal parts of (0, 1], shifted as a sampler's schedule is."""
    u = (torch.randperm(count, generator=draws) + torch.rand(count, generator=draws)) / count
    u = 1 - u
    return shift * u / (1 + (shift - 1) * u)
