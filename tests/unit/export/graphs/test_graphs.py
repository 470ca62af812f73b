"""Traced graphs: weights by name and nowhere, turned for multiplication; and the published size without its weights."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import Bundles
from l2p_engines.store.stages import Home, find_stage
from l2p_export.checkpoint.demo import demo_dimensions
from l2p_export.checkpoint.loading import load_model
from l2p_export.families import Model
from l2p_export.families.z_image_l2p import ZImageModel
from l2p_export.families.z_image_l2p.dimensions import published_dimensions
from l2p_export.graphs.export import trace_key, trace_plan, traced_bytes
from l2p_export.graphs.names import published_names
from l2p_export.precision.plans import plain_plan
from l2p_export.tensors.sources import TransposedTensor, read_tensor


class Held:
    """A tensor in memory as the export sees one."""

    def __init__(self, values: np.ndarray[Any, np.dtype[np.float32]]) -> None:
        self.values, self.shape, self.dtype = values, values.shape, "F32"

    def chunks(self, chunk_bytes: int = 1 << 20) -> Any:
        flat = self.values.reshape(-1)
        yield from (flat[start : start + 1000] for start in range(0, flat.size, 1000))


@given(st.integers(1, 700), st.integers(1, 700), st.integers(1, 1 << 20))
@settings(max_examples=40, deadline=None)
def test_transposed_weights(rows: int, columns: int, chunk_bytes: int) -> None:
    values = np.arange(rows * columns, dtype=np.float32).reshape(rows, columns)
    turned = TransposedTensor(Held(values))
    assert turned.shape == (columns, rows)
    np.testing.assert_array_equal(np.concatenate(list(turned.chunks(chunk_bytes))), values.T.reshape(-1))
    np.testing.assert_array_equal(read_tensor(turned), values.T)


@pytest.mark.parametrize("network", ["stem", "tail"])
def test_traced_graph(network: str, bundles: Bundles) -> None:
    """As a build of the session traced it."""
    model = load_model(bundles.checkpoint("tiny-64"), None, []).model
    spec = next(spec for spec in model.networks if spec.name == network)
    stage = find_stage(Home(bundles.store), trace_key(model, spec, plain_plan(model, "fp32")))
    assert stage is not None
    graph = onnx.load(bundles.store / stage.files[0].path, load_external_data=False)
    check_weights(model, network, "fp32", graph)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["fp32", "bf16"])
@pytest.mark.parametrize("network", ["stem", "tail"])
def test_traced_graph_of_the_demo(network: str, plan: str) -> None:
    model = ZImageModel(demo_dimensions(64))
    check_weights(model, network, plan, graph_of(model, network, plan))


@pytest.mark.parametrize(("network", "parameters"), [("trunk", 3_618_206_720), ("head", 10_095_299)])
def test_published_size(network: str, parameters: int) -> None:
    model = ZImageModel(published_dimensions("4k"))
    assert sum(map(math.prod, model.network_shapes(network).values())) == parameters
    graph = graph_of(model, network, "bf16")
    check_weights(model, network, "bf16", graph)
    assert graph.ByteSize() < 1 << 20


def graph_of(model: ZImageModel, network: str, plan: str) -> onnx.ModelProto:
    spec = next(spec for spec in model.networks if spec.name == network)
    return onnx.load_model_from_string(traced_bytes(trace_plan(model, spec, plain_plan(model, plan))))


def check_weights(model: Model, network: str, plan: str, graph: onnx.ModelProto) -> None:
    """Every weight is there once, external, of the plan's dtype; matrices are turned and no node turns one."""
    names = {"float32": "FLOAT", "bfloat16": "BFLOAT16"}
    shapes = model.network_shapes(network)
    weights = [tensor for tensor in graph.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    assert Counter(name for tensor in weights for name in published_names(tensor.name)) == Counter(shapes.keys())
    for tensor in weights:
        name, *others = published_names(tensor.name)
        assert all(shapes[other] == shapes[name] for other in others)
        turned_shape = (shapes[name][-1], (1 + len(others)) * shapes[name][0])
        assert tuple(tensor.dims) == (shapes[name] if tensor.name == name else turned_shape)
        assert onnx.TensorProto.DataType.Name(tensor.data_type) == names[plain_plan(model, plan).dtype(name)]
    turned = {tensor.name for tensor in weights}
    assert not [node for node in graph.graph.node if node.op_type == "Transpose" and turned & set(node.input)]
    matrices = {name for name in shapes if name.endswith(("to_out.0.weight", "w2.weight", "adaLN.weight"))}
    assert {f"{name}.T" for name in matrices} <= turned
    blocks = [name.removesuffix("to_q.weight") for name in shapes if name.endswith("attention.to_q.weight")]
    assert {"+".join(f"{block}to_{part}.weight" for part in "qkv") + ".T" for block in blocks} <= turned
