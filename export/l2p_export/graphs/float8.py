"""Adds FP8 to traced graphs: a Q/DQ pair quantizes an input, weights are stored as E4M3 and dequantized by a DQ.

    MatMul(x, W)  becomes  MatMul(DQ(Q(x, s)), DQ(W8, S))     s per tensor, S per output channel
    Attention(q, k, v)  becomes  Attention(DQ(Q(q, s1)), DQ(Q(k, s2)), DQ(Q(v, s3)))

Engine libraries recognize these nodes and multiply FP8 numbers. Scales are float16 like the dequantized values (ONNX
Runtime takes no other). They are stored with the weights; a trace has neither.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import onnx_ir as ir

from l2p_calib.fp8 import channel_scales, float16_scale
from l2p_export.graphs.names import SCALE, SUFFIX, published_names
from l2p_export.tensors.sources import ArrayTensor, DividedTensor, JoinedTensor, TransposedTensor
from l2p_runtime.errors import InternalError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from l2p_export.tensors.sources import TensorSource

_AXIS = 1
"""Output channels of weights [in,out]."""


def round_inputs(model: ir.Model, reads: Mapping[str, str]) -> None:
    """Mark the weights of FP8 linear layers and quantize their inputs, in place; must run before `join_products`.

    Layers that read the same value at the same point share a Q/DQ pair, so that they can still be joined.

    Args:
        model: a traced graph whose weights are stored transposed.
        reads: published name of each weight in FP8 to the point that it reads, as `layers.3.attention.to_q:in`.
    """
    rounded: dict[tuple[ir.Value, str], ir.Value] = {}
    for node in list(model.graph):
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        point = reads.get((weight.name or "").removesuffix(SUFFIX)) if weight is not None else None
        value = node.inputs[0] if point is not None else None
        if weight is None or point is None or value is None:
            continue
        weight.type = ir.TensorType(ir.DataType.FLOAT8E4M3FN)
        if (value, point) not in rounded:
            rounded[value, point] = _rounded(model.graph, value, point, node)
        node.replace_input_with(0, rounded[value, point])


def round_attention(model: ir.Model, reads: Mapping[str, Sequence[str]]) -> None:
    """Quantize query, key and value of attention, in place; must run before `join_products`.

    Args:
        model: a traced graph of opset 23, whose weights are stored transposed.
        reads: published name of the weight that makes the values, to the points of query, key and value in this order.

    Raises:
        InternalError: the graph has no `Attention` that reads the values of a weight.
    """
    left = dict(reads)
    for node in list(model.graph):
        points = left.pop(_values_from(node), ()) if node.op_type == "Attention" else ()
        for index, point in enumerate(points):
            value = node.inputs[index]
            assert value is not None  # noqa: S101 - attention has three inputs
            node.replace_input_with(index, _rounded(model.graph, value, point, node))
    if left:
        raise InternalError(f"graph `{model.graph.name}` has no Attention that reads what `{min(left)}` makes")


def decode_weights(model: ir.Model) -> None:
    """Insert a DequantizeLinear for each FP8 weight, in place; must run after `join_products`."""
    for node in list(model.graph):
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is None or weight.dtype != ir.DataType.FLOAT8E4M3FN or weight.shape is None:
            continue
        made = node.inputs[0].type if node.inputs[0] is not None else None
        scale = _scale(model.graph, f"{weight.name}{SCALE}", made, (weight.shape[_AXIS],))
        axis = [ir.AttrInt64("axis", _AXIS)]
        decode = ir.Node("", "DequantizeLinear", [weight, scale], axis, name=f"{weight.name}/dequantize")
        _describe(decode, weight.shape, made)
        model.graph.insert_before(node, decode)
        node.replace_input_with(1, decode.outputs[0])


def float8_sources(
    names: Sequence[str], parts: Mapping[str, Sequence[TensorSource]], input_scales: Mapping[str, float]
) -> dict[str, TensorSource]:
    """The tensors that an ONNX graph stores for FP8: weights divided by their scales, and all scales.

    Args:
        names: names of FP8 weights and of scales in the graph.
        parts: weight in the graph, to the published tensors [out,in] that it joins, scaled by their exponents.
        input_scales: point to the scale of its values, exponents included.

    Returns:
        Name in the graph to tensor: weights [in,out] and their scales [out], input scales [].

    Raises:
        ArtifactError: a scale exceeds float16.
    """
    found: dict[str, TensorSource] = {}
    for name, tensors in parts.items():
        joined = tensors[0] if len(tensors) == 1 else JoinedTensor(tuple(tensors))
        scales = channel_scales(row_peaks(joined))
        found[name] = TransposedTensor(DividedTensor(joined, scales))
        found[f"{name}{SCALE}"] = ArrayTensor(scales)
    for name in names:
        if name not in found:
            found[name] = ArrayTensor(_stored_scale(input_scales[name.removesuffix(SCALE)]))
    return found


def is_float8(name: str, dtype: ir.DataType | None) -> bool:
    """Whether an initializer is an FP8 weight or a scale."""
    return name.endswith(SCALE) or dtype == ir.DataType.FLOAT8E4M3FN


def weight_parts(name: str) -> list[str]:
    """The published names of a weight as the graph stores it; empty for a scale."""
    return [] if name.endswith(SCALE) else published_names(name)


def row_peaks(source: TensorSource) -> NDArray[np.float32]:
    """The maximum magnitude of each row of a matrix [out,in], as float32 [out]; NaN for a row that holds NaN."""
    import numpy as np

    columns, start = math.prod(source.shape[1:]), 0
    peaks = np.zeros(source.shape[0], np.float32)
    for chunk in source.chunks():
        first, stop = start // columns, -(-(start + chunk.size) // columns)
        edges = np.maximum(np.arange(first, stop) * columns - start, 0)
        peaks[first:stop] = np.maximum(peaks[first:stop], np.maximum.reduceat(np.abs(chunk), edges))
        start += chunk.size
    return peaks


def _values_from(attention: ir.Node) -> str:
    """The published name of the weight that makes an attention's values: that of the nearest MatMul before them."""
    value = attention.inputs[2]
    while value is not None and (maker := value.producer()) is not None:
        if maker.op_type == "MatMul" and maker.inputs[1] is not None:
            return (maker.inputs[1].name or "").removesuffix(SUFFIX)
        value = maker.inputs[0]
    return ""


