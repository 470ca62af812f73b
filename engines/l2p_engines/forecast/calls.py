"""Forecasts from shapes, before anything is built: operations, weights, activations, host memory, disk.

    count_tokens -> forward_flops, border_bytes, engine_memory     one denoising call
    weight_bytes -> host_needs                                     a build

Only arithmetic. A figure that rests on a measurement is a named constant with its source. Figures that only a GPU can
tell (seconds, workspace of the kernels it picks) are not forecast. A multiply-add is 2 FLOP.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from l2p_runtime.contract import ModelSpec
from l2p_runtime.memory import CallMemory, call_memory, fused_call_memory

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]

Rows = Literal["call", "image", "padded_image", "caption", "sequence"]
"""The rows of a matrix product, per image of a batch: one for the call, or one per token of a kind."""

PRECISIONS = ("fp32", "fp16", "bf16", "fp8")
"""From the most bytes to the fewest."""

EXPORT_LIBRARIES_BYTES = 512 << 20
"""Python with torch and onnx loaded: 0.3 GB resident as imported, the rest for tracing."""
ENGINE_BUILD_FACTOR = 1.09
"""Anonymous memory over weights (docs/engines.md)."""
ENGINE_BUILD_BYTES = 320 << 20
"""Beside that: the library and its compiler, 150 to 310 MB in every small build."""
ENGINE_KERNEL_BYTES = 10_000_000
"""Bytes of an engine beyond its weights: 2 to 9 MB per network at the published size, 18 MB for its trunk
(docs/engines.md)."""
DISK_SPARE_BYTES = 64 << 20
"""Graphs without their weights, reference cases, and the file system's own bookkeeping."""

_FLOAT_BYTES, _HALF_BYTES = 4, 2


@dataclass(frozen=True, slots=True)
class Operations:
    """Operations of one network with its weights. Weights that are not named are tables, gains and biases.

    Attributes:
        linear_layers: weight [out,in] of a linear layer to the rows of its input.
        convolutions: weight [out,in,k,k] to how often the sides of the image were halved where it runs.
        attentions: the rows of each attention, and the channels of all its heads.
    """

    linear_layers: Mapping[str, Rows]
    convolutions: Mapping[str, int]
    attentions: tuple[tuple[Rows, int], ...] = ()


@dataclass(frozen=True, slots=True)
class NetworkCost:
    """One network as forecasts need it.

    Attributes:
        shapes: published name and shape of every tensor, in the order the model declares them.
        operations: its operations with them.
        float8: tensors that an FP8 plan stores in 8 bits.
        float32: tensors that no plan narrows.
    """

    shapes: Shapes
    operations: Operations
    float8: frozenset[str] = frozenset()
    float32: frozenset[str] = frozenset()

    def bytes_per_value(self, precision: str, name: str) -> int:
        """Bytes that a plain plan stores each value of a tensor in.

        Args:
            precision: one of `PRECISIONS`.
            name: published name of the tensor.
        """
        if precision == "fp32" or name in self.float32:
            return _FLOAT_BYTES
        return 1 if precision == "fp8" and name in self.float8 else _HALF_BYTES


NetworkCosts: TypeAlias = Mapping[str, NetworkCost]
"""Network to its cost."""


@dataclass(frozen=True, slots=True)
class CallSize:
    """Size of one denoising call: image and padded caption."""

    height_px: int
    width_px: int
    caption_tokens: int
    batch: int = 1


@dataclass(frozen=True, slots=True)
class Tokens:
    """Sequence lengths of a call, in tokens.

    Attributes:
        image: N, one for each patch.
        padded_image: N with the pads that follow it.
        sequence: S, padded image tokens and caption together.
    """

    rows: int
    columns: int
    image: int
    padded_image: int
    caption: int
    sequence: int


@dataclass(frozen=True, slots=True)
class Flops:
    """Floating-point operations of one forward, by kind.

    Attributes:
        linear: matrix products with weights, `linear_fp8` included.
        linear_fp8: those that an FP8 plan runs in 8 bits: attention and feed-forward of the transformer blocks.
        attention: matrix products of queries, keys and values.
        unet: convolutions of the pixel head.
    """

    linear: int = 0
    linear_fp8: int = 0
    attention: int = 0
    unet: int = 0

    @property
    def total(self) -> int:
        """Linear, attention and U-Net together."""
        return self.linear + self.attention + self.unet


@dataclass(frozen=True, slots=True)
class HostNeeds:
    """Memory and disk that a build takes, in bytes.

    Attributes:
        export: memory while graphs are written.
        engine: memory while the largest engine is built; 0 when none is.
        memory: the larger of the two.
        graphs: disk for graphs and their weights.
        engines: disk for engines.
        disk: both, with something to spare.
    """

    export: int
    engine: int
    memory: int
    graphs: int
    engines: int
    disk: int


