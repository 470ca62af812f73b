"""Quantization layouts of networks: the points where values can be measured, and what can be done at each.

A point is `LAYER:in` or `LAYER:out`: the input or output of a layer, by its published name. `residual.trunk` is the
stream between the trunk's blocks.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Point:
    """One place in a network whose values a narrow dtype may not hold.

    Attributes:
        name: as `layers.3.feed_forward.w2:in`.
        holders: layers that must all compute in a wider dtype for the point to have that dtype; none where nothing
            can be widened, as inside attention.
        scaled_by: layers whose weights, when they are scaled, scale the point.
    """

    name: str
    holders: tuple[str, ...] = ()
    scaled_by: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Branch:
    """Consecutive layers before a norm: scaling them is exact when the norm's epsilon is scaled too.

    Attributes:
        first: the layer that is scaled where its own output, or what is linear in it, is too large.
        last: the layer whose output the norm reads.
        usual: the one of the two that is scaled in every block.
    """

    first: str
    last: str
    usual: str


@dataclass(frozen=True, slots=True)
class QuantizableLayer:
    """A linear layer that may be in FP8, or one input of attention.

    Attributes:
        layer: its name; an input of attention has a name but no weights, as `layers.3.attention.query`.
        reads: the point of its input; layers that read one point read the same values.
        group: layers that are raised together, as `layers.3 qkv`.
    """

    layer: str
    reads: str
    group: str


@dataclass(frozen=True, slots=True)
class Attention:
    """The attention of one block. Its query, key and value are all FP8, or none.

    Queries and keys are measured after the rotary embedding: a rotation keeps the length of a pair, but can make its
    larger value 1.4 times as large as after the norm.

    Attributes:
        layer: its name, as `layers.3.attention`.
        inputs: query, key and value, named by its name and one of these words; the value is the output of a linear
            layer, `LAYER:out`.
        rotates: layers whose output is rotated into query and key, as norms: an ONNX graph has no weight that could
            name a rotation. Empty where nothing is rotated.
    """

    layer: str
    inputs: tuple[QuantizableLayer, QuantizableLayer, QuantizableLayer]
    rotates: tuple[str, ...] = ()

    @property
    def values_from(self) -> str:
        """The layer that makes the values."""
        return layer_of_point(self.inputs[2].reads)


@dataclass(frozen=True, slots=True)
class Float32Layer:
    """A layer, or all layers whose names begin with `layer`, that is float32 in every plan, with the reason."""

    layer: str
    reason: str


@dataclass(frozen=True, slots=True)
class QuantizationLayout:
    """The points, branches and layers of one network.

    Attributes:
        network: its name.
        layers: every name that a precision plan may give a dtype: layers, pads, and `residual.NETWORK`.
        linear_layers: linear layers that may be in FP8.
        attentions: one per block; a plan lists their inputs only where they are in FP8.
        float32: layers that no plan narrows.
    """

    network: str
    layers: tuple[str, ...]
    points: tuple[Point, ...] = ()
    branches: tuple[Branch, ...] = ()
    linear_layers: tuple[QuantizableLayer, ...] = ()
    attentions: tuple[Attention, ...] = ()
    float32: tuple[Float32Layer, ...] = ()

    def point(self, name: str) -> Point | None:
        """The point of that name."""
        return next((point for point in self.points if point.name == name), None)

    @property
    def quantizable(self) -> tuple[QuantizableLayer, ...]:
        """All that may be in FP8: linear layers, and inputs of attention."""
        return (*self.linear_layers, *(item for attention in self.attentions for item in attention.inputs))

    @property
    def rotations(self) -> dict[str, str]:
        """Layer whose output is rotated to the input of attention that the rotation makes."""
        pairs = ((item.rotates, item.inputs) for item in self.attentions if item.rotates)
        return {layer: part.layer for layers, parts in pairs for layer, part in zip(layers, parts, strict=False)}

    @property
    def scalable(self) -> tuple[str, ...]:
        """Layers whose weights may be scaled."""
        return tuple(layer for branch in self.branches for layer in (branch.first, branch.last))


ATTENTION_INPUTS = ("query", "key", "value")
"""Last parts of the names of attention inputs, in this order."""


def layer_of_point(point: str) -> str:
    """The layer that a point belongs to."""
    return point.rpartition(":")[0]


def layer_of(tensor: str) -> str:
    """The layer that a published tensor belongs to: its name without `.weight` or `.bias`."""
    return tensor.removesuffix(".weight").removesuffix(".bias")