def _rounded(graph: ir.Graph, value: ir.Value, point: str, reader: ir.Node) -> ir.Value:
    """The value after a Q/DQ pair of E4M3, which is inserted before the node that reads it."""
    scale = _scale(graph, f"{point}{SCALE}", value.type, ())
    # Without a precision, the division is made in the type of the scale, float16, by ONNX Runtime from version 1.32.
    kind = {"output_dtype": ir.DataType.FLOAT8E4M3FN, "precision": ir.DataType.FLOAT}
    attributes = [ir.AttrInt64(key, number) for key, number in kind.items()]
    quantize = ir.Node("", "QuantizeLinear", [value, scale], attributes, name=f"{point}/quantize")
    decode = ir.Node("", "DequantizeLinear", [quantize.outputs[0], scale], name=f"{point}/dequantize")
    _describe(quantize, value.shape, ir.TensorType(ir.DataType.FLOAT8E4M3FN))
    _describe(decode, value.shape, value.type)
    graph.insert_before(reader, [quantize, decode])
    return decode.outputs[0]


def _stored_scale(scale: float) -> NDArray[np.float32]:
    import numpy as np

    return float16_scale(np.asarray(scale, np.float32))


def _scale(
    graph: ir.Graph, name: str, dtype: ir.TypeProtocol | None, shape: Sequence[int | ir.SymbolicDim]
) -> ir.Value:
    value = graph.initializers.get(name)
    if value is None:
        value = ir.Value(name=name, shape=ir.Shape(shape), type=dtype)
        graph.initializers.add(value)
    return value


def _describe(node: ir.Node, shape: ir.Shape | None, dtype: ir.TypeProtocol | None) -> None:
    (out,) = node.outputs
    out.name, out.shape, out.type = f"{node.name}/out0", shape, dtype
