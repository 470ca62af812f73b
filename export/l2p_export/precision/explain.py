"""Explains what the plans of a bundle, or of a file, decide about one layer, and why."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from l2p_calib.layout import ATTENTION_INPUTS
from l2p_calib.plans.file import Evidence, Float8, LayerPlan, PlanFile, read_plan
from l2p_export.graphs.stored import bundle_model
from l2p_export.precision.plans import plain_plan
from l2p_runtime.bundle import Bundle, open_bundle
from l2p_runtime.contract import NETWORKS
from l2p_runtime.errors import UsageError

if TYPE_CHECKING:
    from l2p_export.families import Model

_NEAR = 3
_UNLISTED = "query, key and value are not quantized unless a plan lists them"


@dataclass(frozen=True, slots=True)
class Explanation:
    """One layer in one plan.

    Attributes:
        plan: name of the plan.
        exponent: its weights are stored multiplied by two to this power.
    """

    plan: str
    layer: str
    dtype: str
    exponent: int
    reason: str
    evidence: tuple[Evidence, ...] = ()
    float8: Float8 | None = None


def explain(path: Path, layer: str, store: Path | None = None) -> tuple[Explanation, ...]:
    """Explain a layer in each plan; for attention also query, key and value, if the plan lists them.

    Args:
        path: a bundle, or a plan's file.
        layer: published name, as `layers.3.feed_forward.w2`, or `layers.3.attention`.
        store: folder of the bundle's files, if they are not in it.

    Raises:
        UsageError: no plan lists such a layer; the hint has the nearest names.
        ArtifactError: the bundle or plan is damaged.
    """
    if path.is_file():
        file = read_plan(path)
        found = _told(file, layer)
        if not found:
            raise _unknown(layer, (entry.layer for entry in file.layers), path)
        return found
    bundle = open_bundle(path, store)
    whole = {plan.name: read_plan(bundle.path(plan.file)) for plan in bundle.manifest.plans if plan.file is not None}
    model = _model(bundle)
    layouts = [model.layout(network) for network in NETWORKS] if model is not None else []
    known = {entry.layer for file in whole.values() for entry in file.layers}
    known = known or {layer for layout in layouts for layer in layout.layers}
    # A plan need not list the attention of a block, or its inputs.
    attentions = [item for layout in layouts for item in layout.attentions]
    names = {name for item in attentions for name in (item.layer, *(part.layer for part in item.inputs))}
    if layer not in known | names:
        raise _unknown(layer, known, path)
    told: list[Explanation] = []
    for plan in bundle.manifest.plans:
        if plan.name in whole:
            file = whole[plan.name]
            told += _told(file, layer) or (_explained(file.name, LayerPlan(layer, file.default, reason=_UNLISTED)),)
        elif model is not None:
            plain = plain_plan(model, plan.base, plan.name)
            reason = next((rule.reason for rule in plain.rules if rule.names(layer)), "all layers of this plan are so")
            told.append(Explanation(plan.name, layer, plain.dtype(layer), plain.exponent(layer), reason))
    return tuple(told)


def explained_lines(found: Explanation) -> Iterator[str]:
    """An explanation as lines of text."""
    scaled = f", weights times 2^{found.exponent}" if found.exponent else ""
    yield f"{found.plan}: {found.layer} in {found.dtype}{scaled}"
    if found.reason:
        yield f"  why: {found.reason}"
    if found.float8 is not None:
        yield f"  inputs are divided by {found.float8.input_scale:.6g}, by {found.float8.method}"
        for choice in found.float8.choices:
            yield f"  choice {choice.method}: scale {choice.scale:.6g}, error {choice.error:.2%}"
    for item in found.evidence:
        yield f"  {item.point}: largest {item.peak:.4g}, 99.9 % within {item.p999:.4g}, {item.calls} calls"


def _told(file: PlanFile, layer: str) -> tuple[Explanation, ...]:
    """What a plan lists of a layer, and for attention of each of its inputs; empty if it lists none."""
    by_name = {entry.layer: entry for entry in file.layers}
    inputs = (f"{layer}.{part}" for part in ATTENTION_INPUTS)
    return tuple(_explained(file.name, by_name[name]) for name in (layer, *inputs) if name in by_name)


def _explained(plan: str, entry: LayerPlan) -> Explanation:
    return Explanation(plan, entry.layer, entry.dtype, entry.exponent, entry.reason, entry.evidence, entry.float8)


def _model(bundle: Bundle) -> Model | None:
    """The architecture of a bundle, from the ONNX graphs of any plan; None for a bundle of only engines."""
    manifest = bundle.manifest
    plans = [plan.name for plan in manifest.plans if all(manifest.has_graph(name, plan.name) for name in NETWORKS)]
    return bundle_model(bundle, plans[0]) if plans else None


def _unknown(layer: str, known: Iterable[str], path: Path) -> UsageError:
    near = difflib.get_close_matches(layer, list(known), _NEAR)
    return UsageError(
        f"`{path}` knows no layer `{layer[:80]}`",
        hint=f"did you mean {', '.join(f'`{name}`' for name in near)}?"
        if near
        else "layers go by their published names, as `layers.3.feed_forward.w2`",
    )
