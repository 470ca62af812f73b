"""Converts FP16 ONNX graphs to FP8 Q/DQ with one fixed scale: for sizes and memory, not for accuracy."""

from __future__ import annotations

import math
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from l2p_export.graphs.names import published_names
from l2p_runtime.tensorfile import header_bytes, open_tensorfile

_BLOCK_LINEAR = re.compile(r".*\.(attention\.to_(q|k|v|out\.0)|feed_forward\.w[123])\.weight")
_SCALE = 1 / 16
_CHUNK_BYTES = 64 << 20
_DTYPES = {"F32": "<f4", "F16": "<f2"}


def write_float8(graph: Path, weights: Path, folder: Path) -> tuple[Path, Path]:
    """Write an FP8 copy of an ONNX graph and of its weights, in chunks of at most 64 MiB.

    Args:
        graph: the `.onnx` file of an FP16 plan.
        weights: its `.safetensors` file.
        folder: folder of both copies.

    Returns:
        Paths of the ONNX graph and the weights.
    """
    model, source = onnx.load(graph, load_external_data=False), open_tensorfile(weights)
    eighths = {name for name in source.tensors if all(map(_BLOCK_LINEAR.fullmatch, published_names(name)))}
    out = folder / f"{graph.stem}.fp8.safetensors"
    shapes = [(n, "F8_E4M3" if n in eighths else info.dtype, info.shape) for n, info in source.tensors.items()]
    header, places = header_bytes(shapes)
    with weights.open("rb") as read, out.open("wb") as written:
        written.write(header)
        for name, info in source.tensors.items():
            read.seek(info.offset)
            left = math.prod(info.shape) * np.dtype(_DTYPES[info.dtype]).itemsize
            while left:
                block = read.read(min(left, _CHUNK_BYTES))
                left -= len(block)
                written.write(_rounded(block) if name in eighths else block)
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            info = places[tensor.name]
            size = math.prod(info.shape) * (1 if tensor.name in eighths else np.dtype(_DTYPES[info.dtype]).itemsize)
            del tensor.external_data[:]
            for key, value in (("location", out.name), ("offset", info.offset), ("length", size)):
                tensor.external_data.add(key=key, value=str(value))
            if tensor.name in eighths:
                tensor.data_type = TensorProto.FLOAT8E4M3FN
    _quantize(model, eighths)
    path = folder / f"{graph.stem}.fp8.onnx"
    onnx.save(model, path)
    return path, out


def _rounded(block: bytes) -> bytes:
    values = np.frombuffer(block, "<f2").astype(np.float32) / np.float32(_SCALE)
    return np.clip(values, -448, 448).astype(ml_dtypes.float8_e4m3fn).tobytes()


def _quantize(model: onnx.ModelProto, eighths: set[str]) -> None:
    """Insert Q/DQ at the input of each linear layer and DQ at its weight, with one scale for all."""
    model.graph.initializer.append(numpy_helper.from_array(np.array(_SCALE, np.float16), "l2p/scale"))
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in eighths:
            value, weight, name = node.input[0], node.input[1], node.output[0]
            kind = {"output_dtype": TensorProto.FLOAT8E4M3FN, "precision": TensorProto.FLOAT}
            nodes += [
                helper.make_node("QuantizeLinear", [value, "l2p/scale"], [f"{name}/q"], **kind),
                helper.make_node("DequantizeLinear", [f"{name}/q", "l2p/scale"], [f"{name}/dq"]),
                helper.make_node("DequantizeLinear", [weight, "l2p/scale"], [f"{name}/weight"]),
            ]
            node.input[0], node.input[1] = f"{name}/dq", f"{name}/weight"
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
