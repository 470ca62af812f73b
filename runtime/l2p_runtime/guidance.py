"""Two conventions of the guidance scale, in terms of the velocities of the prompt and of the negative prompt.

    l2p         v = v_neg + g (v_pos - v_neg)     1 is none
    diffusers   v = v_pos + g (v_pos - v_neg)     0 is none; that of its Z-Image pipeline

So g of diffusers is g + 1 here.
"""

from __future__ import annotations

from typing import Literal

from l2p_runtime.arguments import one_of, real_number
from l2p_runtime.errors import UsageError

Convention = Literal["l2p", "diffusers"]
CONVENTIONS: tuple[Convention, ...] = ("l2p", "diffusers")

_DIFFUSERS_MAX = 99.0
"""One less than the maximum of `Sampling`."""


def prompts_of(guidance: float) -> int:
    """How many prompts a denoising step of this guidance scale computes: the negative one only with guidance."""
    return 1 if guidance == 1.0 else 2


def own_guidance(guidance: float | None, convention: str) -> float | None:
    """A guidance scale in the convention `l2p`; None, which stands for a default in that convention, stays None.

    Raises:
        UsageError: no number, out of the convention's range, or no such convention.
    """
    one_of("guidance_convention", convention, CONVENTIONS)
    if guidance is None:
        return None
    number = real_number("guidance", guidance)
    if convention == "l2p":
        return number
    if not 0 <= number <= _DIFFUSERS_MAX:
        raise UsageError(f"guidance is {number}, expected 0 to {_DIFFUSERS_MAX:g} in the convention of diffusers")
    return number + 1.0
