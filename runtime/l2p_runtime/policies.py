"""Position policies: the rotary frequencies of each axis for a grid larger than the trained one.

A policy maps (rotary, axis, grid) to the frequencies of that axis and a factor on its cosines and sines. `rotary` holds
the trained grid, so rows and columns are stretched each by its own ratio, and up to the trained grid every policy is
`native` (docs/positions.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, get_args

from l2p_runtime.arguments import function, real_number, shown
from l2p_runtime.contract import Positions
from l2p_runtime.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from l2p_runtime.contract import RotarySpec

Frequencies: TypeAlias = "tuple[NDArray[np.float64], float | NDArray[np.float64]]"
"""Of one axis: frequencies [axis_channels / 2], and the factor on cosine and sine."""

Policy: TypeAlias = "Callable[[RotarySpec, int, int], Frequencies]"
"""(rotary, axis, grid tokens along the axis) to (frequencies [axis_channels / 2], factor on cosine and sine).

Axis 0 is time, 1 rows, 2 columns. The factor is one number, or one for each frequency.
"""

TEMPERATURE = "+temperature"
"""What ends the name of a policy with an attention temperature."""

BEST_BEYOND_TRAINED = "linear"
"""The policy that `auto` takes beyond the trained grid (docs/positions.md, "Measured")."""


@dataclass(frozen=True, slots=True)
class TimeDependent:
    """A policy of the caller's own that is evaluated at every step, once for each axis.

    The caption network runs once a prompt and takes the tables of the first step.

    Attributes:
        function: (rotary, axis, grid tokens along the axis, t) to what a `Policy` gives. t = 1 - sigma, 0 at pure noise
            and 1 at the finished image.
    """

    function: Callable[[RotarySpec, int, int, float], Frequencies]

    def __post_init__(self) -> None:
        function("the function of a TimeDependent", self.function)


def axis_frequencies(
    rotary: RotarySpec, grid: tuple[int, int], policy: str | Policy | TimeDependent, time: float = 0.0
) -> tuple[Frequencies, ...]:
    """Frequencies and factor of each axis, from a policy.

    Args:
        rotary: axes and trained grid.
        grid: token rows and columns.
        policy: a name of `POSITIONS`, or a function.
        time: t = 1 - sigma, for a policy that depends on it.

    Returns:
        For time, rows and columns: frequencies [axis_channels / 2] and factors of the same shape.

    Raises:
        UsageError: unknown name, or a function gave another shape or a number that is not finite.
    """
    require_policy(policy)
    if isinstance(policy, str):
        return _named(rotary, grid, policy)
    sizes = (1, *grid)
    if isinstance(policy, TimeDependent):
        found = [policy.function(rotary, axis, sizes[axis], time) for axis in range(3)]
    else:
        found = [policy(rotary, axis, sizes[axis]) for axis in range(3)]
    return tuple(_checked(rotary, axis, pair) for axis, pair in enumerate(found))


def native(rotary: RotarySpec, axis: int, grid: int) -> Frequencies:
    """Frequencies as trained, whatever the grid: theta^(-2i/d)."""
    import numpy as np

    del grid
    channels = rotary.axis_channels[axis]
    return rotary.theta ** (-np.arange(0, channels, 2) / channels), 1.0


def linear(rotary: RotarySpec, axis: int, grid: int) -> Frequencies:
    """Position interpolation (arXiv 2306.15595): every frequency over s, the grid over the trained grid."""
    frequencies, factor = native(rotary, axis, grid)
    return frequencies / _stretch(rotary, axis, grid), factor


def ntk(rotary: RotarySpec, axis: int, grid: int) -> Frequencies:
    """NTK-aware stretching: theta grows to theta * s^(d/(d-2)), s being the grid over the trained grid."""
    import numpy as np

    channels, stretch = rotary.axis_channels[axis], _stretch(rotary, axis, grid)
    theta = rotary.theta * stretch ** (channels / (channels - 2)) if channels > 2 else rotary.theta
    return theta ** (-np.arange(0, channels, 2) / channels), 1.0


def yarn(rotary: RotarySpec, axis: int, grid: int) -> Frequencies:
    """YaRN (arXiv 2309.00071, eq. 22-24): slow frequencies are interpolated, fast ones kept, a ramp between them.

    The ramp runs over pairs that turn between 32 times and once over the trained grid; cosine and sine of a stretched
    axis are multiplied by 0.1 ln(s) + 1.
    """
    channels, stretch = rotary.axis_channels[axis], _stretch(rotary, axis, grid)
    if stretch == 1.0:
        return native(rotary, axis, grid)
    low = max(math.floor(_pair_with_turns(rotary, axis, 32.0)), 0)
    high = min(math.ceil(_pair_with_turns(rotary, axis, 1.0)), channels - 1)
    return _ramped(rotary, axis, grid, low, high), 0.1 * math.log(stretch) + 1.0


def vision_yarn(rotary: RotarySpec, axis: int, grid: int) -> Frequencies:
    """YaRN with a ramp for images: from the axis' fastest pair to the one that turns once over its trained width.

    An image axis is short: no pair turns 32 times over 64 tokens, so YaRN's bound for text lies outside the table. The
    bounds are not rounded to whole pairs, and there is no factor.
    """
    if _stretch(rotary, axis, grid) == 1.0:
        return native(rotary, axis, grid)
    return _ramped(rotary, axis, grid, 0.0, max(_pair_with_turns(rotary, axis, 1.0), 0.0)), 1.0


_POLICIES: dict[str, Policy] = {
    "native": native,
    "linear": linear,
    "ntk": ntk,
    "yarn": yarn,
    "vision-yarn": vision_yarn,
}

POSITIONS: tuple[str, ...] = get_args(Positions)
"""Names of the built-in policies, `auto` first."""


def require_policy(policy: object) -> str | Policy | TimeDependent:
    """A policy's name or function, checked before anything is loaded for it.

    Raises:
        UsageError: neither.
    """
    if isinstance(policy, TimeDependent) or callable(policy) or (isinstance(policy, str) and policy in POSITIONS):
        return policy
    raise UsageError(f"position policy is {shown(policy)}, expected one of {', '.join(POSITIONS)} or a function")


def resolved_name(rotary: RotarySpec, grid: tuple[int, int], name: str) -> str:
    """What `auto` stands for at a grid: `native` up to the trained one, else the best policy measured; others as named.

    Raises:
        UsageError: unknown name.
    """
    require_policy(name)
    if name != "auto":
        return name
    within = all(tokens <= trained for tokens, trained in zip(grid, rotary.base_grid, strict=True))
    return "native" if within else BEST_BEYOND_TRAINED


def _named(rotary: RotarySpec, grid: tuple[int, int], name: str) -> tuple[Frequencies, ...]:
    base, suffix, _ = resolved_name(rotary, grid, name).partition(TEMPERATURE)
    policy, sizes = _POLICIES[base], (1, *grid)
    warmth = _temperature(rotary, grid) if suffix else 1.0
    found = (policy(rotary, axis, sizes[axis]) for axis in range(3))
    return tuple(_checked(rotary, axis, (values, factor * warmth)) for axis, (values, factor) in enumerate(found))


def _temperature(rotary: RotarySpec, grid: tuple[int, int]) -> float:
    """Factor on queries and keys that scales attention scores by ln(tokens) / ln(trained tokens); 1 up to those.

    Source: arXiv 2306.08645, proportional attention.
    """
    tokens, trained = math.prod(grid), math.prod(rotary.base_grid)
    return math.sqrt(math.log(tokens) / math.log(trained)) if tokens > trained > 1 else 1.0


def _checked(rotary: RotarySpec, axis: int, found: object) -> Frequencies:
    """What a policy gave for an axis, as float64 arrays [axis_channels / 2].

    Raises:
        UsageError: no pair of frequencies and a factor, another shape, or numbers that are not finite.
    """
    import numpy as np

    pairs, what = rotary.axis_channels[axis] // 2, f"the position policy's factor for axis {axis}"
    if not isinstance(found, tuple) or len(found) != 2:
        raise UsageError(
            f"the position policy gave a {type(found).__name__} for axis {axis}, expected (frequencies, factor)"
        )
    try:
        frequencies = np.asarray(found[0], np.float64)
        factor = np.asarray(found[1] if np.ndim(found[1]) else real_number(what, found[1]), np.float64)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"the position policy gave frequencies or factors that are no numbers for axis {axis}: {error}"
        ) from error
    for name, value, shapes in (("frequencies", frequencies, [(pairs,)]), ("factors", factor, [(), (pairs,)])):
        if value.shape not in shapes:
            raise UsageError(f"the position policy gave {name} {list(value.shape)} for axis {axis}, expected [{pairs}]")
    if not (np.isfinite(frequencies).all() and np.isfinite(factor).all()):
        raise UsageError(f"the position policy gave NaN or Inf for axis {axis}, expected finite numbers")
    return frequencies, np.broadcast_to(factor, (pairs,))


def _ramped(rotary: RotarySpec, axis: int, grid: int, low: float, high: float) -> NDArray[np.float64]:
    """Frequencies kept before pair `low`, divided by the stretch after pair `high`, mixed between them."""
    import numpy as np

    frequencies, _ = native(rotary, axis, grid)
    ramp = np.clip((np.arange(len(frequencies)) - low) / max(high - low, 0.001), 0.0, 1.0)
    mixed: NDArray[np.float64] = frequencies * (1.0 - ramp) + frequencies / _stretch(rotary, axis, grid) * ramp
    return mixed


def _stretch(rotary: RotarySpec, axis: int, grid: int) -> float:
    """Ratio of the grid to the trained one, at least 1; the time axis is never stretched."""
    return 1.0 if axis == 0 else max(grid / rotary.base_grid[axis - 1], 1.0)


def _pair_with_turns(rotary: RotarySpec, axis: int, turns: float) -> float:
    """Index of the (fractional) pair that turns this often over the trained grid."""
    trained, channels = rotary.base_grid[axis - 1], rotary.axis_channels[axis]
    return channels * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(rotary.theta))
