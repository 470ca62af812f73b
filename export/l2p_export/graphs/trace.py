"""Traces a network into an ONNX graph that has the names of its weights and no values."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from l2p_export.graphs.float8 import decode_weights, round_attention, round_inputs
from l2p_export.graphs.join import join_products
from l2p_export.graphs.simplify import simplify
from l2p_export.graphs.transpose import store_transposed
from l2p_export.graphs.unroll import unroll
from l2p_runtime.contract import NetworkSpec, TensorSpec, split_dim

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import nn

# Sizes of the traced example. None is 0 or 1, which torch.export would fix, and no two are equal.
_EXAMPLE_SIZES = {"B": 2, "h": 3, "w": 5, "r": 7, "t": 2, "L": 11}
_EXAMPLE_PADS = 17


def trace_network(
    build: Callable[[], nn.Module],
    spec: NetworkSpec,
    opset: int,
    repeats: Mapping[str, Sequence[str]],
    float8: Mapping[str, str] | None = None,
    float8_attention: Mapping[str, Sequence[str]] | None = None,
) -> ir.Model:
    """Trace one network with every size of its spec dynamic.

    Args:
        build: makes the network; called on the meta device, so that no weight is ever allocated.
        spec: the network's inputs and outputs.
        opset: ONNX opset. FP32 engines need 20, which decomposes attention; 23 has the `Attention` operator.
        repeats: each traced block, to the blocks of equal structure that follow it.
        float8: published name of each weight in FP8, to the point that it reads; None if there is none.
        float8_attention: for each attention in FP8, the weight that makes its values, to the points of its inputs.

    Returns:
        A graph whose initializers have published names, dtypes and shapes, and no values.

    Raises:
        InternalError: attention must be in FP8 but is decomposed, as at opset 20.
    """
    import torch

    with torch.device("meta"), _quiet():
        model = _export(build(), spec, opset)
        for value in model.graph.initializers.values():
            value.const_value = None
        unroll(model, repeats)
        simplify(model, set(model.graph.initializers))
    store_transposed(model)
    round_inputs(model, float8 or {})
    round_attention(model, float8_attention or {})
    join_products(model)
    decode_weights(model)
    _strip(model, spec)
    return model


def _export(module: nn.Module, spec: NetworkSpec, opset: int) -> ir.Model:
    import torch

    sizes = _EXAMPLE_SIZES | {"s": _EXAMPLE_SIZES["h"] * _EXAMPLE_SIZES["w"] + _EXAMPLE_PADS + 32 * _EXAMPLE_SIZES["t"]}
    dims = {symbol: torch.export.Dim(symbol) for symbol in spec.symbols()}
    program = torch.onnx.export(
        module,
        args=(),
        kwargs={tensor.name: _example(tensor, sizes) for tensor in spec.inputs},
        dynamo=True,
        dynamic_shapes={tensor.name: _dynamic_axes(tensor, dims) for tensor in spec.inputs},
        input_names=[tensor.name for tensor in spec.inputs],
        output_names=[tensor.name for tensor in spec.outputs],
        opset_version=opset,
        external_data=True,
        optimize=False,
        verify=False,
        verbose=False,
    )
    assert program is not None  # noqa: S101 - `dynamo=True` without a file returns a program
    return program.model


def _example(tensor: TensorSpec, sizes: Mapping[str, int]) -> Any:
    import torch

    return torch.empty(tensor.resolve(sizes), dtype=getattr(torch, tensor.dtype), device="meta")


def _dynamic_axes(tensor: TensorSpec, dims: Mapping[str, Any]) -> dict[int, Any]:
    axes = {}
    for axis, dim in enumerate(tensor.shape):
        factor, symbol = split_dim(dim)
        if symbol:
            axes[axis] = factor * dims[symbol] if factor > 1 else dims[symbol]
    return axes


def _strip(model: ir.Model, spec: NetworkSpec) -> None:
    """Drop everything that depends on this machine: the exporter writes stack traces with paths into every node."""
    for value, tensor in zip(model.graph.inputs, spec.inputs, strict=True):
        # A network without blocks returns an input, and the exporter gives that input the output's name.
        value.name = tensor.name
    model.graph.name = spec.name
    model.producer_name, model.producer_version, model.doc_string = "l2p-export", None, None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the logs and warnings of exporter and optimizer; their errors still raise."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "onnxscript", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
