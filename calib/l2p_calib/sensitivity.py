"""Sensitivity sweep: the error of each group of layers in FP8, ranked, and the fewest that must stay in float16."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from l2p_runtime.contract.codec import to_json
from l2p_runtime.errors import UsageError

GATE = 0.01
"""Default of the relative error of the denoiser's output that a swept plan may make: half of what the ledger allows a
bundle in FP8, whose proof uses other pictures and adds float16."""

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Deviation:
    """How far a denoiser with some layers in FP8 is from the same one in float32.

    Attributes:
        error: relative L2 error of its predictions, over all samples together.
        worst: maximum relative L2 error of one sample.
        image_psnr_db: minimum PSNR of complete pictures against those in float32 of the same seeds.
        right: pictures that show their prompts, by a judge; None where nothing can judge them.
    """

    error: float
    worst: float
    image_psnr_db: float
    right: int | None = None


@dataclass(frozen=True, slots=True)
class GroupDeviation:
    """The deviation with only one group of layers in FP8.

    Attributes:
        group: as `layers.3 qkv`.
        layers: its layers.
        is_kept: whether the plan keeps them in float16.
    """

    group: str
    layers: tuple[str, ...]
    is_kept: bool
    deviation: Deviation


@dataclass(frozen=True, slots=True)
class KeptDeviation:
    """The deviation with all groups in FP8 except the first `kept` of the ranking."""

    kept: int
    deviation: Deviation


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """A sweep.

    Attributes:
        source: what the denoiser was run on, for people.
        gate: relative error that was allowed.
        groups: the most harmful first.
        steps: what was tried to meet the gate, by the number of groups that were kept.
        pictures: number of complete pictures that are drawn each time.
        right: how many of them show their prompts in float32, by a judge; None where nothing can judge them.
    """

    source: str
    gate: float
    groups: tuple[GroupDeviation, ...]
    steps: tuple[KeptDeviation, ...]
    pictures: int = 1
    right: int | None = None
    schema: int = SCHEMA

    @property
    def kept(self) -> int:
        """The fewest groups of the ranking that have to be kept."""
        return min(step.kept for step in self.steps if step.deviation.error <= self.gate)

    @property
    def reasons(self) -> dict[str, str]:
        """Layer to the reason why it is kept in float16, of the kept layers."""
        everything = next((step for step in self.steps if step.kept == 0), None)
        told = f"; all groups make {everything.deviation.error:.3g}" if everything else ""
        return {
            layer: f"kept in float16: only {item.group} in FP8 makes an error of {item.deviation.error:.3g}"
            f"{self._cost(item)}{told}, {self.gate:g} is allowed"
            for item in self.groups
            if item.is_kept
            for layer in item.layers
        }

    def _cost(self, item: GroupDeviation) -> str:
        lost = _lost(item.deviation, self.right)
        return f" and costs {lost} of {self.right} right pictures" if lost else ""


def sweep(
    groups: Mapping[str, Sequence[str]],
    gate: float,
    source: str,
    measure: Callable[[Sequence[str]], Deviation],
    advance: Callable[[int], None],
    right: int | None = None,
) -> Sensitivity:
    """Measure with only one group at a time in FP8, then keep as many of the worst groups as the gate requires.

    Groups are ranked by the right pictures that they cost, then by error. The number that is kept is found by bisection
    in that order. Both the result and one group less were measured.

    Args:
        groups: name to its layers.
        gate: relative error of the denoiser's output that is allowed.
        source: for people, see `Sensitivity`.
        measure: given the layers that are in FP8.
        advance: told 1 after each group.
        right: pictures that are right in float32; None where nothing can judge them.

    Raises:
        UsageError: a gate that nothing or everything passes.
    """
    require_gate(gate)
    alone: dict[str, Deviation] = {}
    for name, layers in groups.items():
        alone[name] = measure(tuple(layers))
        advance(1)
    ranking = sorted(alone, key=lambda name: (-_lost(alone[name], right), -alone[name].error))
    tried: dict[int, Deviation] = {}

    def passes(kept: int) -> bool:
        if kept not in tried:
            tried[kept] = measure(tuple(layer for name in ranking[kept:] for layer in groups[name]))
        return tried[kept].error <= gate

    low, high = 0, len(ranking)
    if passes(low):
        high = low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) else (middle, high)
    passes(high)
    return Sensitivity(
        source,
        gate,
        tuple(GroupDeviation(n, tuple(groups[n]), i < high, alone[n]) for i, n in enumerate(ranking)),
        tuple(KeptDeviation(count, tried[count]) for count in sorted(tried)),
        right=right,
    )


def require_gate(gate: float) -> None:
    """Refuse a gate that nothing or everything passes.

    Raises:
        UsageError: it is no relative error between 0 and 1.
    """
    if not 0 < gate < 1:
        raise UsageError(f"--gate is {gate:g}, expected a relative error between 0 and 1")


def relative_errors(sums: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Relative L2 error of all samples together, and the maximum of one sample.

    Args:
        sums: of each sample, the sum of squares of the difference, and of the expected values.
    """
    difference, expected = (math.fsum(column) for column in zip(*sums, strict=True))
    ratios = [_ratio(*pair) for pair in sums]
    # A NaN is the worst there is, and no largest number says so.
    return _ratio(difference, expected), math.nan if any(map(math.isnan, ratios)) else max(ratios)


def sensitivity_to_json(found: Sensitivity) -> str:
    """The whole sweep as JSON."""
    return json.dumps({**to_json(found), "kept": found.kept}, indent=1, allow_nan=False) + "\n"


def sensitivity_to_csv(found: Sensitivity) -> str:
    """A table of the groups, the most harmful first."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("group", "error", "worst", "image_psnr_db", "right", "kept"))
    for item in found.groups:
        d = item.deviation
        figures = (f"{d.error:.6g}", f"{d.worst:.6g}", f"{d.image_psnr_db:.2f}", "" if d.right is None else d.right)
        table.writerow((item.group, *figures, int(item.is_kept)))
    return text.getvalue()


def _lost(deviation: Deviation, right: int | None) -> int:
    """How many right pictures fewer there are than in float32; one more is no gain, but chance."""
    return 0 if right is None or deviation.right is None else max(0, right - deviation.right)


def _ratio(difference: float, expected: float) -> float:
    return math.sqrt(difference / expected) if expected else math.sqrt(difference)
