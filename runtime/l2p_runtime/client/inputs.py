"""Arguments of a call as the arrays that a server's models take."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from l2p_runtime.arguments import real_number, shown, text, whole_number
from l2p_runtime.coarse import Coarse
from l2p_runtime.errors import UsageError
from l2p_runtime.requests import float_array

if TYPE_CHECKING:
    from l2p_runtime.contract import Grid

_INT32 = (-(2**31), 2**31 - 1)
_UINT64 = (0, 2**64 - 1)


def request_inputs(
    texts: Mapping[str, str | None],
    embeds: Mapping[str, Any],
    numbers: Mapping[str, int | None],
    guidance: float | None,
    positions: str | None,
    base_grid: Grid | None,
    coarse: Coarse | None,
) -> dict[str, Any]:
    """Input name to array, without what is None. What the wire cannot hold is refused here, the rest by the server.

    Args:
        texts: `prompt` and `negative_prompt`.
        embeds: `prompt_embeds` and `negative_embeds`, [L,C].
        numbers: `seed`, and whole numbers of 32 bits.
        guidance: guidance scale.
        positions: name of a position policy.
        base_grid: token rows and columns of the trained grid.
        coarse: how to draw coarse to fine.

    Raises:
        UsageError: another type or range, or not one of a prompt and its embeddings.
    """
    import numpy as np

    if (texts["prompt"] is None) == (embeds["prompt_embeds"] is None):
        raise UsageError("give a prompt or prompt_embeds, one of them")
    found: dict[str, Any] = {}
    for name, words in texts.items():
        if words is not None:
            found[name] = np.array([text(name, words).encode()], np.object_)
    for name, array in embeds.items():
        if array is not None:
            found[name] = np.ascontiguousarray(float_array(name, array))
    for name, number in numbers.items():
        if number is not None:
            dtype, limits = ("uint64", _UINT64) if name == "seed" else ("int32", _INT32)
            found[name] = np.array([whole_number(name, number, *limits)], dtype)
    if guidance is not None:
        found["guidance"] = np.array([finite("guidance", guidance)], np.float32)
    if positions is not None:
        found["positions"] = np.frombuffer(text("positions", positions).encode(), np.uint8)
    if base_grid is not None:
        found["base_grid"] = np.array(_grid(base_grid), np.int32)
    if coarse is not None:
        found |= _coarse(coarse)
    return found


def finite(name: str, value: object) -> float:
    """A finite number as a Python float.

    Raises:
        UsageError: another type, NaN or Inf.
    """
    number = real_number(name, value)
    if not math.isfinite(number):
        raise UsageError(f"{name} is {number}, expected a finite number")
    return number


def _grid(base_grid: object) -> list[int]:
    if not isinstance(base_grid, Sequence) or isinstance(base_grid, str) or len(base_grid) != 2:
        raise UsageError(f"base_grid is {shown(base_grid)}, expected two whole numbers: token rows and columns")
    return [whole_number("a side of base_grid", side, *_INT32) for side in base_grid]


def _coarse(coarse: object) -> dict[str, Any]:
    import numpy as np

    if not isinstance(coarse, Coarse):
        raise UsageError(f"coarse is a {type(coarse).__name__}, expected Coarse(height=..., width=...)")
    sides = {"coarse_height": coarse.height, "coarse_width": coarse.width, "fine_steps": coarse.steps}
    found: dict[str, Any] = {
        name: np.array([whole_number(name, number, *_INT32)], np.int32) for name, number in sides.items()
    }
    found["renoise"] = np.array([coarse.renoise], np.float64)
    found["fine_guidance"] = np.array([coarse.guidance], np.float32)
    return found
