"""Joins matrix products of one input: `MatMul(x, Wq)`, `MatMul(x, Wk)`, `MatMul(x, Wv)` become one, and a split.

TensorRT for RTX joins them itself, and then holds the joined weights beside the given ones: 1.8 times the weights of a
trunk in memory. With an ONNX graph that is already joined, and split along a separate axis, it takes 1.2 times
(docs/engines.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from l2p_export.graphs.names import JOINT, SUFFIX


def join_products(model: ir.Model) -> None:
    """Join matrix products that have the same input [B,S,in] and weights of the same shape [in,out], in place."""
    for value in [*model.graph.inputs, *(out for node in list(model.graph) for out in node.outputs)]:
        groups: dict[tuple[object, ...], list[ir.Node]] = {}
        for node, index in value.uses():
            weight = node.inputs[1] if node.op_type == "MatMul" and index == 0 else None
            if weight is None or not _is_weight(weight) or value.shape is None or len(value.shape) != 3:
                continue
            groups.setdefault((tuple(weight.shape or ()), weight.dtype), []).append(node)
        for nodes in groups.values():
            if len(nodes) > 1:
                _join(model.graph, value, nodes)


def _is_weight(value: ir.Value) -> bool:
    return value.is_initializer() and value.const_value is None and (value.name or "").endswith(SUFFIX)


def _join(graph: ir.Graph, value: ir.Value, nodes: Sequence[ir.Node]) -> None:
    weights = [weight for node in nodes if (weight := node.inputs[1]) is not None]
    rows, columns = weights[0].shape.numpy() if weights[0].shape is not None else ()
    names = [(weight.name or "").removesuffix(SUFFIX) for weight in weights]
    name = JOINT.join(names) + SUFFIX
    joined = ir.Value(name=name, shape=ir.Shape([rows, len(nodes) * columns]), type=weights[0].type)
    graph.initializers.add(joined)
    shape = _constant(graph, f"{name}/shape", [0, 0, len(nodes), columns])
    axis = _constant(graph, f"{name}/axis", [2])
    product = ir.Node("", "MatMul", [value, joined], name=f"{name}/product")
    parted = ir.Node("", "Reshape", [product.outputs[0], shape], name=f"{name}/parts")
    attributes = [ir.AttrInt64("axis", 2), ir.AttrInt64("num_outputs", len(nodes))]
    split = ir.Node("", "Split", [parted.outputs[0]], attributes, num_outputs=len(nodes), name=f"{name}/split")
    ends = [ir.Node("", "Squeeze", [part, axis], name=f"{name}/{i}") for i, part in enumerate(split.outputs)]
    made = [product, parted, split, *ends]
    for node in made:
        for index, out in enumerate(node.outputs):
            out.name = f"{node.name}/out{index}"
    order = {node: place for place, node in enumerate(graph)}
    graph.insert_before(min(nodes, key=lambda node: order[node]), made)
    for node, end in zip(nodes, ends, strict=True):
        old, new = node.outputs[0], end.outputs[0]
        new.shape, new.type = old.shape, old.type
        old.replace_all_uses_with(new)
        graph.remove(node, safe=True)
    for weight in weights:
        if not weight.uses():
            del graph.initializers[weight.name or ""]


def _constant(graph: ir.Graph, name: str, values: list[int]) -> ir.Value:
    tensor = ir.tensor(values, ir.DataType.INT64, name=name)
    value = ir.Value(
        name=name, shape=ir.Shape([len(values)]), type=ir.TensorType(ir.DataType.INT64), const_value=tensor
    )
    graph.initializers.add(value)
    return value
