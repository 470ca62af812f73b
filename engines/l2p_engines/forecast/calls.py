"""What a model takes, told from shapes before anything is built: operations, weights, activations, host memory, disk.

    count_tokens -> forward_flops, border_bytes, engine_memory     one denoising call
    weight_bytes -> host_needs                                     a build

Arithmetic alone. Where a figure rests on a measurement, it is a named constant with its source; what only a GPU can
tell (seconds, workspace of the kernels it picks) is not forecast. A multiply-add is 2 FLOP.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from l2p_runtime.contract import ModelSpec
from l2p_runtime.memory import CallMemory, call_memory, fused_call_memory

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
NetworkShapes: TypeAlias = Mapping[str, Shapes]
"""Network to the published names and shapes of its tensors, in the order the model declares them."""

PRECISIONS = ("fp32", "fp16", "bf16", "fp8")
"""From the most bytes to the fewest."""

EXPORT_LIBRARIES_BYTES = 512 << 20
"""Python with torch and onnx loaded: 0.3 GB resident as imported, the rest for tracing."""
ENGINE_BUILD_FACTOR = 1.09
"""Anonymous memory over weights (docs/engines.md)."""
ENGINE_BUILD_BYTES = 320 << 20
"""Beside that: the library and its compiler, 150 to 310 MB in every small build."""
ENGINE_KERNEL_BYTES = 10_000_000
"""An engine over its weights: 2 to 9 MB a network at the published size, 18 MB for its trunk (docs/engines.md)."""
DISK_SPARE_BYTES = 64 << 20
"""Graphs without their weights, reference cases, and the file system's own bookkeeping."""

_FLOAT_BYTES, _HALF_BYTES = 4, 2
_BLOCK_LINEAR = re.compile(
    r"(?:layers|noise_refiner|context_refiner)\.\d+\.(?:attention\.to_(?:q|k|v|out\.0)|feed_forward\.w[123])\.weight"
)
_QUERY = re.compile(r"(.+)\.(?:attention\.to_q|self_attn\.q_proj)\.weight")
_CONVOLUTION = re.compile(r"local_decoder\.(?:(enc|up|dec)(\w+)\.\d|bottleneck\.0|out_conv)\.weight")


@dataclass(frozen=True, slots=True)
class CallSize:
    """What one denoising call is asked for: an image size and a padded caption."""

    height_px: int
    width_px: int
    caption_tokens: int
    batch: int = 1


@dataclass(frozen=True, slots=True)
class Tokens:
    """How long the sequences of a call are.

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
    """Operations of one forward, split by what does them.

    Attributes:
        linear: matrix products with weights, `linear_fp8` among them.
        linear_fp8: those that an FP8 plan runs in 8 bits: attention and feed-forward of the transformer blocks.
        attention: products of queries, keys and values.
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
    """What a build takes from the machine, in bytes.

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


def forward_flops(model: ModelSpec, weights: NetworkShapes, call: CallSize) -> dict[str, Flops]:
    """Operations of one forward by network, the caption network and a text encoder once each.

    Norms, activations, rotations and softmax are left out: they are under 1 % and bound by memory, not arithmetic.
    """
    tokens = count_tokens(model, call)
    pixels = call.height_px * call.width_px
    return {network: _network_flops(shapes, tokens, pixels, call.batch) for network, shapes in weights.items()}


def total_flops(parts: Iterable[Flops]) -> Flops:
    """The sum of several networks."""
    found = list(parts)
    return Flops(*(sum(getattr(part, name) for part in found) for name in Flops.__slots__))


def bytes_per_value(precision: str, name: str) -> int:
    """Bytes that a plain plan stores each value of a tensor in.

    Args:
        precision: one of `PRECISIONS`.
        name: published name of the tensor.
    """
    if precision == "fp32" or name.startswith("t_embedder."):
        return _FLOAT_BYTES
    return 1 if precision == "fp8" and _BLOCK_LINEAR.fullmatch(name) else _HALF_BYTES


def weight_bytes(weights: NetworkShapes, precision: str) -> dict[str, int]:
    """Bytes of each network's weights under a plain plan."""
    return {
        network: sum(math.prod(shape) * bytes_per_value(precision, name) for name, shape in shapes.items())
        for network, shapes in weights.items()
    }


