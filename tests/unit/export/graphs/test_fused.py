"""Fused graphs: what is recognised is computed alike without scores, and what only looks alike is left as it is."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import Bundles
from l2p_export.graphs.fused import fuse
from l2p_runtime.backends.onnx import make_options
from l2p_runtime.bundle import open_bundle
from l2p_runtime.contract import fused_comparison
from l2p_runtime.onnx_library import import_onnxruntime

HEADER = 'ir_version: 11, opset_import: ["" : {opset}]'
INPUTS = "float[B,S,N,D] q0, float[B,S,N,D] k0, float[B,S,N,D] v0"
HEADS = """
    q = Transpose <perm = [0,2,1,3]> (q0)
    k = Transpose <perm = [0,2,1,3]> (k0)
    v = Transpose <perm = [0,2,1,3]> (v0)"""
WRITTEN_OUT = """
    shape = Shape (k)
    root = Constant <value_floats = [{root}]> ()
    flat = Constant <value_ints = [-1, {tokens}, {width}]> ()
    back = Constant <value_ints = [{batch}, {heads}, {width}, {tokens}]> ()
    k1 = Reshape (k, flat)
    k2 = Transpose <perm = [0,2,1]> (k1)
    k3 = Reshape (k2, back)
    q1 = Mul (q, root)
    k4 = Mul (k3, {key_root})
    scores = MatMul (q1, k4){mask}
    weights = Softmax <axis = -1> ({scores})
    mixed = MatMul (weights, v)"""
END = """
    out = Transpose <perm = [0,2,1,3]> (mixed)"""

sizes = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 90), st.sampled_from([2, 6, 48]))


@given(sizes, st.floats(0.05, 2.0), st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_attention_that_is_written_out(shape: tuple[int, int, int, int], scale: float, seed: int) -> None:
    found, inputs = written_out(shape, scale**0.5), queries(shape, seed)
    expected = run(found, inputs)
    fused = fused_of(found)
    assert operators(fused)["MultiHeadAttention"] == 1
    assert not {"Softmax", "MatMul", "Transpose"} & operators(fused).keys()
    np.testing.assert_allclose(run(fused, inputs), expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", ["float", "float16"])
def test_the_operator_attention(dtype: str) -> None:
    shape = (2, 3, 70, 48)
    found = attention("", dtype, shape)
    fused = fused_of(found)
    inputs = {name: value.astype({"float": "f4", "float16": "f2"}[dtype]) for name, value in queries(shape, 1).items()}
    expected, got = (run(model, inputs) for model in (found, fused))
    assert operators(fused)["MultiHeadAttention"] == 1
    assert operators(fused)["Cast"] == (4 if dtype == "float16" else 0)
    # The fused one computes float16 in float32 and rounds once.
    np.testing.assert_allclose(got, expected, rtol=0, atol={"float": 2e-6, "float16": 2e-3}[dtype])


@pytest.mark.parametrize("attribute", ["is_causal = 1", "scale = 0.5", "softcap = 2.0", "q_num_heads = 3"])
def test_other_attention_is_left(attribute: str) -> None:
    """Each means something that the fused form would lose."""
    assert not fuse(ir.from_proto(attention(attribute, "float", (1, 3, 8, 4))))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"mask": "\n    masked = Add (scores, bias)", "scores": "masked"}, id="mask"),
        pytest.param({"key_root": "other"}, id="two-scales"),
    ],
)
def test_attention_with_more_in_it_is_left(change: dict[str, str]) -> None:
    assert not fuse(ir.from_proto(written_out((1, 2, 8, 4), 0.5, **change)))


def test_pairs_of_halves_are_not_neighbours() -> None:
    """A rotation of channel i with channel i + D/2 is another one, which must not become that of neighbours."""
    body = """
    start = Constant <value_ints = [0]> ()
    middle = Constant <value_ints = [1]> ()
    end = Constant <value_ints = [9223372036854775807]> ()
    axis = Constant <value_ints = [{axis}]> ()
    axes = Constant <value_ints = [{axes}]> ()
    pairs = Constant <value_ints = [1, 8, 2, {pairs}]> ()
    joined = Constant <value_ints = [1, 8, 2, 6]> ()
    c = Unsqueeze (cos, axes)
    s = Unsqueeze (sin, axes)
    halves = Reshape (q0, pairs)
    a = Slice (halves, start, middle, axis, middle)
    b = Slice (halves, middle, end, axis, middle)
    ac = Mul (a, c)
    bs = Mul (b, s)
    as = Mul (a, s)
    bc = Mul (b, c)
    real = Sub (ac, bs)
    imaginary = Add (as, bc)
    both = Concat <axis = {concat}> (real, imaginary)
    q1 = Reshape (both, joined)
    q = Transpose <perm = [0,2,1,3]> (q1)
    k = Transpose <perm = [0,2,1,3]> (k0)
    v = Transpose <perm = [0,2,1,3]> (v0)
    mixed = Attention <is_causal = 0, softcap = 0.0, qk_matmul_output_mode = 0> (q, k, v)"""
    rng = np.random.default_rng(2)
    angles = rng.standard_normal((8, 3), dtype=np.float32)
    inputs = {**queries((1, 2, 8, 6), 3), "cos": np.cos(angles), "sin": np.sin(angles)}
    more = ", float[8,3] cos, float[8,3] sin"
    forms = {
        "neighbours": {"axis": 4, "axes": "1, 3", "pairs": "3, 2", "concat": -1},
        "halves": {"axis": 3, "axes": "1, 2", "pairs": "2, 3", "concat": 3},
    }
    for name, numbers in forms.items():
        model = parsed(body.format(**numbers), (1, 2, 8, 6), 23, more)
        fused = fused_of(model)
        assert operators(fused)["RotaryEmbedding"] == (1 if name == "neighbours" else 0), name
        np.testing.assert_allclose(run(fused, inputs), run(model, inputs), rtol=0, atol=2e-6)


def test_a_graph_without_attention_has_no_fused_form() -> None:
    model = onnx.parser.parse_model(f"<{HEADER.format(opset=20)}> g (float[2] x) => (float[2] y) {{ y = Relu (x) }}")
    assert not fuse(ir.from_proto(model))


SKIP = """
    joined = Concat <axis = {axis}> (a, b)
    out = Conv <pads = [1,1,1,1], kernel_shape = [3,3], strides = [{stride},{stride}], group = {group}> ({operands})"""


@given(
    st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 2), st.integers(3, 12), st.integers(3, 12)),
    st.integers(1, 2),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=25, deadline=None)
def test_a_skip_is_not_copied(
    channels: tuple[int, int, int], size: tuple[int, int, int], stride: int, seed: int
) -> None:
    model, inputs = skip(channels, size, seed, stride=stride)
    expected = run(model, inputs)
    fused = fused_of(model)
    assert operators(fused) == {"Split": 1, "Conv": 2, "Add": 1}
    np.testing.assert_allclose(run(fused, inputs), expected, rtol=0, atol=2e-6 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"axis": 2, "channels": (4, 4, 4)}, id="rows"),
        pytest.param({"group": 2, "channels": (2, 2, 4)}, id="groups"),
        pytest.param({"dtype": "float16"}, id="float16"),
        pytest.param({"read_twice": True}, id="read-twice"),
    ],
)
def test_what_is_joined_otherwise_is_left(change: dict[str, Any]) -> None:
    model, _ = skip(**{"channels": (3, 5, 4), "size": (1, 8, 8), "seed": 0} | change)
    assert not fuse(ir.from_proto(model))


def test_a_bundle_holds_fused_graphs_on_the_same_weights(bundles: Bundles) -> None:
    """In every plan that ONNX Runtime runs, and the ledger has compared them."""
    bundle = open_bundle(bundles.path("tiny-16"))
    manifest = bundle.manifest
    for ref in manifest.plans:
        entries = [entry for entry in manifest.ledger if entry.comparison == fused_comparison(ref.name)]
        records = [record for record in manifest.graphs if record.plan == ref.name and record.fused is not None]
        if ref.base == "bf16":
            assert not records
            continue
        # Convolutions in float16 are computed in float32, where nothing is gained.
        head = {"head"} if ref.base == "fp32" else set()
        assert {record.network for record in records} == {"caption", "stem", "trunk", "tail"} | head
        assert {entry.network.partition(".")[0] for entry in entries} == {record.network for record in records}
        assert {entry.status for entry in entries} == {"passed"}
        for record in records:
            graph = onnx.load(bundle.path(record.fused or ""), load_external_data=False)
            places = {entry.value for value in graph.graph.initializer for entry in value.external_data[:1]}
            assert places == {record.weights.partition("/")[2]}
            assert operators(graph)["Split" if record.network == "head" else "MultiHeadAttention"] > 0
            assert not {"Softmax", "Attention"} & operators(graph).keys()


def skip(
    channels: tuple[int, int, int],
    size: tuple[int, int, int],
    seed: int,
    *,
    stride: int = 1,
    axis: int = 1,
    group: int = 1,
    dtype: str = "float",
    read_twice: bool = False,
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """A convolution of [B,C,H,W] and [B,D,H,W] to [B,E,H,W], joined; and inputs."""
    (first, second, after), (batch, height, width) = channels, size
    rng = np.random.default_rng(seed)
    joined = first + second if axis == 1 else first
    numbers = {"float": np.float32, "float16": np.float16}[dtype]
    inputs = {
        name: rng.standard_normal((batch, count, height, width)).astype(numbers)
        for name, count in (("a", first), ("b", second))
    }
    body = SKIP.format(axis=axis, stride=stride, group=group, operands="joined, weight, bias")
    given = ", ".join(f"{dtype}[{','.join(map(str, value.shape))}] {name}" for name, value in inputs.items())
    end = "\n    both = Relu (joined)" if read_twice else ""
    results = ", ".join(f"{dtype}[B,E,H,W] {name}" for name in ["out", *(["both"] if read_twice else [])])
    model = onnx.parser.parse_model(f"<{HEADER.format(opset=20)}> g ({given}) => ({results}) {{{body}{end}\n}}")
    for name, shape in (("weight", (after, joined // group, 3, 3)), ("bias", (after,))):
        weight = rng.standard_normal(shape).astype(numbers)
        model.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
    return onnx.shape_inference.infer_shapes(model, data_prop=True), inputs


def written_out(shape: tuple[int, int, int, int], root: float, **change: str) -> onnx.ModelProto:
    batch, heads, tokens, width = shape
    parts = {"key_root": "root", "mask": "", "scores": "scores"} | change
    numbers = {"batch": batch, "heads": heads, "tokens": tokens, "width": width}
    body = HEADS + WRITTEN_OUT.format(root=f"{root:.9f}", **numbers, **parts)
    more = f", float[{batch},{heads},{tokens},{tokens}] bias, float[1] other"
    return parsed(body, shape, 20, more if change else "")


def attention(attribute: str, dtype: str, shape: tuple[int, int, int, int]) -> onnx.ModelProto:
    standard = {"is_causal": "is_causal = 0", "softcap": "softcap = 0.0", "mode": "qk_matmul_output_mode = 0"}
    name = attribute.partition(" ")[0]
    chosen = ", ".join(value for value in ({**standard, name: attribute} if name else standard).values())
    body = f"{HEADS}\n    mixed = Attention <{chosen}> (q, k, v)"
    return parsed(body, shape, 23, "", dtype)


def parsed(
    body: str, shape: tuple[int, int, int, int], opset: int, more: str = "", dtype: str = "float"
) -> onnx.ModelProto:
    batch, heads, tokens, width = shape
    inputs = INPUTS.replace("B,S,N,D", f"{batch},{tokens},{heads},{width}") + more
    text = f"<{HEADER.format(opset=opset)}> g ({inputs}) => (float[B,S,N,D] out) {{{body}{END}\n}}"
    model = onnx.parser.parse_model(text.replace("float[", f"{dtype}["))
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


def fused_of(model: onnx.ModelProto) -> onnx.ModelProto:
    graph = ir.from_proto(model)
    assert fuse(graph)
    return ir.to_proto(graph)


def queries(shape: tuple[int, int, int, int], seed: int) -> dict[str, np.ndarray[Any, Any]]:
    batch, heads, tokens, width = shape
    rng = np.random.default_rng(seed)
    return {f"{name}0": rng.standard_normal((batch, tokens, heads, width), dtype=np.float32) for name in "qkv"}


def run(model: onnx.ModelProto, inputs: dict[str, Any]) -> np.ndarray[Any, Any]:
    ort = import_onnxruntime()
    session = ort.InferenceSession(model.SerializeToString(), make_options(ort), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {value.name: inputs[value.name] for value in session.get_inputs()})
    return np.asarray(out)


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)
