"""Reads the dtypes that an engine's layers compute in from its library's inspector."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from l2p_runtime.backends.trt_runtime import Module


@dataclass(frozen=True, slots=True)
class LayerPrecision:
    """One layer of an engine, as far as the library tells.

    Attributes:
        name: the library's, which joins the names of fused layers.
        kind: what it does; empty when not told.
        outputs: dtypes of its outputs as `float16`, the library's own words where they are unknown; empty when not
            told, as in engines that were built to keep only names.
    """

    name: str
    kind: str = ""
    outputs: tuple[str, ...] = ()


def read_layers(module: Module, engine: Any) -> tuple[LayerPrecision, ...]:
    """The dtypes that an opened engine computes in, layer by layer.

    Args:
        module: the library.
        engine: its own engine object.

    Returns:
        The layers in order; empty when the library tells nothing that can be read.
    """
    inspector = engine.create_engine_inspector()
    if inspector is None:
        return ()
    return parse_layers(inspector.get_engine_information(module.LayerInformationFormat.JSON))


def parse_layers(text: str) -> tuple[LayerPrecision, ...]:
    """The layers in an engine inspector's JSON: objects, or mere names in engines built without detail."""
    try:
        told = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return ()
    layers = told.get("Layers") if isinstance(told, dict) else told
    if not isinstance(layers, list):
        return ()
    return tuple(layer for layer in map(_parse_layer, layers) if layer is not None)


def _parse_layer(layer: Any) -> LayerPrecision | None:
    if isinstance(layer, str):
        return LayerPrecision(layer)
    if not isinstance(layer, dict) or not isinstance(layer.get("Name"), str):
        return None
    outputs = layer.get("Outputs")
    kind = layer.get("LayerType")
    return LayerPrecision(
        layer["Name"],
        kind if isinstance(kind, str) else "",
        tuple(_dtype_of(output) for output in outputs) if isinstance(outputs, list) else (),
    )


_SPOKEN_DTYPES = (
    ("bfloat16", r"\bBF16\b|bfloat16"),
    ("float16", r"\bFP16\b|\bhalf\b|float16"),
    ("float8_e4m3fn", r"\bFP8\b|E4M3|float8"),
    ("float4_e2m1fn", r"\bFP4\b|E2M1|float4"),
    ("float32", r"\bFP32\b|\bTF32\b|\bfloat(?:32)?\b"),
    ("int64", r"\bint64\b"),
    ("int32", r"\bint32\b"),
    ("int8", r"\bint8\b"),
    ("uint8", r"\buint8\b"),
    ("bool", r"\bbool"),
)
"""How the libraries speak of dtypes in descriptions such as `Row major linear FP16 format`."""


def _dtype_of(output: Any) -> str:
    """The dtype of one output; the text that should hold it where it is none that is known."""
    if not isinstance(output, dict):
        return ""
    told = [str(value) for key, value in output.items() if re.search(r"data ?type|format", str(key), re.IGNORECASE)]
    text = " ".join(told)
    return next((name for name, pattern in _SPOKEN_DTYPES if re.search(pattern, text, re.IGNORECASE)), text)