def largest_tensor_bytes(weights: NetworkShapes, precision: str) -> int:
    """Bytes of the largest single tensor as a plain plan stores it."""
    return max(
        math.prod(shape) * bytes_per_value(precision, name)
        for shapes in weights.values()
        for name, shape in shapes.items()
    )


def engine_memory(model: ModelSpec, call: CallSize, precision: str) -> CallMemory:
    """What one call takes besides weights in an engine."""
    tokens = count_tokens(model, call)
    size = (model, call.batch, tokens.rows, tokens.columns, tokens.caption)
    return call_memory(*size) if precision == "fp32" else fused_call_memory(*size)


def border_bytes(model: ModelSpec, call: CallSize) -> dict[str, int]:
    """Bytes that each network of a step must read and write at its borders, all float32."""
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
        largest_tensor_bytes: of any tensor as it is stored; graphs are streamed, so that no more is held.
        engine_targets: engines of each graph: one for each target; 0 for a build of graphs alone.
    """
    graphs = sum(weights.values())
    export = EXPORT_LIBRARIES_BYTES + largest_tensor_bytes
    engine = 0
    if engine_targets and weights:
        # One worker process at a time builds one engine; the process that started it still holds the libraries.
        engine = EXPORT_LIBRARIES_BYTES + ENGINE_BUILD_BYTES + round(ENGINE_BUILD_FACTOR * max(weights.values()))
    engines = engine_targets * (graphs + ENGINE_KERNEL_BYTES * len(weights))
    return HostNeeds(export, engine, max(export, engine), graphs, engines, graphs + engines + DISK_SPARE_BYTES)


def _network_flops(shapes: Shapes, tokens: Tokens, pixels: int, batch: int) -> Flops:
    linear = linear_fp8 = attention = unet = 0
    stages = _stage_levels(shapes)
    for name, shape in shapes.items():
        if len(shape) == 4:
            unet += 2 * math.prod(shape) * (pixels // 4 ** _level(name, stages))
        elif len(shape) == 2:
            product = 2 * math.prod(shape) * _rows_through(name, tokens)
            linear += product
            linear_fp8 += product if _BLOCK_LINEAR.fullmatch(name) else 0
            if _QUERY.fullmatch(name):
                # Scores and their product with the values: two products of S x S for each channel.
                attention += 4 * _rows_through(name, tokens) ** 2 * shape[0]
    return Flops(batch * linear, batch * linear_fp8, batch * attention, batch * unet)


def _rows_through(name: str, tokens: Tokens) -> int:
    """Rows that a weight matrix is multiplied with in one call; 0 for tables and learned tokens."""
    if name.startswith("t_embedder.") or ".adaLN_modulation." in name:
        return 1
    groups = {
        "all_x_embedder.": tokens.image,
        "noise_refiner.": tokens.padded_image,
        "cap_embedder.": tokens.caption,
        "context_refiner.": tokens.caption,
        "layers.": tokens.sequence,
        "model.layers.": tokens.caption,
    }
    return next((rows for group, rows in groups.items() if name.startswith(group)), 0)


def _stage_levels(shapes: Shapes) -> dict[str, int]:
    """Stage of the U-Net to how often its side was halved; encoders stand full resolution first."""
    matches = (_CONVOLUTION.fullmatch(name) for name in shapes)
    names = [match[2] for match in matches if match and match[1] == "enc"]
    return {name: level for level, name in enumerate(names)}


def _level(name: str, stages: Mapping[str, int]) -> int:
    match = _CONVOLUTION.fullmatch(name)
    if match and match[2]:
        return stages[match[2]]
    return len(stages) if match and "bottleneck" in name else 0
