"""One network under one precision plan becomes an `.onnx` file and a `.safetensors` file beside it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from l2p_export.graphs.trace import trace_network
from l2p_export.weights import write_weights
from l2p_runtime.errors import ArtifactError, InternalError

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    from l2p_calib.plans import PrecisionPlan
    from l2p_export.families import Model
    from l2p_export.tensors import TensorSource
    from l2p_runtime.contract import NetworkSpec
    from l2p_runtime.tensorfile import TensorInfo

_STORED = {"float32": "F32", "float16": "F16"}

DIGEST_DIGITS = 16
"""Hexadecimal digits of a content digest in a file name; the manifest holds all 64."""


@dataclass(frozen=True, slots=True)
class GraphFiles:
    """A written graph: its two files, named after their content, and the digest of each."""

    graph: Path
    graph_sha256: str
    weights: Path
    weights_sha256: str


def export_graph(
    model: Model,
    tensors: Mapping[str, TensorSource],
    network: NetworkSpec,
    plan: PrecisionPlan,
    folder: Path,
    advance: Callable[[int], None],
) -> GraphFiles:
    """Trace a network, stream its weights, and write both into `folder`.

    Raises:
        ArtifactError: a weight cannot be stored, or the finished graph fails `onnx.checker`.
    """
    graph = trace_plan(model, network, plan)
    names = sorted(tensors.keys() & graph.graph.initializers.keys())
    _require_all_weights(graph, tensors, network.name)
    partial = folder / f"{network.name}.{plan.name}.partial"
    sources = {name: tensors[name] for name in names}
    weights_sha256, places = write_weights(partial, sources, {n: _STORED[plan.dtype(n)] for n in names}, advance)
    stem = f"{network.name}.{plan.name}"
    weights = folder / f"{stem}.{weights_sha256[:DIGEST_DIGITS]}.safetensors"
    partial.replace(weights)
    graph_sha256, path = _save(graph, places, weights, folder / stem)
    _check(path)
    return GraphFiles(path, graph_sha256, weights, weights_sha256)


def trace_plan(model: Model, network: NetworkSpec, plan: PrecisionPlan) -> ir.Model:
    """Trace a network with the dtypes of a plan; blocks of equal structure are traced once."""
    import torch

    def dtype_of(layer: str) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, plan.dtype(layer))
        return dtype

    repeats = _repeats(model.blocks(network.name), plan)
    return trace_network(lambda: model.module(network.name, dtype_of, repeats), network, plan.opset, repeats)


def _repeats(blocks: Sequence[str], plan: PrecisionPlan) -> dict[str, list[str]]:
    """Runs of neighbouring blocks of one group and one dtype: the first is traced, the others are copied."""
    runs: dict[str, list[str]] = {}
    previous = ("", "")
    for block in blocks:
        kind = (block.partition(".")[0], plan.dtype(block))
        if kind == previous:
            runs[next(reversed(runs))].append(block)
        else:
            runs[block] = []
        previous = kind
    return runs


def _require_all_weights(graph: ir.Model, tensors: Mapping[str, TensorSource], network: str) -> None:
    for name, value in graph.graph.initializers.items():
        if value.const_value is None and name not in tensors:
            raise InternalError(f"network `{network}` wants a weight `{name}` that the checkpoint has not")


def _save(graph: ir.Model, places: Mapping[str, TensorInfo], weights: Path, stem: Path) -> tuple[str, Path]:
    import onnx_ir as ir

    dtypes = {"F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16}
    for name, info in places.items():
        graph.graph.initializers[name].const_value = ir.ExternalTensor(
            location=weights.name,
            offset=info.offset,
            length=info.size_bytes,
            dtype=dtypes[info.dtype],
            shape=ir.Shape(info.shape),
            name=name,
            base_dir=str(weights.parent),
        )
    data = ir.serde.serialize_model(graph).SerializeToString(deterministic=True)
    digest = hashlib.sha256(data).hexdigest()
    path = stem.with_name(f"{stem.name}.{digest[:DIGEST_DIGITS]}.onnx")
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return digest, path


def _check(path: Path) -> None:
    import onnx

    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise ArtifactError(f"`{path.name}` fails onnx.checker: {error}") from error
