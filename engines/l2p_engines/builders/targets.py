"""Targets of engines: backend, version of its library, compute capability; written `rtx1.7-sm89`.

On the command line the version is left out: `rtx-sm89,rtx-sm120`, `portable`, `this`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from l2p_engines.builders.trt import first_gpu, library_version
from l2p_runtime.contract import (
    CAPABILITIES,
    LIBRARY_TITLES,
    PORTABLE,
    EngineBackend,
    Target,
    engine_backend,
    require_capability,
)
from l2p_runtime.errors import UsageError, counted

THIS = "this"
"""The GPU in this machine."""

_SPELLING = re.compile(r"(rtx|tensorrt)([0-9]+\.[0-9]+)?-(sm[0-9]{2,3}|portable)")
_LEAST = {"bfloat16": 80, "float8_e4m3fn": 89}
"""Minimum compute capability of a dtype; dtypes that are not listed run everywhere."""
_NO_FLOAT32_PRODUCTS = {("rtx", "sm75")}
"""Backend and capability that build float32 convolutions, but no float32 matrix product."""
_SPOKEN = {"bfloat16": "BF16", "float8_e4m3fn": "FP8"}


def parse_targets(
    text: str,
    this_backend: EngineBackend = "rtx",
    version: Callable[[EngineBackend], str] = library_version,
) -> tuple[Target, ...]:
    """Read the value of `--target`: one target or several by comma. Repeated ones are dropped.

    Args:
        text: as `rtx-sm89,rtx-sm120`, `portable` or `this`; a version may be named, and must be the installed one.
        this_backend: which library `this` means.
        version: the first two numbers of an installed library's version.

    Raises:
        UsageError: no such target, or a capability that the library does not build for.
        HostError: the library is not installed; or `this`, and there is no GPU.
    """
    parts = [part.strip().lower() for part in text.split(",")]
    if not all(parts):
        raise UsageError(f"--target {text[:80]!r} names no target", hint=_spellings_hint())
    return tuple(dict.fromkeys(_parse(part, this_backend, version) for part in parts))


def runs(target: Target, dtype: str) -> bool:
    """Whether a target computes in a dtype.

    A portable target does so for every dtype: an FP8 build with no capability set succeeds, and the GPU decides.
    """
    if target.compute_capability == PORTABLE:
        return True
    return int(target.compute_capability.removeprefix("sm")) >= _LEAST.get(dtype, 0)


def require_dtypes(target: Target, dtypes: Iterable[str]) -> None:
    """Refuse a dtype that a target's GPUs do not compute in, before anything is built.

    Args:
        target: target of the engine.
        dtypes: of its graph, as `float16` or `float8_e4m3fn`.

    Raises:
        UsageError: names what has it.
    """
    for dtype in sorted(set(dtypes)):
        if not runs(target, dtype):
            spoken = _SPOKEN[dtype]
            have = [name for name in CAPABILITIES[target.backend] if int(name[2:]) >= _LEAST[dtype]]
            have += [PORTABLE] if target.backend == "rtx" else []
            raise UsageError(
                f"target {target.spelling} does not compute in {spoken}; "
                f"of {target.backend} targets, {', '.join(have)} do",
                hint=f"choose one of these, or another precision for {target.spelling}",
            )


def multiplies_float32(target: Target) -> bool:
    """Whether a target has matrix products in float32; TensorRT for RTX has none for Turing, only convolutions."""
    return (target.backend, target.compute_capability) not in _NO_FLOAT32_PRODUCTS


def require_float32_products(target: Target, plan: str, layers: Sequence[str]) -> None:
    """Refuse linear layers in float32 for a target that cannot multiply them, before anything is traced.

    Args:
        target: target of the engine.
        plan: name of the precision plan.
        layers: linear layers over tokens that the plan computes in float32. Layers that multiply one row per image are
            no matrix products, and build.

    Raises:
        UsageError: there are any, and the target has no such product.
    """
    if layers and not multiplies_float32(target):
        more = f" and {counted(len(layers) - 1, 'more layer')}" if len(layers) > 1 else ""
        raise UsageError(
            f"target {target.spelling} has no matrix products in FP32, in which plan `{plan}` computes "
            f"`{layers[0]}`{more}",
            hint="use a plan that leaves them in float16, as --precision fp16 does where no value exceeds it; or leave "
            "the target out, and run the ONNX graphs on that GPU with --backend onnx-cuda",
        )


def _parse(part: str, this_backend: EngineBackend, version: Callable[[EngineBackend], str]) -> Target:
    if part == THIS:
        gpu = first_gpu(f"target `{THIS}` is the GPU of this machine")
        require_capability(this_backend, gpu.capability, f"{gpu.name} is {gpu.capability}: ")
        return Target(this_backend, version(this_backend), gpu.capability)
    match = _SPELLING.fullmatch(f"rtx-{PORTABLE}" if part == PORTABLE else part)
    if match is None:
        raise UsageError(f"there is no target {part[:80]!r}", hint=_spellings_hint())
    backend = engine_backend(match[1])
    require_capability(backend, match[3])
    installed = version(backend)
    if match[2] not in (None, installed):
        raise UsageError(
            f"target {part} is for version {match[2]}, the installed {LIBRARY_TITLES[backend]} is {installed}",
            hint=f"write it as {backend}-{match[3]}, or install version {match[2]}",
        )
    return Target(backend, installed, match[3])


def _spellings_hint() -> str:
    known = "; ".join(f"{backend}-{{{','.join(names)}}}" for backend, names in CAPABILITIES.items())
    return f"targets are {known}; {PORTABLE}; {THIS}"
