"""Networks exported by the product's own way and run by ONNX Runtime, and the same networks in torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from l2p_calib.plans.plan import PrecisionPlan
from l2p_export.families.z_image_l2p import Z_IMAGE_L2P, ZImageModel
from l2p_export.families.z_image_l2p.dimensions import Dimensions
from l2p_export.graphs.export import export_graph
from l2p_export.precision.plans import plain_plan
from l2p_export.tensors.files import open_weights
from l2p_export.tensors.sources import TensorSource
from l2p_runtime.backends.onnx import OnnxEngine
from l2p_runtime.contract import NetworkSpec
from l2p_runtime.tensorfile import write_tensorfile
from parity.models import State, network_spec

Arrays = Mapping[str, NDArray[Any]]


def network_shapes(d: Dimensions, name: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of the weights of one network alone."""
    with torch.device("meta"):
        module = ZImageModel(d).module(name, lambda layer: torch.float32)
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


def store(state: State, path: Path) -> dict[str, TensorSource]:
    """Write weights into a checkpoint and open it as the product does; a network without weights has no file."""
    if not state:
        return {}
    write_tensorfile(path, {key: value.numpy() for key, value in state.items()})
    return dict(Z_IMAGE_L2P.read(open_weights(path)).tensors)


def export(
    d: Dimensions,
    name: str,
    tensors: Mapping[str, TensorSource],
    folder: Path,
    plan: PrecisionPlan | None = None,
) -> OnnxEngine:
    """Trace, write and open the graph of one network, in float32 without a plan."""
    spec, model = network_spec(d, name), ZImageModel(d)
    files = export_graph(model, tensors, spec, plan or plain_plan(model, "fp32"), folder, lambda done: None)
    return OnnxEngine(files.graph, files.weights, spec)


def run(engine: OnnxEngine, inputs: Arrays) -> tuple[NDArray[np.float32], ...]:
    """Outputs of a graph in the order of its spec; sizes follow from the inputs."""
    sizes = _sizes(engine.spec, inputs)
    outputs = {out.name: np.full(out.resolve(sizes), np.nan, np.float32) for out in engine.spec.outputs}
    engine.run({key: np.ascontiguousarray(value) for key, value in inputs.items()}, outputs)
    return tuple(outputs.values())


def _sizes(spec: NetworkSpec, inputs: Arrays) -> dict[str, int]:
    """Value of each symbol, from the shapes of what is given."""
    sizes: dict[str, int] = {}
    for tensor in spec.inputs:
        for dim, size in zip(tensor.shape, inputs[tensor.name].shape, strict=True):
            if isinstance(dim, str):
                factor, _, symbol = dim.rpartition("*")
                sizes[symbol] = size // int(factor or 1)
    return sizes
