"""Names the quantized layouts that are not read, from tensor names and dtypes, and says what converts them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from l2p_export.tensors.sources import FileTensor

Tensors = Mapping[str, "FileTensor"]

MARKER = ".comfy_quant"
"""Suffix of the tensors in which ComfyUI stores how a layer is quantized, as JSON text."""

_MARKER_BYTES_MAX = 1 << 12
_METADATA_KEY = "_quantization_metadata"
_ORIGINAL = "fetch the BF16 or FP8 file of the model instead"


class Layout(NamedTuple):
    """A quantized layout that is not read.

    Attributes:
        name: as its makers call it.
        tensor: a tensor that tells it.
        conversion: what makes a file of it that is read.
    """

    name: str
    tensor: str
    conversion: str


def unreadable_layout(tensors: Tensors, metadata: Mapping[str, str]) -> Layout | None:
    """The layout of a file that holds more than floats with scales; None if it holds no known one."""
    for name, pattern, is_meant, conversion in _NAMED:
        matcher = re.compile(pattern)
        found = next((tensor for tensor in tensors if matcher.search(tensor)), None)
        if found is not None and is_meant(tensors):
            return Layout(name, found, conversion)
    packed = _packed_floats(tensors)
    if packed is not None:
        return packed
    markers = [(found, marker) for found, marker in _markers(tensors, metadata) if marker.get("convrot")]
    if markers:
        return Layout(f"{markers[0][1].get('format')} with rotated columns (ConvRot)", markers[0][0], _COMFY)
    return _scaled_integers(tensors, metadata)


def comfy_formats(tensors: Tensors, metadata: Mapping[str, str]) -> set[str]:
    """The formats that ComfyUI states for the layers of a file, such as `mxfp8`."""
    return {str(marker.get("format")) for _, marker in _markers(tensors, metadata)}


_COMFY = (
    "dequantize each layer with comfy-kitchen (pip install comfy-kitchen) and save the weights as BF16, or fetch the "
    "BF16 or FP8 file of the model instead"
)
_NVFP4 = (
    "dequantize each layer by comfy_kitchen.dequantize_nvfp4(weight, weight_scale_2, weight_scale) "
    "(pip install comfy-kitchen) and save the weights as BF16, or fetch the BF16 or FP8 file of the model instead"
)
_DIFFUSERS = "load it with diffusers, call `dequantize()` on the model, then `save_pretrained`; or " + _ORIGINAL

_LIBRARY = "load it with that library, call `dequantize()` on each weight and save them as BF16; or " + _ORIGINAL


def _always(tensors: Tensors) -> bool:
    return bool(tensors)


def _has(pattern: str) -> Callable[[Tensors], bool]:
    return lambda tensors: any(re.search(pattern, name) for name in tensors)


def _packs_outputs(tensors: Tensors) -> bool:
    """AWQ packs 8 outputs in a number, GPTQ 8 inputs; both have scales [groups, out]."""
    for name, tensor in tensors.items():
        scales = tensors.get(name.removesuffix(".qweight") + ".scales")
        if name.endswith(".qweight") and scales is not None and len(tensor.shape) == len(scales.shape) == 2:
            return tensor.shape[1] < scales.shape[1]
    return False


# The first that fits counts, so what tells two layouts apart stands in the earlier one.
_NAMED: tuple[tuple[str, str, Callable[[Tensors], bool], str], ...] = (
    ("SVDQuant (nunchaku)", r"\.(?:wscales|wcscales|wtscale|smooth_factor)$", _always, _ORIGINAL),
    ("GPTQ", r"\.g_idx$", _has(r"\.qweight$"), _ORIGINAL),
    ("AWQ", r"\.qweight$", _packs_outputs, _ORIGINAL),
    ("GPTQ", r"\.qweight$", _has(r"\.qzeros$|\.scales$"), _ORIGINAL),
    ("bitsandbytes NF4", r"\.quant_state\.bitsandbytes__nf4$", _always, _DIFFUSERS),
    ("bitsandbytes FP4", r"\.quant_state\.bitsandbytes__fp4$", _always, _DIFFUSERS),
    ("bitsandbytes LLM.int8()", r"\.SCB$", _always, _DIFFUSERS),
    ("bitsandbytes 4-bit", r"\.weight\.(?:absmax|quant_map)$", _always, _DIFFUSERS),
    ("optimum-quanto", r"\.weight\._(?:data|scale|packed)$", _always, _LIBRARY),
    ("torchao", r"\._\w+_(?:qdata|scale|zero_point)$|:_data$", _always, _LIBRARY),
    ("compressed-tensors NVFP4", r"\.weight_global_scale$", _has(r"\.weight_packed$"), _ORIGINAL),
    ("compressed-tensors", r"\.weight_packed$", _always, _ORIGINAL),
    ("HQQ", r"\.W_q$", _always, _ORIGINAL),
    ("SDNQ", r"\.svd_(?:up|down)$", _has(r"\.scale$"), _ORIGINAL),
    ("MXFP4", r"_blocks$", _has(r"_scales$"), _ORIGINAL),
)  # fmt: skip


def _packed_floats(tensors: Tensors) -> Layout | None:
    """Floats of 4 and 6 bits: NVFP4 has FP8 scales of 16 values and one of the tensor, MXFP4 has E8M0 scales of 32."""
    for name, tensor in tensors.items():
        layer = name.removesuffix(".weight")
        scale = tensors.get(f"{layer}.weight_scale")
        is_packed = tensor.dtype == "F4" or (tensor.dtype == "U8" and scale is not None and name.endswith(".weight"))
        if tensor.dtype.startswith("F6_"):
            return Layout(f"FP6 ({tensor.dtype})", name, _ORIGINAL)
        if is_packed and (f"{layer}.weight_scale_2" in tensors or (scale is not None and scale.dtype == "F8_E4M3")):
            return Layout("NVFP4", name, _NVFP4)
        if is_packed and scale is not None and scale.dtype in ("U8", "F8_E8M0"):
            return Layout("MXFP4", name, _ORIGINAL)
        if tensor.dtype == "F4":
            return Layout("FP4 (F4)", name, _ORIGINAL)
    return None


def _scaled_integers(tensors: Tensors, metadata: Mapping[str, str]) -> Layout | None:
    """Integers with scales, as ComfyUI and SDNQ write them."""
    for name, tensor in tensors.items():
        layer = name.removesuffix(".weight")
        if layer == name or tensor.dtype not in ("I8", "U8", "I16", "I32"):
            continue
        if any(f"{layer}{suffix}" in tensors for suffix in (".weight_scale", ".scale_weight", ".scale")):
            formats = sorted(comfy_formats(tensors, metadata))
            stated = f", {formats[0]}" if formats else ""
            return Layout(f"{tensor.dtype} with scales{stated}", name, _COMFY if formats else _ORIGINAL)
    return None


def _markers(tensors: Tensors, metadata: Mapping[str, str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """What ComfyUI states of each layer: in a tensor of JSON text beside the weight, or in the file's metadata."""
    for name, tensor in tensors.items():
        if name.endswith(MARKER) and tensor.dtype in ("U8", "I8") and tensor.info.size_bytes <= _MARKER_BYTES_MAX:
            yield from ((name, each) for each in _objects(tensor.file.read(tensor.info.name).tobytes()))
    for stated in _objects(metadata.get(_METADATA_KEY, "{}")):
        layers = stated.get("layers")
        if isinstance(layers, dict):
            yield from ((str(layer), each) for layer, each in layers.items() if isinstance(each, dict))


def _objects(text: str | bytes) -> Iterator[Mapping[str, Any]]:
    """The JSON object of a text; nothing if the text is none."""
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        return
    if isinstance(parsed, dict):
        yield parsed
