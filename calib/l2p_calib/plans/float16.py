"""Float16 plans from measurement: the power of two of each branch, and the layers that must stay in float32.

Every branch that a norm follows is scaled by 2^-6, which is exact, or by more where values need it. Layers that may
still exceed float16, with a headroom, are raised to float32: linear layers, embedders, convolutions and the residual,
never attention.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from l2p_calib.layout import Branch, Point, QuantizationLayout, layer_of, layer_of_point
from l2p_calib.plans.file import EXPONENTS, Evidence, LayerPlan, NetworkDigest, PlanFile
from l2p_calib.plans.plan import ComputeDType, LayerRule, NamedPlan, PrecisionPlan
from l2p_calib.statistics.ranges import NetworkStatistics, Ranges, require_finite
from l2p_runtime.errors import ParityError

FLOAT16_MAX = 65504.0

HEADROOM = 4.0
"""Factor between the largest value that was measured and the maximum of float16: other prompts, sizes and timesteps
bring larger values."""

USUAL_EXPONENT = -6
"""The exponent of every branch. The published model peaks at 63,000 there (docs/model.md, "Value ranges");
1,000 is far from both ends of float16."""

WEIGHT_PEAK_MIN = 2.0**-11
"""Scaled weights keep a largest magnitude of at least this: an eighth of it is still a normal float16 number."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """What is known of one network.

    Attributes:
        layout: its points and branches.
        sha256: digest of its weights.
        weight_peaks: tensor to its largest magnitude.
        statistics: None where nothing was measured.
    """

    layout: QuantizationLayout
    sha256: str
    weight_peaks: Mapping[str, float]
    statistics: NetworkStatistics | None = None

    def peak(self, point: str) -> float:
        """The largest magnitude that was seen at a point; 0 where nothing was."""
        ranges = self.statistics.of(point) if self.statistics else None
        return ranges.peak if ranges else 0.0


def measured_plan(base: NamedPlan, measurements: Sequence[Measurement], headroom: float = HEADROOM) -> PlanFile:
    """Complete a float16 plan.

    Args:
        base: its name, and what that says whatever is measured.
        measurements: of every network.
        headroom: see `HEADROOM`.

    Raises:
        ArtifactError: a network made NaN or Inf in float32.
        ParityError: values inside attention exceed float16, and nothing exact brings them down.
    """
    plan = base.of(item.layout for item in measurements)
    layers = [entry for item in measurements for entry in measured_layers(plan, item, headroom)]
    digests = tuple(NetworkDigest(item.layout.network, item.sha256) for item in measurements)
    return PlanFile(base.name, base.base, base.default, headroom, digests, tuple(layers))


def overflows(plan: PrecisionPlan, measurement: Measurement, limit: float = FLOAT16_MAX) -> list[tuple[str, float]]:
    """Points that a plan holds in float16 and whose scaled magnitude is over the limit, with it, largest first."""
    found = []
    for point in measurement.layout.points:
        is_narrow = not point.holders or any(plan.carrier(layer) == "float16" for layer in point.holders)
        peak = _scaled(measurement.peak(point.name), point, {layer: plan.exponent(layer) for layer in point.scaled_by})
        if is_narrow and peak > limit:
            found.append((point.name, peak))
    return sorted(found, key=lambda item: -item[1])


def largest(plan: PrecisionPlan, measurement: Measurement) -> tuple[str, float]:
    """The point that a plan holds in float16 with the largest scaled magnitude; an empty name without any."""
    return next(iter(overflows(plan, measurement, limit=0.0)), ("", 0.0))


def base_layers(base: PrecisionPlan, item: Measurement) -> list[LayerPlan]:
    """The layers of one network by the plan's rules, with their evidence; nothing is scaled or raised."""
    return [_entry(base, item, layer, 0, None) for layer in item.layout.layers]


def measured_layers(base: PrecisionPlan, item: Measurement, headroom: float = HEADROOM) -> list[LayerPlan]:
    """The layers of one network, scaled and raised by what was measured.

    Raises:
        ArtifactError: the network made NaN or Inf in float32.
        ParityError: values inside attention exceed float16, and nothing exact brings them down.
    """
    if item.statistics is not None:
        require_finite(item.statistics)
    limit = FLOAT16_MAX / headroom
    exponents: dict[str, int] = {}
    for branch in item.layout.branches:
        exponents |= _branch_exponents(branch, item, limit)
    raised = _raised_by_values(base, item, exponents, headroom)
    for layer, reasons in _raised_by_weights(base, item, exponents, headroom).items():
        raised.setdefault(layer, []).extend(reasons)
    return [_entry(base, item, layer, exponents.get(layer, 0), raised.get(layer)) for layer in item.layout.layers]


