"""Reads the precision of an engine back after its build, as far as this machine can (docs/design.md, "Read-back").

Without a GPU an engine cannot be opened. Its size shows how many bytes its weights take, so a build that widened or
narrowed them is found. The precision that its kernels compute in stays unverified.
"""

from __future__ import annotations

from l2p_engines.builders.request import EngineSpec
from l2p_engines.forecast.calls import ENGINE_KERNEL_BYTES
from l2p_runtime.contract import LedgerEntry, build_comparison
from l2p_runtime.errors import ParityError

WEIGHT_BYTES_THRESHOLD = 0.02
"""Maximum relative difference of an engine without its kernels from its weights: 0.2 % for 11.69 GB of float16 and
0.5 % for 5.85 GB of float8 (docs/design.md, "TensorRT facts"); a wrong dtype makes 50 % or more."""

_UNVERIFIED = "compute precision not verified: that needs a GPU that opens the engine"


def read_back(spec: EngineSpec, weight_bytes: int, engine_bytes: int) -> LedgerEntry:
    """Compare the size of an engine with the size of its weights.

    Args:
        spec: the engine that was built.
        weight_bytes: of the ONNX graph's weights.
        engine_bytes: of the engine's file.

    Returns:
        The comparison; "not run" for networks so small that kernels hide their weights.

    Raises:
        ParityError: the weights are stored in another precision than the graph's.
    """
    comparison = build_comparison(spec.plan, spec.target.spelling)
    network, case = spec.network.name, "weight bytes"
    kernel_bytes = ENGINE_KERNEL_BYTES * len(spec.profiles)
    if 2 * kernel_bytes > weight_bytes:
        reason = f"{_UNVERIFIED}; kernels hide weights of {weight_bytes:,} bytes"
        return LedgerEntry(comparison, network, case, "not run", reason)
    extra_bytes = engine_bytes - weight_bytes
    relative = max(extra_bytes - kernel_bytes, -extra_bytes, 0) / weight_bytes
    if relative > WEIGHT_BYTES_THRESHOLD:
        raise ParityError(
            f"the engine `{spec.label}` has {engine_bytes:,} bytes, its graph's weights {weight_bytes:,}: the library "
            "stored them in another precision, or stored equal weights once",
            hint="build again with another version of the library; engines of constant weights cannot be read back",
        )
    reason = f"{_UNVERIFIED}; weights are stored in the graph's precision"
    return LedgerEntry(
        comparison, network, case, "passed", reason, threshold=WEIGHT_BYTES_THRESHOLD, relative=round(relative, 6)
    )
