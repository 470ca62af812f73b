"""Exports one network under one precision plan: an `.onnx` file, and its weights in a `.safetensors` file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from l2p_calib.layout import layer_of
from l2p_calib.plans.plan import FLOAT8
from l2p_engines.store.stages import DIGEST_DIGITS, Stage, StageOutput, StageRunner, named_by_content, stage_key
from l2p_export.tensors.sources import JoinedTensor, ScaledTensor, TransposedTensor
from l2p_export.tensors.writing import write_weights
from l2p_export.toolchain import toolchain
from l2p_runtime.errors import ArtifactError, InternalError
from l2p_runtime.files import write_bytes

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    from l2p_calib.plans.plan import PrecisionPlan
    from l2p_export.families import Networks
    from l2p_export.tensors.sources import TensorSource
    from l2p_runtime.contract import NetworkSpec
    from l2p_runtime.progress import Reporter
    from l2p_runtime.tensorfile import TensorInfo

_STORED = {"FLOAT": "F32", "FLOAT16": "F16", "BFLOAT16": "BF16", "FLOAT8E4M3FN": "F8_E4M3"}
# Placeholder for the weights file in a traced ONNX graph.
_NOWHERE = "weights"


@dataclass(frozen=True, slots=True)
class GraphFiles:
    """A written ONNX graph: its two files, named by their content, and the SHA-256 of each.

    Attributes:
        fused: the same graph for ONNX Runtime on the CPU (`graphs/fused.py`), with its SHA-256; None if it has no
            attention.
    """

    graph: Path
    graph_sha256: str
    weights: Path
    weights_sha256: str
    fused: tuple[Path, str] | None = None


def graph_stage(
    run: StageRunner,
    model: Networks,
    tensors: Mapping[str, TensorSource],
    network: NetworkSpec,
    plan: PrecisionPlan,
    weights_sha256: str,
    reporter: Reporter,
) -> Stage:
    """Export one network as a stage; its files are `.onnx`, `.safetensors` and, if it has attention, `.cpu.onnx`.

    The trace is a separate stage without weights, which another checkpoint of the same dimensions reuses.

    Args:
        run: runs the stage, or finds it.
        model: the architecture.
        tensors: published name to tensor.
        network: inputs and outputs of the network.
        plan: dtype of each layer.
        weights_sha256: digest of the network's weights.
        reporter: shows the bytes written.

    Raises:
        ArtifactError: a weight cannot be stored, or the written ONNX graph fails `onnx.checker`.
    """

    def make(work: Path) -> StageOutput:
        path = run.path(trace_stage(run, model, network, plan, reporter).files[0])
        total = weight_bytes(model, network.name, plan)
        with reporter.task(f"{plan.name} graph of `{network.name}`", total) as advance:
            scales = _input_scales(model, network.name, plan)
            found = write_graph(path.read_bytes(), tensors, network.name, plan, work, advance, scales)
        fused = () if found.fused is None else (found.fused,)
        files = ((found.graph, found.graph_sha256), (found.weights, found.weights_sha256), *fused)
        return StageOutput("graphs", files)

    inputs = {**_structure(model, network, plan), "weights": weights_sha256}
    return run("graph", f"{network.name}.{plan.name}", inputs, make)


def trace_stage(
    run: StageRunner,
    model: Networks,
    network: NetworkSpec,
    plan: PrecisionPlan,
    reporter: Reporter,
) -> Stage:
    """Trace a network as a stage; its one file is the `.onnx` without weights. Arguments are those of `graph_stage`."""
    label = f"{network.name}.{plan.name}"

    def make(work: Path) -> StageOutput:
        with reporter.task(f"tracing `{network.name}` in {plan.name}"):
            data = traced_bytes(trace_plan(model, network, plan))
        digest = hashlib.sha256(data).hexdigest()
        write_bytes(work / "trace", data)
        return StageOutput("traces", ((named_by_content(work / "trace", f"{label}.onnx", digest), digest),))

    return run("trace", label, _traced(model, network, plan), make)


def trace_key(model: Networks, network: NetworkSpec, plan: PrecisionPlan) -> str:
    """The key of `trace_stage` with these arguments."""
    return stage_key("trace", _traced(model, network, plan))


def graph_key(model: Networks, network: NetworkSpec, plan: PrecisionPlan, weights_sha256: str) -> str:
    """The key of `graph_stage` with these arguments; `find_stage` tells whether the ONNX graph exists."""
    return stage_key("graph", {**_structure(model, network, plan), "weights": weights_sha256})


def export_graph(
    model: Networks,
    tensors: Mapping[str, TensorSource],
    network: NetworkSpec,
    plan: PrecisionPlan,
    folder: Path,
    advance: Callable[[int], None],
) -> GraphFiles:
    """Trace a network, stream its weights, and write both into `folder`.

    Raises:
        ArtifactError: a weight cannot be stored, or the written ONNX graph fails `onnx.checker`.
    """
    traced, scales = traced_bytes(trace_plan(model, network, plan)), _input_scales(model, network.name, plan)
    return write_graph(traced, tensors, network.name, plan, folder, advance, scales)


def trace_plan(model: Networks, network: NetworkSpec, plan: PrecisionPlan) -> ir.Model:
    """Trace a network with the dtypes of a plan; blocks of equal structure are traced once."""
    import torch

    from l2p_export.graphs.trace import trace_network

    def dtype_of(layer: str) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, plan.carrier(layer))
        return dtype

    repeats = _repeats(model, network.name, plan)
    return trace_network(
        lambda: model.module(network.name, dtype_of, repeats, plan.exponent),
        network,
        plan.opset,
        repeats,
        _float8_weights(model, network.name, plan),
        _float8_attention(model, network.name, plan),
    )


def traced_bytes(graph: ir.Model) -> bytes:
    """A traced graph as ONNX bytes; its weights have names, dtypes and shapes, but no values and no file."""
    for name, value in graph.graph.initializers.items():
        if value.const_value is None and value.shape is not None and value.dtype is not None:
            value.const_value = _external(name, _NOWHERE, 0, 0, value.dtype, value.shape)
    return _serialized(graph)


def write_graph(
    traced: bytes,
    tensors: Mapping[str, TensorSource],
    network: str,
    plan: PrecisionPlan,
    folder: Path,
    advance: Callable[[int], None],
    input_scales: Mapping[str, float] | None = None,
) -> GraphFiles:
    """Stream a traced network's weights into `folder`, and write the ONNX graph that refers to them.

    Args:
        traced: from `traced_bytes`.
        tensors: published name to tensor.
        network: its name.
        plan: dtypes and exponents of layers.
        folder: where both files are written.
        advance: called with the number of bytes written since its last call.
        input_scales: input scales of FP8 linear layers and attention, by the point that they read.

    Raises:
        ArtifactError: a weight cannot be stored, or the written ONNX graph fails `onnx.checker`.
    """
    import onnx
    import onnx_ir as ir

    from l2p_export.graphs.float8 import float8_sources, is_float8, weight_parts
    from l2p_export.graphs.fused import fuse

    graph = ir.serde.deserialize_model(onnx.load_model_from_string(traced))
    weights_of = graph.graph.initializers
    names = sorted(name for name, value in weights_of.items() if isinstance(value.const_value, ir.ExternalTensor))
    missing = [part for name in names for part in weight_parts(name) if part not in tensors]
    if missing:
        raise InternalError(f"network `{network}` needs the weight `{missing[0]}`, which the checkpoint lacks")
    eighths = [name for name in names if is_float8(name, weights_of[name].dtype)]
    parts = {name: _scaled(weight_parts(name), tensors, plan) for name in eighths if weight_parts(name)}
    encoded = float8_sources(eighths, parts, input_scales or {})
    sources = {name: encoded.get(name) or _source(name, weight_parts(name), tensors, plan) for name in names}
    written = folder / f"{network}.{plan.name}.safetensors"
    dtypes = {name: _STORED[str(weights_of[name].dtype)] for name in names}
    weights_sha256, places = write_weights(written, sources, dtypes, advance)
    weights = named_by_content(written, written.name, weights_sha256)
    stem = folder / f"{network}.{plan.name}"
    _point_into(graph, places, weights)
    graph_sha256, path = _save(graph, stem, ".onnx")
    _check(path)
    # ONNX Runtime has no bfloat16 on the CPU, so nothing would run it.
    is_fused = plan.base != "bf16" and fuse(graph)
    fused = _save(graph, stem, ".cpu.onnx") if is_fused else None
    return GraphFiles(path, graph_sha256, weights, weights_sha256, (fused[1], fused[0]) if fused else None)


def _source(
    name: str, published: Sequence[str], tensors: Mapping[str, TensorSource], plan: PrecisionPlan
) -> TensorSource:
    """A weight as the ONNX graph stores it: scaled; unchanged, transposed, or several joined along their outputs."""
    parts = _scaled(published, tensors, plan)
    if name in tensors:
        return parts[0]
    return TransposedTensor(parts[0] if len(parts) == 1 else JoinedTensor(tuple(parts)))


def _scaled(
    published: Sequence[str], tensors: Mapping[str, TensorSource], plan: PrecisionPlan
) -> tuple[TensorSource, ...]:
    """Tensors times two to the power of their exponents."""
    exponents = {name: plan.exponent(layer_of(name)) for name in published}
    return tuple(ScaledTensor(tensors[n], e) if e else tensors[n] for n, e in exponents.items())


def _structure(model: Networks, network: NetworkSpec, plan: PrecisionPlan) -> dict[str, object]:
    """Everything that decides an ONNX graph except the values of its weights."""
    return {
        "network": network,
        "shapes": {name: list(shape) for name, shape in model.network_shapes(network.name).items()},
        "blocks": list(model.blocks(network.name)),
        "plan": plan.of_layers(_layers(model, network.name)),
        "settings": model.settings,
        "tools": toolchain(),
    }


def _traced(model: Networks, network: NetworkSpec, plan: PrecisionPlan) -> dict[str, object]:
    """Everything that decides a trace; values of weights, input scales, and the plan's name and base do not."""
    nameless = replace(plan.of_layers(_layers(model, network.name)), name="", base="fp32", inputs=())
    return _structure(model, network, plan) | {"plan": nameless}


