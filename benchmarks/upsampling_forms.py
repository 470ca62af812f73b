"""Nearest x2 upsampling with a 3x3 convolution, as convolutions at the lower resolution; equal up to rounding.

Two of three neighbouring rows of an upsampled image are copies of one row, so three taps become two. For an even output
row these are w0 and w1 + w2, which read the row above and the row itself. For an odd one they are w0 + w1 and w2, which
read the row itself and the row below. The same holds for columns. Zero padding of the upsampled image equals zero
padding of the image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

FORMS = ("original", "four", "stacked", "transposed")
"""The original; four 2x2 convolutions with interleaved results; one 2x2 convolution of four times the channels and one
more row and column, interleaved and cropped; a transposed 4x4 convolution of stride 2."""

_PARITIES = tuple(product((0, 1), repeat=2))
_PAIRS = np.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], np.float64)
"""[parity of the output row, tap, tap of the 3x3 kernel]."""
_SPREAD = np.array([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], np.float64)
"""[tap of the transposed kernel, tap of the 3x3 kernel]."""

Weights = NDArray[Any]


def four_kernels(weight: Weights) -> Weights:
    """[out,in,3,3] to [2,2,out,in,2,2]: a 2x2 kernel for each parity of the output's row and column."""
    sums: Weights = np.einsum("apk,bql,oikl->aboipq", _PAIRS, _PAIRS, weight.astype(np.float64))
    return sums.astype(weight.dtype)


def stacked_kernel(weight: Weights) -> Weights:
    """[out,in,3,3] to [2,2,out,in,2,2], in the order in which windows produce rows: the kernel of an odd row first.

    Window i reads rows i - 1 and i; it produces output rows 2i - 1, which is odd, and 2i.
    """
    return four_kernels(weight)[::-1, ::-1]


def transposed_kernel(weight: Weights) -> Weights:
    """[out,in,3,3] to [in,out,4,4]: the contribution of a pixel to the 4 x 4 output pixels around it."""
    sums: Weights = np.einsum("pk,ql,oikl->iopq", _SPREAD, _SPREAD, weight.astype(np.float64))
    return sums.astype(weight.dtype)


def rewrite(model: onnx.ModelProto, form: str) -> onnx.ModelProto:
    """Copy a model with every convolution of an upsampled image in another form; weights must be in the model.

    Kernel sums are computed in float64 and rounded to the dtype of the stored weights.

    Args:
        model: an ONNX model with nearest x2 `Resize` before 3x3 convolutions.
        form: one of `FORMS`.
    """
    if form == "original":
        return model
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    resized = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Resize"}
    weights = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    arrays: dict[str, Weights] = {}
    for node in model.graph.node:
        if node.op_type == "Conv" and node.input[0] in resized:
            weight, bias = (numpy_helper.to_array(weights[name]) for name in node.input[1:])
            nodes += _upsampling(form, resized[node.input[0]], node, weight, bias, arrays)
        elif node.output[0] not in resized:
            nodes.append(node)
    used = {name for node in nodes for name in node.input}
    kept = [tensor for name, tensor in weights.items() if name in used]
    kept += [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in arrays.items()]
    for field, items in ((graph.node, nodes), (graph.initializer, kept)):
        del field[:]
        field.extend(items)
    onnx.checker.check_model(made)
    return made


def stage_model(weight: Weights, bias: Weights) -> onnx.ModelProto:
    """Model of one upsampling level, x [B,in,h,w] to y [B,out,2h,2w]."""
    up, channels = weight.shape[:2]
    resize = {"mode": "nearest", "nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}
    nodes = [
        helper.make_node("Resize", ["x", "", "scales"], ["wide"], **resize),
        helper.make_node("Conv", ["wide", "weight", "bias"], ["y"], kernel_shape=[3, 3], pads=[1] * 4),
    ]
    arrays = {"scales": np.array([1, 1, 2, 2], np.float32), "weight": weight, "bias": bias}
    kind = helper.np_dtype_to_tensor_dtype(weight.dtype)
    graph = helper.make_graph(
        nodes,
        "stage",
        [helper.make_tensor_value_info("x", kind, ["B", channels, "h", "w"])],
        [helper.make_tensor_value_info("y", kind, ["B", up, "2*h", "2*w"])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def _upsampling(
    form: str, x: str, conv: onnx.NodeProto, weight: Weights, bias: Weights, arrays: dict[str, Weights]
) -> Iterator[onnx.NodeProto]:
    y, stored, shift = conv.output[0], conv.input[1], conv.input[2]
    if form == "four":
        kernels = four_kernels(weight)
        for row, column in _PARITIES:
            arrays[f"{stored}.{row}{column}"] = kernels[row, column]
            read, pads = [x, f"{stored}.{row}{column}", shift], [1 - row, 1 - column, row, column]
            yield helper.make_node("Conv", read, [f"{y}/{row}{column}"], kernel_shape=[2, 2], pads=pads)
        yield helper.make_node("Concat", [f"{y}/{row}{column}" for row, column in _PARITIES], [f"{y}/four"], axis=1)
        yield helper.make_node("DepthToSpace", [f"{y}/four"], [y], blocksize=2, mode="DCR")
    elif form == "stacked":
        up, channels = weight.shape[:2]
        arrays |= {f"{stored}.x2": stacked_kernel(weight).reshape(4 * up, channels, 2, 2)}
        arrays |= {f"{shift}.x2": np.tile(bias, 4), **_CUT}
        read = [x, f"{stored}.x2", f"{shift}.x2"]
        yield helper.make_node("Conv", read, [f"{y}/four"], kernel_shape=[2, 2], pads=[1] * 4)
        yield helper.make_node("DepthToSpace", [f"{y}/four"], [f"{y}/wide"], blocksize=2, mode="DCR")
        yield helper.make_node("Slice", [f"{y}/wide", *_CUT], [y])
    else:
        arrays[f"{stored}.x2"] = transposed_kernel(weight)
        read, sizes = [x, f"{stored}.x2", shift], [4, 4]
        yield helper.make_node("ConvTranspose", read, [y], kernel_shape=sizes, strides=[2, 2], pads=[1] * 4)


_CUT: Mapping[str, Weights] = {
    "cut/starts": np.array([1, 1]),
    "cut/ends": np.array([-1, -1]),
    "cut/axes": np.array([2, 3]),
}