def _raised_by_values(
    base: PrecisionPlan, item: Measurement, exponents: Mapping[str, int], headroom: float
) -> dict[str, list[str]]:
    """Layers whose values do not fit float16, with the reasons."""
    raised: dict[str, list[str]] = {}
    limit = FLOAT16_MAX / headroom
    for point in item.layout.points:
        peak = _scaled(item.peak(point.name), point, exponents)
        is_wide = point.holders and all(base.dtype(layer) == "float32" for layer in point.holders)
        if peak <= limit or is_wide:
            continue
        told = f"{point.name} reaches {peak:.3g}, float16 is given {limit:.0f}"
        if not point.holders:
            raise _beyond(told, headroom)
        for layer in point.holders:
            raised.setdefault(layer, []).append(told)
    return raised


def _raised_by_weights(
    base: PrecisionPlan, item: Measurement, exponents: Mapping[str, int], headroom: float
) -> dict[str, list[str]]:
    """Layers whose weights do not fit float16, with the reasons; a gain that large makes values that large."""
    raised: dict[str, list[str]] = {}
    for tensor, peak in item.weight_peaks.items():
        layer = layer_of(tensor)
        if peak * 2.0 ** exponents.get(layer, 0) <= FLOAT16_MAX or base.dtype(layer) == "float32":
            continue
        point = item.layout.point(f"{layer}:out")
        if point is not None and not point.holders and layer not in item.layout.scalable:
            raise _beyond(f"the weights of {layer} reach {peak:.3g}", headroom)
        for held in (layer, *(point.holders if point is not None else ())):
            raised.setdefault(held, []).append(f"weights of {layer} reach {peak:.3g}, float16 holds {FLOAT16_MAX:.0f}")
    return raised


def _entry(
    base: PrecisionPlan, item: Measurement, layer: str, exponent: int, raised: Sequence[str] | None
) -> LayerPlan:
    rule: LayerRule | None = next((rule for rule in base.rules if rule.names(layer)), None)
    why = [f"a norm undoes 2^{exponent} exactly"] if exponent else []
    why += [*(raised or ())[:1], *((rule.reason,) if rule else ())]
    dtype: ComputeDType = "float32" if raised else base.dtype(layer)
    evidence = []
    for point in item.layout.points:
        ranges = item.statistics.of(point.name) if item.statistics and layer_of_point(point.name) == layer else None
        if ranges is not None:
            evidence.append(evidence_of(point.name, ranges))
    return LayerPlan(layer, dtype, exponent, "; ".join(why), tuple(evidence))


def evidence_of(point: str, ranges: Ranges) -> Evidence:
    """The figures that a plan states for a measured point."""
    return Evidence(point, ranges.peak, ranges.percentile(99.9), ranges.calls)


def _branch_exponents(branch: Branch, item: Measurement, limit: float) -> dict[str, int]:
    """Exponents of a branch: the usual one, more where values need it, and none that underflows the weights."""
    inner = [point.name for point in item.layout.points if point.scaled_by == (branch.first,)]
    needed = min((_exponent_for(item.peak(name), limit) for name in inner), default=0)
    usual = {branch.usual: USUAL_EXPONENT}
    first = max(min(usual.get(branch.first, 0), needed), _exponent_borne(item, branch.first))
    left = _exponent_for(item.peak(f"{branch.last}:out"), limit) - first
    last = max(min(usual.get(branch.last, 0), left), _exponent_borne(item, branch.last))
    return {branch.first: first, branch.last: last}


def _exponent_for(peak: float, limit: float) -> int:
    """The power of two, 0 or less, that brings a magnitude under a limit."""
    return max(-max(0, math.ceil(math.log2(peak / limit))), EXPONENTS.start) if peak > 0 else 0


def _exponent_borne(item: Measurement, layer: str) -> int:
    """The minimum power of two, 0 or less, that leaves a layer's weights in the normal range of float16."""
    peak = max((peak for tensor, peak in item.weight_peaks.items() if layer_of(tensor) == layer), default=0.0)
    return -max(0, math.floor(math.log2(peak / WEIGHT_PEAK_MIN))) if peak > 0 else EXPONENTS.start


def _scaled(peak: float, point: Point, exponents: Mapping[str, int]) -> float:
    return peak * 2.0 ** sum(exponents.get(layer, 0) for layer in point.scaled_by)


def _beyond(told: str, headroom: float) -> ParityError:
    return ParityError(
        f"float16 cannot hold what is inside attention, with a headroom of {headroom:g}: {told}",
        hint="build with --precision bf16 or fp32",
    )