def count_tokens(model: ModelSpec, call: CallSize) -> Tokens:
    """Token counts of a call; its caption is padded if it is not."""
    rows, columns = call.height_px // model.patch_px, call.width_px // model.patch_px
    padded, caption = model.padded(rows * columns), model.padded(call.caption_tokens)
    return Tokens(rows, columns, rows * columns, padded, caption, padded + caption)


def forward_flops(model: ModelSpec, networks: NetworkCosts, call: CallSize) -> dict[str, Flops]:
    """Operations of one forward by network, the caption network and a text encoder once each.

    Norms, activations, rotations and softmax are left out: they are under 1 % and bound by memory, not arithmetic.
    """
    tokens = count_tokens(model, call)
    pixels = call.height_px * call.width_px
    return {network: _network_flops(cost, tokens, pixels, call.batch) for network, cost in networks.items()}


def total_flops(parts: Iterable[Flops]) -> Flops:
    """The sum of several networks."""
    found = list(parts)
    return Flops(*(sum(getattr(part, name) for part in found) for name in Flops.__slots__))


def weight_bytes(networks: NetworkCosts, precision: str) -> dict[str, int]:
    """Bytes of each network's weights under a plain plan."""
    return {
        network: sum(math.prod(shape) * cost.bytes_per_value(precision, name) for name, shape in cost.shapes.items())
        for network, cost in networks.items()
    }


def largest_tensor_bytes(networks: NetworkCosts, precision: str) -> int:
    """Bytes of the largest single tensor as a plain plan stores it."""
    return max(
        math.prod(shape) * cost.bytes_per_value(precision, name)
        for cost in networks.values()
        for name, shape in cost.shapes.items()
    )


def engine_memory(model: ModelSpec, call: CallSize, precision: str) -> CallMemory:
    """Memory of one call in an engine, besides weights."""
    tokens = count_tokens(model, call)
    size = (model, call.batch, tokens.rows, tokens.columns, tokens.caption)
    return call_memory(*size) if precision == "fp32" else fused_call_memory(*size)


def border_bytes(model: ModelSpec, call: CallSize) -> dict[str, int]:
    """Bytes of the inputs and outputs of each network of a step, all float32."""
    tokens = count_tokens(model, call)
    image = 3 * call.height_px * call.width_px
    sequence, caption = tokens.sequence * model.width, tokens.caption * model.width
    values = {
        "stem": image + caption + sequence,
        "trunk": 2 * sequence,
        "tail": 2 * sequence,
        "head": 2 * image + tokens.image * model.width,
    }
    return {network: _FLOAT_BYTES * call.batch * count for network, count in values.items()}


def host_needs(weights: Mapping[tuple[str, str], int], largest_tensor_bytes: int, engine_targets: int = 0) -> HostNeeds:
    """Memory and disk that a build takes.

    Args:
        weights: (network, plan) to the bytes of its weights.
        largest_tensor_bytes: maximum bytes of a stored tensor; weights are streamed, so no more is held.
        engine_targets: number of targets, each with an engine per ONNX graph; 0 for a build of only ONNX graphs.
    """
    graphs = sum(weights.values())
    export = EXPORT_LIBRARIES_BYTES + largest_tensor_bytes
    engine = 0
    if engine_targets and weights:
        # One worker process at a time builds one engine; the process that started it still holds the libraries.
        engine = EXPORT_LIBRARIES_BYTES + ENGINE_BUILD_BYTES + round(ENGINE_BUILD_FACTOR * max(weights.values()))
    engines = engine_targets * (graphs + ENGINE_KERNEL_BYTES * len(weights))
    return HostNeeds(export, engine, max(export, engine), graphs, engines, graphs + engines + DISK_SPARE_BYTES)


def _network_flops(cost: NetworkCost, tokens: Tokens, pixels: int, batch: int) -> Flops:
    shapes, operations = cost.shapes, cost.operations
    rows = {"call": 1, "image": tokens.image, "padded_image": tokens.padded_image, "caption": tokens.caption}
    rows["sequence"] = tokens.sequence
    linear_flops = {name: 2 * math.prod(shapes[name]) * rows[kind] for name, kind in operations.linear_layers.items()}
    linear_fp8 = sum(count for name, count in linear_flops.items() if name in cost.float8)
    # Scores, and their product with the values: two matrix products of S x S per channel.
    attention = sum(4 * rows[kind] ** 2 * channels for kind, channels in operations.attentions)
    unet = sum(
        2 * math.prod(shapes[name]) * (pixels // 4**halvings) for name, halvings in operations.convolutions.items()
    )
    return Flops(batch * sum(linear_flops.values()), batch * linear_fp8, batch * attention, batch * unet)
