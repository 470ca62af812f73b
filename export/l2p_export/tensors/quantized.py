"""Reads FP8 weights with their scales; refuses weights that are repacked as integers.

ComfyUI writes `X.weight` as FP8 and `X.scale_weight` (or `X.weight_scale`) beside it, per tensor or per row. Sometimes
the scale of the inputs and a marker tensor are there too. The weight is the stored value times the scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from l2p_export.tensors.files import Weights
from l2p_export.tensors.sources import FileTensor, TensorSource
from l2p_runtime.errors import ArtifactError

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")

_SCALES = (".scale_weight", ".weight_scale")
# Activation scales and markers tell how another program computes; they do not change the weights.
_IGNORED = (".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8")


def with_scales(weights: Weights) -> Weights:
    """Join FP8 weights with their scales, and drop tensors that are not weights.

    Raises:
        ArtifactError: integer weights, or a scale that fits no weight.
    """
    tensors = {name: source for name, source in weights.tensors.items() if not name.endswith(_IGNORED)}
    scales = {name: source for name, source in tensors.items() if name.endswith(_SCALES)}
    for name, scale in scales.items():
        del tensors[name]
        target = _target(name)
        if target not in tensors or scale.dtype not in FLOAT_DTYPES:
            raise ArtifactError(f"`{weights.path}`: scale `{name}` ({scale.dtype}) belongs to no weight `{target}`")
        weight = tensors[target]
        rows = weight.shape[0] if weight.shape else 1
        if scale.shape not in ((), (1,), (1, 1), (rows,), (rows, 1)):
            raise ArtifactError(
                f"`{weights.path}`: scale `{name}` has shape {list(scale.shape)}, "
                f"expected one number or one for each of the {rows} rows of `{target}`"
            )
        tensors[target] = replace(weight, scale=scale)
    _require_float(weights, tensors)
    return replace(weights, tensors=tensors)


def canonical_dtype(source: TensorSource) -> str:
    """The dtype a tensor is written in: its own; for FP8 one that holds it exactly, BF16 or, with a scale, F32."""
    if source.dtype.startswith("F8"):
        scaled = not isinstance(source, FileTensor) or source.scale is not None
        return "F32" if scaled else "BF16"
    return "F32" if source.dtype == "F64" else source.dtype


def _target(scale: str) -> str:
    suffix = next(suffix for suffix in _SCALES if scale.endswith(suffix))
    return scale.removesuffix(suffix) + ".weight"


def _require_float(weights: Weights, tensors: Mapping[str, FileTensor]) -> None:
    wrong = [f"`{name}` ({source.dtype})" for name, source in tensors.items() if source.dtype not in FLOAT_DTYPES]
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise ArtifactError(
            f"`{weights.path}` stores weights that are not floats: {', '.join(wrong[:8])}{more}",
            hint="an integer repack means nothing without the program that made it: fetch the original file, "
            "as model-1k-merge.safetensors or l2p_4k_sft.safetensors",
        )
