"""Writes safetensors files with any dtype, also those that the `safetensors` library here does not know."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Raw = tuple[str, tuple[int, ...], bytes]
"""Dtype as the format spells it, shape, and the values' bytes."""

_NAMES = {
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ", "float8_e8m0fnu": "F8_E8M0", "uint8": "U8",
    "int8": "I8", "int32": "I32", "int64": "I64",
}  # fmt: skip


def raw(array: NDArray[np.generic], dtype: str = "") -> Raw:
    """An array as it is stored, under its own dtype or as the one given."""
    return dtype or _NAMES[str(array.dtype)], array.shape, np.ascontiguousarray(array).tobytes()


def write_raw(
    path: Path, tensors: Mapping[str, Raw | NDArray[np.generic]], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write tensors one behind the other."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    data = b""
    for name, tensor in tensors.items():
        dtype, shape, values = tensor if isinstance(tensor, tuple) else raw(tensor)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(data), len(data) + len(values)]}
        data += values
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def marker(**facts: object) -> Raw:
    """What ComfyUI stores beside a quantized layer: JSON text."""
    text = json.dumps(facts).encode()
    return "U8", (len(text),), text


def e4m3(values: NDArray[np.float32]) -> NDArray[np.generic]:
    """Values rounded to E4M3."""
    return values.astype(ml_dtypes.float8_e4m3fn)
