"""FP8 plans: a measured float16 plan whose linear layers are in FP8, each with a scale for its inputs.

If query, key and value are in FP8 too, they are listed after the layers, each with a scale of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from l2p_calib.fp8 import AMAX, ScaleChoice, best_choice, scale_choices
from l2p_calib.layout import QuantizableLayer
from l2p_calib.plans.file import INPUT_SCALES, Float8, LayerPlan, NetworkDigest, PlanFile
from l2p_calib.plans.float16 import HEADROOM, Measurement, base_layers, evidence_of, measured_layers
from l2p_calib.plans.plan import FLOAT8, NamedPlan, PrecisionPlan
from l2p_calib.statistics.ranges import require_finite
from l2p_runtime.errors import ArtifactError, HostError

PLAIN = "fp8-plain"
"""The plan that chooses nothing: every linear layer in FP8, scales by the maximum, no branch scaled, none raised."""


def float8_plan(
    base: NamedPlan,
    measurements: Sequence[Measurement],
    headroom: float = HEADROOM,
    kept: Mapping[str, str] | None = None,
) -> PlanFile:
    """Complete a plan that has linear layers in FP8.

    Layers that are not in FP8 are as in a measured float16 plan. A linear layer that float16 could not hold stays in
    float32. A linear layer whose inputs were all 0 stays in float16, and so does an attention with an input that was
    all 0.

    Args:
        base: its name, and what that says whatever is measured.
        measurements: of every network.
        headroom: of what float16 holds, see `float16.HEADROOM`.
        kept: layers that must stay in float16, with the reason.

    Raises:
        HostError: nothing was measured of a network, which machines with little memory leave out.
        ArtifactError: a network made NaN or Inf in float32, or a point that is rounded to FP8 was not measured.
        ParityError: values inside attention exceed float16, and nothing exact brings them down.
    """
    plan = base.of(item.layout for item in measurements)
    layers = [entry for item in measurements for entry in _layers(plan, item, headroom, kept or {})]
    digests = tuple(NetworkDigest(item.layout.network, item.sha256) for item in measurements)
    return PlanFile(base.name, base.base, base.default, headroom, digests, tuple(layers))


def _layers(base: PrecisionPlan, item: Measurement, headroom: float, kept: Mapping[str, str]) -> Iterator[LayerPlan]:
    """The layers of one network, then the inputs of attention that the plan's rules put in FP8."""
    is_plain = base.base == PLAIN
    if item.statistics is not None:
        require_finite(item.statistics)
    found = base_layers(base, item) if is_plain else measured_layers(base, item, headroom)
    inputs = [_input(base, item, part) for attention in item.layout.attentions for part in attention.inputs]
    found += [entry for entry in inputs if entry.dtype == FLOAT8]
    listed = {entry.layer for entry in found}
    products = {product.layer: product for product in item.layout.quantizable if product.layer in listed}
    if products and item.statistics is None:
        raise HostError(
            f"FP8 needs to know what `{item.layout.network}` computes with, and nothing was measured of it",
            hint="give --statistics, or build where a block in float32 fits into memory",
        )
    points = dict.fromkeys(product.reads for product in products.values())
    choices = {point: _choices(item, point, only_amax=is_plain) for point in points}
    zeros = {product.group: product.reads for product in products.values() if not choices[product.reads]}
    for entry in found:
        product = products.get(entry.layer)
        if product is None or entry.dtype != FLOAT8:
            yield entry
        elif entry.layer in kept:
            yield _unrounded(entry, base, kept[entry.layer])
        elif product.group in zeros:
            yield _unrounded(entry, base, f"{zeros[product.group]} was 0 throughout, which gives no scale")
        else:
            yield _rounded(entry, base, product.reads, choices[product.reads])


def _input(base: PrecisionPlan, item: Measurement, part: QuantizableLayer) -> LayerPlan:
    """An input of attention as a plan's rules have it, with what was measured of it."""
    ranges = item.statistics.of(part.reads) if item.statistics is not None else None
    evidence = () if ranges is None else (evidence_of(part.reads, ranges),)
    reason = next((rule.reason for rule in base.rules if rule.names(part.layer)), "")
    return LayerPlan(part.layer, base.dtype(part.layer), 0, reason, evidence)


def _choices(item: Measurement, point: str, *, only_amax: bool) -> tuple[ScaleChoice, ...]:
    """The scales of what is read at a point; none where all was 0.

    Raises:
        ArtifactError: it was not measured.
    """
    ranges = item.statistics.of(point) if item.statistics is not None else None
    if ranges is None:
        raise ArtifactError(
            f"FP8 needs to know what `{point}` is, and the statistics of `{item.layout.network}` lack it",
            hint="measure it again with `l2p-export calibrate`",
        )
    if not ranges.peak:
        return ()
    found = scale_choices(ranges)
    return tuple(choice for choice in found if choice.method == AMAX) if only_amax else found


def _rounded(entry: LayerPlan, base: PrecisionPlan, point: str, choices: tuple[ScaleChoice, ...]) -> LayerPlan:
    best = best_choice(choices)
    scale = min(max(best.scale, INPUT_SCALES[0]), INPUT_SCALES[1])
    others = ", ".join(f"{choice.method} {choice.error:.2%}" for choice in choices if choice is not best)
    why = f"{point} by {best.method} with an error of {best.error:.2%}" + (f" ({others})" if others else "")
    return replace(entry, reason=_joined(entry, base, why), float8=Float8(scale, best.method, choices))


def _unrounded(entry: LayerPlan, base: PrecisionPlan, why: str) -> LayerPlan:
    return replace(entry, dtype=base.default, reason=_joined(entry, base, why))


def _joined(entry: LayerPlan, base: PrecisionPlan, why: str) -> str:
    """The reasons of a layer, without that of the rule, which all FP8 layers share."""
    shared = {rule.reason for rule in base.rules if rule.dtype == FLOAT8}
    return "; ".join([*(part for part in entry.reason.split("; ") if part and part not in shared), why])
