"""Activation statistics of a float32 ONNX graph: ONNX Runtime returns the values of its points as further outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2p_calib.layout import QuantizationLayout, layer_of
from l2p_calib.statistics.ranges import RangeCounter
from l2p_calib.statistics.torch_hooks import RESIDUAL
from l2p_runtime.errors import ArtifactError
from l2p_runtime.onnx_library import import_onnxruntime

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[Any]]

GROUP_BYTES = 1 << 30
"""Maximum bytes of the point values of one run; an ONNX graph with more is run several times."""

_PRODUCTS = ("MatMul", "Gemm", "Conv")


def point_values(
    graph: onnx.GraphProto, layout: QuantizationLayout, published_names: Callable[[str], Sequence[str]]
) -> dict[str, str]:
    """Point to the name of its value in an ONNX graph.

    Args:
        graph: an exported network in float32.
        layout: the network's points, and the rotations among them.
        published_names: name of a stored weight to the published names of what it holds.

    Raises:
        ArtifactError: a point is not in the ONNX graph.
    """
    found = dict(_values(graph, layout.rotations, published_names))
    wanted = [point.name for point in layout.points]
    missing = [point for point in wanted if point not in found]
    if missing:
        raise ArtifactError(
            f"graph `{graph.name}` has no `{missing[0]}`", hint="calibrate a bundle of this version with an fp32 plan"
        )
    return {point: found[point] for point in wanted}


def count_graph(
    path: Path,
    points: Mapping[str, str],
    samples: Sequence[Callable[[], Arrays]],
    values_bytes: int,
    keep: Callable[[int, Arrays], None],
    advance: Callable[[int], None],
) -> dict[str, RangeCounter]:
    """Run an ONNX graph on every sample and count the values of its points.

    Args:
        path: the ONNX graph, in a folder with its weights.
        points: point to the name of its value, from `point_values`.
        samples: each makes the inputs of one call.
        values_bytes: approximate bytes of the values of all points in the largest sample.
        keep: given the number of each sample and the network's own outputs for it.
        advance: told 1 after each run.

    Returns:
        Point to its counter.
    """
    counters = {point: RangeCounter() for point in points}
    groups = graph_groups(tuple(points), values_bytes)
    for number, group in enumerate(groups):
        is_last = number == len(groups) - 1
        session, own = _open(path, [points[point] for point in group], with_own=is_last)
        for index, sample in enumerate(samples):
            names = list(dict.fromkeys([*(points[point] for point in group), *own]))
            wanted = {item.name for item in session.get_inputs()}
            inputs = {name: value for name, value in sample().items() if name in wanted}
            made = dict(zip(names, session.run(names, inputs), strict=True))
            for point in group:
                counters[point].add(made[points[point]])
            if is_last:
                keep(index, {name: made[name] for name in own})
            advance(1)
    return counters


def graph_groups(points: Sequence[str], values_bytes: int) -> list[Sequence[str]]:
    """Points in groups whose values take about `GROUP_BYTES` at most; the ONNX graph runs once per group."""
    groups = max(1, min(len(points), -(-values_bytes // GROUP_BYTES)))
    size = -(-len(points) // groups)
    return [points[start : start + size] for start in range(0, len(points), size)]


def _open(path: Path, values: Sequence[str], *, with_own: bool) -> tuple[Any, list[str]]:
    """A session whose outputs are these values and, if asked for, the ONNX graph's own; and the names of the latter."""
    import onnx

    ort = import_onnxruntime()
    model = onnx.load(str(path), load_external_data=False)
    own = [output.name for output in model.graph.output] if with_own else []
    kept = [output for output in model.graph.output if output.name in own]
    more = [name for name in dict.fromkeys(values) if name not in own]
    added = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in more]
    del model.graph.output[:]
    model.graph.output.extend([*kept, *added])
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = False
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    # Fusion removes intermediate values, which must stay.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"], enable_fallback=0
    )
    return session, own


def _values(
    graph: onnx.GraphProto, rotations: Mapping[str, str], published_names: Callable[[str], Sequence[str]]
) -> Iterator[tuple[str, str]]:
    """Every point of an ONNX graph with its value; `rotations`: layer whose output is rotated to the rotated input."""
    weights = {tensor.name for tensor in graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    maker: dict[str, onnx.NodeProto] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
        maker |= dict.fromkeys(node.output, node)
    for node in graph.node:
        if node.op_type in _PRODUCTS and node.input[1] in weights:
            layers = [layer_of(name) for name in published_names(node.input[1])]
            for layer, out in zip(layers, _parts(node, len(layers), readers), strict=True):
                made = _biased(out, layer, readers)
                yield f"{layer}:in", node.input[0]
                yield f"{layer}:out", made
                yield from _rotated_point(layer, made, rotations, readers)
        elif node.op_type == "Mul" and weights.intersection(node.input):
            (weight,) = weights.intersection(node.input)
            normed = next(name for name in node.input if name != weight)
            source = _normed(normed, maker, readers)
            if weight.endswith(".weight") and source is not None:
                yield f"{layer_of(weight)}:in", source
                yield f"{layer_of(weight)}:out", node.output[0]
                yield from _rotated_point(layer_of(weight), node.output[0], rotations, readers)
    yield f"{RESIDUAL}{graph.name}:out", graph.output[0].name


def _parts(node: onnx.NodeProto, count: int, readers: Mapping[str, Sequence[onnx.NodeProto]]) -> list[str]:
    """The outputs of a matrix product, one per joined weight: it is reshaped, split, and each part squeezed."""
    if count == 1:
        return [node.output[0]]
    (reshape,) = readers[node.output[0]]
    (split,) = readers[reshape.output[0]]
    return [readers[part][0].output[0] for part in split.output]


def _biased(value: str, layer: str, readers: Mapping[str, Sequence[onnx.NodeProto]]) -> str:
    """The value of a matrix product with its bias, where a node of its own adds that."""
    following = readers.get(value, ())
    if len(following) == 1 and following[0].op_type == "Add" and f"{layer}.bias" in following[0].input:
        return str(following[0].output[0])
    return value


def _normed(
    value: str, maker: Mapping[str, onnx.NodeProto], readers: Mapping[str, Sequence[onnx.NodeProto]]
) -> str | None:
    """The input x of a norm, from its value before the gain, x / rms(x); None where it is no norm."""
    product = maker.get(value)
    if product is None or product.op_type != "Mul":
        return None
    return next((name for name in product.input if any(node.op_type == "Pow" for node in readers[name])), None)


def _rotated_point(
    layer: str, value: str, rotations: Mapping[str, str], readers: Mapping[str, Sequence[onnx.NodeProto]]
) -> Iterator[tuple[str, str]]:
    """The point of the rotation of a layer's value, if there is one."""
    rotated = _rotated(value, readers) if layer in rotations else None
    if rotated is not None:
        yield f"{rotations[layer]}:out", rotated


def _rotated(value: str, readers: Mapping[str, Sequence[onnx.NodeProto]]) -> str | None:
    """The rotated value: a rotation takes pairs apart, and the nearest Concat behind the value joins them again."""
    reached = [value]
    for name in reached:
        for node in readers.get(name, ()):
            if node.op_type == "Concat":
                return str(node.output[0])
            # A Concat of sizes, for a Reshape, is another one.
            reached += node.output if node.op_type != "Shape" else ()
    return None
