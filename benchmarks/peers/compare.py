"""Compares the tools: error, bytes and share of weights in 8 bits. `calls.py` lists the scripts to run before.

    python benchmarks/peers/compare.py FOLDER

Runs our ONNX graphs and modelopt's in the same ONNX Runtime with our runtime's session options, and adds the results of
torchao's script. Then lists the ONNX graphs that ONNX Runtime refuses with its default options.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
from calls import (
    BUNDLE,
    MODELOPT,
    OUR_PLANS,
    OURS,
    TEST,
    Result,
    Stored,
    measure,
    read_calls,
    read_results,
    write_result,
)

from l2p_calib.ledger import END_TO_END
from l2p_runtime.backends.onnx import OnnxEngine
from l2p_runtime.bundle import Bundle, open_bundle
from l2p_runtime.contract import NETWORKS
from l2p_runtime.onnx_library import import_onnxruntime

EIGHTHS = {onnx.TensorProto.FLOAT8E4M3FN, onnx.TensorProto.INT8, onnx.TensorProto.UINT8}
_PASSED = {"DequantizeLinear", "QuantizeLinear", "Cast", "Transpose", "Reshape"}
"""Operators between a stored weight and the MatMul, Gemm or Conv that reads it."""


def main() -> None:
    """Run the ONNX graphs and print the tables."""
    folder = Path(sys.argv[1])
    bundle, calls = open_bundle(folder / BUNDLE), read_calls(folder / TEST)
    tools = {"ours, fp32": _bundled(bundle, "fp32")}
    tools |= {f"ours, {plan}": _ours(folder / OURS / plan) for plan in OUR_PLANS}
    tools |= {f"modelopt {path.name}": _theirs(path) for path in sorted((folder / MODELOPT).iterdir())}
    for tool, files in tools.items():

        def load(network: str) -> OnnxEngine:
            graph, weights = files(network)  # noqa: B023
            return OnnxEngine(graph, weights, bundle.manifest.network(network))

        stored = tuple(_stored(network, files(network)[0]) for network in NETWORKS)
        write_result(folder, Result(tool, measure(bundle, calls, load), stored))
    _print_tables(sorted(read_results(folder), key=lambda result: [*tools, result.tool].index(result.tool)))
    print(f"\n{len(calls)} calls; onnxruntime {import_onnxruntime().__version__}, onnx {onnx.__version__}")
    for tool, files in tools.items():
        for network in NETWORKS:
            if refused := _refusal(files(network)[0]):
                print(f"{tool}, {network}, with ONNX Runtime's own options: {refused}")


def _bundled(bundle: Bundle, plan: str) -> Callable[[str], tuple[Path, Path]]:
    def files(network: str) -> tuple[Path, Path]:
        record = bundle.manifest.graph(network, plan)
        return bundle.path(record.graph), bundle.path(record.weights)

    return files


def _ours(folder: Path) -> Callable[[str], tuple[Path, Path]]:
    return lambda network: (
        next((folder / network).glob("*.onnx")),
        next((folder / network).glob("*.safetensors")),
    )


def _theirs(folder: Path) -> Callable[[str], tuple[Path, Path]]:
    """Their ONNX graphs contain their weights."""
    return lambda network: (folder / f"{network}.onnx", folder / f"{network}.onnx")


def _stored(network: str, path: Path) -> Stored:
    graph = onnx.load(path, load_external_data=False).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    tensors |= {node.output[0]: node.attribute[0].t for node in graph.node if node.op_type == "Constant"}
    makers = {name: node for node in graph.node for name in node.output}
    counts = {"linear": [0, 0, 0], "convolution": [0, 0, 0]}
    products = 0
    for node in graph.node:
        if node.op_type not in {"MatMul", "Gemm", "Conv"}:
            continue
        weights = [(name, found) for name in node.input[:2] if (found := _source(name, tensors, makers)) is not None]
        for name, weight in weights:
            count, size = counts["convolution" if node.op_type == "Conv" else "linear"], math.prod(weight.dims)
            count[0] += size
            count[1] += size * _is_rounded(name, makers)
            count[2] += size * (weight.data_type in EIGHTHS)
        products += not weights and all(_is_rounded(name, makers) for name in node.input)
    size_bytes = sum(map(_size_bytes, tensors.values()))
    return Stored(network, size_bytes, *counts["linear"], *counts["convolution"][:2], products)


def _source(
    name: str, tensors: dict[str, onnx.TensorProto], makers: dict[str, onnx.NodeProto]
) -> onnx.TensorProto | None:
    """The stored weight that a value is derived from, or None."""
    while name not in tensors:
        node = makers.get(name)
        if node is None or node.op_type not in _PASSED:
            return None
        name = node.input[0]
    return tensors[name]


def _is_rounded(name: str, makers: dict[str, onnx.NodeProto]) -> bool:
    """True if a value is dequantized from 8 bits."""
    while (node := makers.get(name)) is not None and node.op_type in _PASSED:
        if node.op_type == "DequantizeLinear":
            return True
        name = node.input[0]
    return False


def _size_bytes(tensor: onnx.TensorProto) -> int:
    return math.prod(tensor.dims) * np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize


def _refusal(path: Path) -> str:
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 - whatever it says is the answer
        return str(error).splitlines()[0]
    return ""


def _print_tables(results: list[Result]) -> None:
    print("\nrelative error in per cent, mean and maximum over calls\n")
    _print_table([*NETWORKS, END_TO_END], ((result.tool, _errors(result)) for result in results))
    print("\nbytes of weights\n")
    _print_table([*NETWORKS, "all"], ((result.tool, _bytes(result)) for result in results))
    print("\nlinear weights in 8 bits (stored so), weights of convolutions, matrix products of two activations\n")
    _print_table(NETWORKS, ((result.tool, [_shares(stored) for stored in result.stored]) for result in results))


def _print_table(columns: list[str] | tuple[str, ...], rows: Iterator[tuple[str, list[str]]]) -> None:
    print(f"| tool | {' | '.join(columns)} |\n|{' --- |' * (len(columns) + 1)}")
    for name, cells in rows:
        print(f"| {name} | {' | '.join(cells)} |")


def _errors(result: Result) -> list[str]:
    found = {errors.network: errors.relative for errors in result.errors}
    return [f"{100 * np.mean(found[name]):.2g}, {100 * max(found[name]):.2g}" for name in (*NETWORKS, END_TO_END)]


def _bytes(result: Result) -> list[str]:
    sizes = [stored.size_bytes for stored in result.stored]
    return [f"{size:,}" for size in (*sizes, sum(sizes))]


def _shares(stored: Stored) -> str:
    linear = "none"
    if stored.linear:
        linear = f"{stored.linear_eighths / stored.linear:.0%} ({stored.linear_stored / stored.linear:.0%})"
    convolution = f"{stored.convolution_eighths / stored.convolution:.0%}" if stored.convolution else "none"
    return f"{linear}, {convolution}, {stored.products_eighths}"


if __name__ == "__main__":
    main()
