"""Stores weights transposed, as they are multiplied: `MatMul(x, Transpose(W))` becomes `MatMul(x, W.T)`.

torch stores a linear layer's weight as [out, in]; ONNX multiplies by [in, out]. A Transpose that stays in the graph is
run each time, or the engine library folds it into a copy of the weight: 2.9 GB for a graph of 1.4 GB in ONNX Runtime.
"""

from __future__ import annotations

import onnx_ir as ir

from l2p_export.graphs.names import SUFFIX


def store_transposed(model: ir.Model) -> None:
    """Replace every Transpose of a weight matrix by a weight of the transposed shape, in place."""
    graph = model.graph
    for node in list(graph):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is None or not weight.is_initializer() or weight.const_value is not None or weight.shape is None:
            continue
        if list(node.attributes["perm"].as_ints()) != [1, 0]:
            continue
        name = f"{weight.name}{SUFFIX}"
        turned = graph.initializers.get(name)
        if turned is None:
            rows, columns = weight.shape
            turned = ir.Value(name=name, shape=ir.Shape([columns, rows]), type=weight.type)
            graph.initializers.add(turned)
        node.outputs[0].replace_all_uses_with(turned)
        graph.remove(node, safe=True)
        if not weight.uses():
            del graph.initializers[weight.name or ""]