def _float8_weights(model: Networks, network: str, plan: PrecisionPlan) -> dict[str, str]:
    """Each weight that a plan has in FP8, to the point that it reads."""
    reads = {product.layer: product.reads for product in model.layout(network).linear_layers}
    return {name: reads[layer_of(name)] for name in model.network_shapes(network) if plan.dtype(name) == FLOAT8}


def _float8_attention(model: Networks, network: str, plan: PrecisionPlan) -> dict[str, tuple[str, ...]]:
    """For each attention that a plan has in FP8, the weight that makes its values, to the points of its inputs."""
    return {
        f"{attention.values_from}.weight": tuple(part.reads for part in attention.inputs)
        for attention in model.layout(network).attentions
        if all(plan.dtype(part.layer) == FLOAT8 for part in attention.inputs)
    }


def _input_scales(model: Networks, network: str, plan: PrecisionPlan) -> dict[str, float]:
    """Point to its FP8 scale in the ONNX graph, exponents of the layers before it included."""
    layout = model.layout(network)
    scales = {item.layer: item.scale for item in plan.inputs}
    found = {}
    for product in layout.quantizable:
        if plan.dtype(product.layer) == FLOAT8:
            point = layout.point(product.reads)
            exponent = sum(map(plan.exponent, point.scaled_by)) if point is not None else 0
            found[product.reads] = scales[product.layer] * 2.0**exponent
    return found


