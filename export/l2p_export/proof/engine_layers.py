"""What an opened engine computes in, layer by layer, beside what its plan says (docs/design.md, "Read-back").

A library shows the layers that it kept, and of what it fused the borders alone. So a dtype that is shown proves that
the plan reached the kernels, and one that is not proves something only where every layer is listed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

from l2p_calib.plans.plan import PLANS
from l2p_runtime.backends.trt_layers import LayerPrecision
from l2p_runtime.contract import LedgerEntry, PlanRef, build_comparison, target_from_spelling

CASE = "layer precision"
"""What the ledger calls the reading of an engine's layers."""

HANDFUL = 8
"""So few layers may be the borders of one fused region, and tell nothing of what is inside."""

_FLOATS = ("float4_e2m1fn", "float8_e4m3fn", "bfloat16", "float16", "float32")
"""From the narrowest."""
_OTHERS = ("int64", "int32", "int8", "uint8", "bool")


def judge_layers(network: str, plan: PlanRef, target: str, layers: Sequence[LayerPrecision]) -> LedgerEntry:
    """Compare the dtypes that an engine's layers output with its plan's.

    Args:
        network: the engine's.
        plan: the engine's.
        target: the engine's, as `rtx1.7-sm89`.
        layers: as the library tells them.

    Returns:
        How many layers output which dtype. Passed where one outputs the plan's narrowest dtype, in a float32 plan where
        all layers are listed and none outputs another. Failed where all are listed, and none outputs a dtype of the
        plan but float32: the library fell back. Not run where the layers do not tell.
    """
    status, reason = _judge(PLANS[plan.base].dtypes, target, layers)
    return LedgerEntry(build_comparison(plan.name, target), network, CASE, status, reason)


def layers_not_read(network: str, plan: str, target: str) -> LedgerEntry:
    """The entry of an engine that no stored case was run on, and that was not opened for its layers alone."""
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
    """Whether each layer stands for itself: each is told in full, and they are more than a handful.

    TensorRT for RTX compiles whole regions and lists their borders as if these were layers; it is not asked.
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
