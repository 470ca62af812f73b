"""Compares the dtypes of an opened engine's layers with its plan (docs/design.md, "Read-back").

A library lists the layers that it kept, and only the boundary tensors of fused regions. So a listed dtype proves that
the plan reached the kernels. A missing dtype proves something only if every layer is listed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

from l2p_calib.plans.plan import PLANS
from l2p_runtime.backends.trt_layers import LayerPrecision
from l2p_runtime.contract import LedgerEntry, PlanRef, build_comparison, target_from_spelling

CASE = "layer precision"
"""Name of the case under which the ledger lists the dtypes of an engine's layers."""

HANDFUL = 8
"""Up to this many layers may be the boundary tensors of one fused region, and tell nothing of its inside."""

_FLOATS = ("float4_e2m1fn", "float8_e4m3fn", "bfloat16", "float16", "float32")
"""Narrowest first."""
_OTHERS = ("int64", "int32", "int8", "uint8", "bool")


def judge_layers(network: str, plan: PlanRef, target: str, layers: Sequence[LayerPrecision]) -> LedgerEntry:
    """Compare the dtypes that an engine's layers output with its plan's.

    Args:
        network: network of the engine.
        plan: plan of the engine.
        target: target of the engine, as `rtx1.7-sm89`.
        layers: layers of the engine, as the library lists them.

    Returns:
        An entry that says how many layers output which dtype. Passed if a layer outputs the plan's narrowest dtype; for
        a float32 plan, if all layers are listed and none outputs another float dtype. Failed if all layers are listed
        and none outputs a dtype of the plan other than float32: the library fell back. Otherwise not run.
    """
    status, reason = _judge(PLANS[plan.base].dtypes, target, layers)
    return LedgerEntry(build_comparison(plan.name, target), network, CASE, status, reason)


def layers_not_read(network: str, plan: str, target: str) -> LedgerEntry:
    """The entry of an engine that no stored case was run on; `verify` does not open an engine only for its layers."""
    reason = "no stored case was run on this engine, and it was not opened"
    return LedgerEntry(build_comparison(plan, target), network, CASE, "not run", reason)


def _judge(
    dtypes: Sequence[str], target: str, layers: Sequence[LayerPrecision]
) -> tuple[Literal["passed", "failed", "not run"], str]:
    counts = Counter(dtype for layer in layers for dtype in set(layer.outputs))
    found = [dtype for dtype in _FLOATS if counts[dtype]]
    told = _counted(layers, counts)
    if not found:
        return "not run", f"the library tells no layer's precision: {told}"
    wanted = [dtype for dtype in _FLOATS if dtype in dtypes]
    is_listed = target_from_spelling(target).backend == "tensorrt" and _all_listed(layers)
    if wanted == ["float32"]:
        if is_listed and found == wanted:
            return "passed", told
        return "not run", f"these layers do not tell that all is computed in float32: {told}"
    if wanted[0] in found:
        return "passed", told
    if is_listed and not set(found) & set(wanted) - {"float32"}:
        return "failed", f"no layer outputs {wanted[0]}, as the plan says: {told}"
    return "not run", f"no layer that the library shows outputs {wanted[0]}: {told}"


def _all_listed(layers: Sequence[LayerPrecision]) -> bool:
    """Whether the list has all layers: each has a kind and known dtypes, and there are more than a handful.

    Not for TensorRT for RTX, which compiles whole regions and lists their boundary tensors as if they were layers.
    """
    computing = [layer for layer in layers if not set(_FLOATS).isdisjoint(layer.outputs)]
    known = {*_FLOATS, *_OTHERS}
    return len(computing) > HANDFUL and all(layer.kind and known.issuperset(layer.outputs) for layer in layers)


def _counted(layers: Sequence[LayerPrecision], counts: Counter[str]) -> str:
    """`float16 in 41 layers, float32 in 6; 2 of 49 tell nothing`."""
    known = [dtype for dtype in (*_FLOATS, *_OTHERS) if counts[dtype]]
    parts = [f"{dtype} in {counts[dtype]}" for dtype in known]
    silent = sum(set(known).isdisjoint(layer.outputs) for layer in layers)
    text = ", ".join(parts)
    if silent or not parts:
        text += f"{'; ' if parts else ''}{silent} of {len(layers)} tell nothing"
    return f"layers output {text}" if parts else text