def weight_bytes(model: Networks, network: str, plan: PrecisionPlan) -> int:
    """Bytes of a network's weights under a plan."""
    return plan.weight_bytes(model.network_shapes(network))


def _layers(model: Networks, network: str) -> list[str]:
    """Names that a plan may list in one network: tensors, layers, attention of blocks, its inputs, and the residual."""
    tensors = tuple(model.network_shapes(network))
    attentions = model.layout(network).attentions
    attention = [name for item in attentions for name in (item.layer, *(part.layer for part in item.inputs))]
    return [*tensors, *map(layer_of, tensors), *attention, f"residual.{network}"]


def _repeats(model: Networks, network: str, plan: PrecisionPlan) -> dict[str, list[str]]:
    """Runs of adjacent equal blocks: the first, which is traced, to the others, which are copies of it.

    Equal blocks have equal shapes, dtypes and exponents, and names that differ only in their number.
    """
    layers, shapes = _layers(model, network), model.network_shapes(network)
    runs: dict[str, list[str]] = {}
    previous: object = None
    for block in model.blocks(network):
        inside = [layer for layer in layers if layer.startswith(f"{block}.")]
        kind = (
            block.rpartition(".")[0],
            [
                (layer.removeprefix(block), shapes.get(layer), plan.dtype(layer), plan.exponent(layer))
                for layer in inside
            ],
        )
        if kind == previous:
            runs[next(reversed(runs))].append(block)
        else:
            runs[block] = []
        previous = kind
    return runs


def _point_into(graph: ir.Model, places: Mapping[str, TensorInfo], weights: Path) -> None:
    """Give each weight its place in the weights file."""
    import onnx_ir as ir

    for name, info in places.items():
        value = graph.graph.initializers[name]
        if value.dtype is None:
            raise InternalError(f"weight `{name}` of the traced graph has no dtype")
        shape = ir.Shape(info.shape)
        value.const_value = _external(name, weights.name, info.offset, info.size_bytes, value.dtype, shape)


def _save(graph: ir.Model, stem: Path, suffix: str) -> tuple[str, Path]:
    data = _serialized(graph)
    digest = hashlib.sha256(data).hexdigest()
    path = stem.with_name(f"{stem.name}.{digest[:DIGEST_DIGITS]}{suffix}")
    write_bytes(path, data)
    return digest, path


def _serialized(graph: ir.Model) -> bytes:
    import onnx_ir as ir

    data: bytes = ir.serde.serialize_model(graph).SerializeToString(deterministic=True)
    return data


def _external(
    name: str, location: str, offset: int, length: int, dtype: ir.DataType, shape: ir.Shape
) -> ir.ExternalTensor:
    import onnx_ir as ir

    return ir.ExternalTensor(
        location=location, offset=offset, length=length, dtype=dtype, shape=shape, name=name, base_dir=""
    )


def _check(path: Path) -> None:
    import onnx

    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise ArtifactError(f"`{path.name}` fails onnx.checker: {error}") from error
