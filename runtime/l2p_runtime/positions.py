"""Rotary position tables. Positions are data, so a policy needs no other ONNX graph and no other engine.

A token has a position (time, row, column). Caption token i is at (1+i, 0, 0), its padding included; image tokens are at
(padded caption + 1, row, column); image pads are at (0, 0, 0). The tables are computed in float64 and stored as
float32. They list image tokens, image pads, caption: the order of the sequence (docs/model.md, "Rotary positions", and
docs/design.md, "Positions as data").
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from l2p_runtime.arguments import real_number, shown
from l2p_runtime.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from l2p_runtime.contract import ModelSpec, RotarySpec

    Tables: TypeAlias = tuple[NDArray[np.float32], NDArray[np.float32]]

Policy: TypeAlias = "Callable[[RotarySpec, int, int], tuple[NDArray[np.float64], float]]"
"""(rotary, axis, grid tokens along the axis) to (frequencies [axis_channels / 2], factor on cosine and sine)."""


def rope_tables(
    model: ModelSpec, rows: int, columns: int, caption_tokens: int, policy: str | Policy = "native"
) -> Tables:
    """Cosine and sine tables [S, R] for a grid of image tokens and a padded caption.

    Args:
        model: rotary axes and padding.
        rows: h, token rows of the image.
        columns: w, token columns of the image.
        caption_tokens: T, caption tokens with padding.
        policy: `native`, `ntk`, `yarn`, or a function of the caller's own.

    Raises:
        UsageError: unknown policy name, or a function that returns something else than finite frequencies of the
            axis's shape and a finite factor.
    """
    import numpy as np

    image_tokens = rows * columns
    padded = model.padded(image_tokens)
    positions = np.zeros((padded + caption_tokens, 3))
    positions[:image_tokens, 0] = caption_tokens + 1
    positions[:image_tokens, 1] = np.repeat(np.arange(rows), columns)
    positions[:image_tokens, 2] = np.tile(np.arange(columns), rows)
    positions[padded:, 0] = np.arange(1, caption_tokens + 1)
    return _tables(model.rotary, positions, (1, rows, columns), named_policy(policy))


def caption_tables(tables: Tables, caption_tokens: int) -> Tables:
    """The last T rows of each table, [T, R], which belong to the caption."""
    cosine, sine = tables
    return cosine[-caption_tokens:], sine[-caption_tokens:]


def native(rotary: RotarySpec, axis: int, grid: int) -> tuple[NDArray[np.float64], float]:
    """Frequencies as trained, whatever the grid: theta^(-2i/d)."""
    import numpy as np

    del grid
    channels = rotary.axis_channels[axis]
    return rotary.theta ** (-np.arange(0, channels, 2) / channels), 1.0


def ntk(rotary: RotarySpec, axis: int, grid: int) -> tuple[NDArray[np.float64], float]:
    """NTK-aware stretching: theta grows to theta * s^(d/(d-2)), s being the grid over the trained grid."""
    import numpy as np

    channels, stretch = rotary.axis_channels[axis], _stretch(rotary, axis, grid)
    theta = rotary.theta * stretch ** (channels / (channels - 2)) if channels > 2 else rotary.theta
    return theta ** (-np.arange(0, channels, 2) / channels), 1.0


def yarn(rotary: RotarySpec, axis: int, grid: int) -> tuple[NDArray[np.float64], float]:
    """YaRN (arXiv 2309.00071, eq. 22-24): slow frequencies are interpolated, fast ones kept, a ramp between them.

    The ramp runs over pairs that turn between 32 times and once over the trained grid; cosine and sine of a stretched
    axis are multiplied by 0.1 ln(s) + 1.
    """
    import numpy as np

    frequencies, _ = native(rotary, axis, grid)
    stretch = _stretch(rotary, axis, grid)
    if stretch == 1.0:
        return frequencies, 1.0
    channels = rotary.axis_channels[axis]
    low = max(math.floor(_pair_with_turns(rotary, channels, 32.0)), 0)
    high = min(math.ceil(_pair_with_turns(rotary, channels, 1.0)), channels - 1)
    ramp = np.clip((np.arange(channels // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
    return frequencies * (1.0 - ramp) + frequencies / stretch * ramp, 0.1 * math.log(stretch) + 1.0


_POLICIES: dict[str, Policy] = {"native": native, "ntk": ntk, "yarn": yarn}


def named_policy(policy: str | Policy) -> Policy:
    """The function of a policy's name; a function is one already.

    Raises:
        UsageError: neither.
    """
    if callable(policy):
        return policy
    if not isinstance(policy, str) or policy not in _POLICIES:
        raise UsageError(f"position policy is {shown(policy)}, expected one of {', '.join(_POLICIES)} or a function")
    return _POLICIES[policy]


def _tables(rotary: RotarySpec, positions: NDArray[np.float64], grid: tuple[int, int, int], policy: Policy) -> Tables:
    import numpy as np

    angles, factors = [], []
    for axis, channels in enumerate(rotary.axis_channels):
        frequencies, factor = _checked(policy(rotary, axis, grid[axis]), axis, channels // 2)
        angles.append(positions[:, axis, None] * frequencies)
        factors.append(np.full(channels // 2, factor))
    angle, scale = np.concatenate(angles, axis=1), np.concatenate(factors)
    return (np.cos(angle) * scale).astype(np.float32), (np.sin(angle) * scale).astype(np.float32)


def _checked(given: object, axis: int, pairs: int) -> tuple[NDArray[np.float64], float]:
    """What a position policy gave for an axis.

    Raises:
        UsageError: no pair of frequencies [pairs] and a factor, or numbers that are not finite.
    """
    import numpy as np

    if not isinstance(given, tuple) or len(given) != 2:
        raise UsageError(
            f"the position policy gave a {type(given).__name__} for axis {axis}, expected (frequencies, factor)"
        )
    try:
        frequencies = np.asarray(given[0], np.float64)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"the position policy gave frequencies that are no numbers for axis {axis}: {error}"
        ) from error
    if frequencies.shape != (pairs,):
        raise UsageError(
            f"the position policy gave frequencies {list(frequencies.shape)} for axis {axis}, expected [{pairs}]"
        )
    factor = real_number(f"the position policy's factor for axis {axis}", given[1])
    if not (np.isfinite(frequencies).all() and math.isfinite(factor)):
        raise UsageError(f"the position policy gave NaN or Inf for axis {axis}, expected finite numbers")
    return frequencies, factor


def _stretch(rotary: RotarySpec, axis: int, grid: int) -> float:
    """Ratio of the grid to the trained one, at least 1; the time axis is never stretched."""
    return 1.0 if axis == 0 else max(grid / rotary.base_grid, 1.0)


def _pair_with_turns(rotary: RotarySpec, channels: int, turns: float) -> float:
    """Index of the (fractional) pair that turns this often over the trained grid."""
    return channels * math.log(rotary.base_grid / (turns * 2 * math.pi)) / (2 * math.log(rotary.theta))
