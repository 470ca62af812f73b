"""Joins FP8 weights with their scales; refuses other quantized layouts by name.

A scale is stored beside its weight, under one of several names: `X.scale_weight` and `X.weight_scale` (ComfyUI,
Model-Optimizer), `X.weight_scale_inv` (DeepSeek, transformers), `X.scale` (DeepSeek). All of them multiply the stored
values. Scales of inputs and markers may be there too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

from l2p_export.tensors.files import Weights
from l2p_export.tensors.foreign_layouts import MARKER, comfy_formats, unreadable_layout
from l2p_export.tensors.sources import FileTensor, TensorSource
from l2p_export.tensors.values import FLOAT_DTYPES, Scales, scales_of
from l2p_runtime.errors import ArtifactError

_SCALES = (".scale_weight", ".weight_scale", ".weight_scale_inv")
_SCALE_DTYPES = (*FLOAT_DTYPES, "F8_E8M0", "U8")
# Activation scales and markers tell how another program computes; they do not change the weights. `.weight_scalar` is
# one scale for cards without the blocks of MXFP8.
_IGNORED = (".scale_input", ".input_scale", MARKER, "scaled_fp8", ".weight_scalar")


def with_scales(weights: Weights) -> Weights:
    """Join FP8 weights with their scales, and drop tensors that are not weights.

    Raises:
        ArtifactError: a quantized layout that is not read, integer weights, or a scale that fits no weight.
    """
    refuse_layout(weights)
    is_swizzled = "mxfp8" in {name.removeprefix("hybrid_") for name in comfy_formats(weights.tensors, weights.metadata)}
    tensors = {name: source for name, source in weights.tensors.items() if not name.endswith(_IGNORED)}
    joined: dict[str, str] = {}
    for name, scale in weights.tensors.items():
        target = _target(name, tensors)
        if not target or name not in tensors:
            continue
        del tensors[name]
        if target not in tensors or scale.dtype not in _SCALE_DTYPES:
            raise ArtifactError(f"`{weights.path}`: scale `{name}` ({scale.dtype}) belongs to no weight `{target}`")
        if target in joined:
            raise ArtifactError(f"`{weights.path}`: `{joined[target]}` and `{name}` are both the scale of `{target}`")
        joined[target] = name
        tensors[target] = replace(
            tensors[target], scale=_scales(weights, tensors[target], scale, is_swizzled=is_swizzled)
        )
    _require_float(weights, tensors)
    return replace(weights, tensors=tensors)


def refuse_layout(weights: Weights) -> None:
    """Refuse weights in a quantized layout that is not read.

    Raises:
        ArtifactError: the message names the layout, the hint what converts it.
    """
    layout = unreadable_layout(weights.tensors, weights.metadata)
    if layout is not None:
        raise ArtifactError(
            f"`{weights.path}` is quantized as {layout.name} (it has `{layout.tensor}`), which is not read",
            hint=layout.conversion,
        )


def quantization(tensors: Iterable[TensorSource]) -> Mapping[str, int]:
    """How many weights are stored in each way of FP8, as `F8_E4M3, one scale per 128 x 128 block`."""
    found: Counter[str] = Counter()
    for source in tensors:
        if isinstance(source, FileTensor) and (source.scale is not None or source.dtype.startswith("F8")):
            scale = "no scale" if source.scale is None else f"one scale per {source.scale.kind}"
            found[f"{source.dtype}, {scale}"] += 1
    return dict(sorted(found.items()))


def canonical_dtype(source: TensorSource) -> str:
    """The dtype a tensor is written in: its own; for FP8 one that holds it exactly, BF16 or, with a scale, F32."""
    if source.dtype.startswith("F8"):
        is_scaled = not isinstance(source, FileTensor) or source.scale is not None
        return "F32" if is_scaled else "BF16"
    return "F32" if source.dtype == "F64" else source.dtype


def _target(name: str, tensors: Mapping[str, FileTensor]) -> str:
    """The weight that a scale belongs to; empty if the name is no scale's. Only FP8 weights have `X.scale`."""
    for suffix in _SCALES:
        if name.endswith(suffix):
            return name.removesuffix(suffix) + ".weight"
    target = name.removesuffix(".scale") + ".weight"
    is_scale = name.endswith(".scale") and target in tensors and tensors[target].dtype.startswith("F8")
    return target if is_scale else ""


def _scales(weights: Weights, weight: FileTensor, scale: FileTensor, *, is_swizzled: bool) -> Scales:
    parts = 3 if ".qkv." in weight.info.name else 1
    found = scales_of(scale.file, scale.info, weight.info, swizzled=is_swizzled, parts=parts)
    if found is None:
        rows = weight.shape[0] if weight.shape else 1
        raise ArtifactError(
            f"`{weights.path}`: scale `{scale.info.name}` has shape {list(scale.shape)}, expected one number, one for "
            f"each of the {rows} rows of `{weight.info.name}` {list(weight.shape)}, or one for each block of a power "
            "of two up to 256 rows and columns",
            hint="fetch the file again, or another one: shapes do not say what these scales multiply",
        )
    return found


def _require_float(weights: Weights, tensors: Mapping[str, FileTensor]) -> None:
    wrong = [f"`{name}` ({source.dtype})" for name, source in tensors.items() if source.dtype not in FLOAT_DTYPES]
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise ArtifactError(
            f"`{weights.path}` stores weights that are not floats: {', '.join(wrong[:8])}{more}",
            hint="an integer repack means nothing without the program that made it: fetch the original file, "
            "as model-1k-merge.safetensors or l2p_4k_sft.safetensors",
        )
