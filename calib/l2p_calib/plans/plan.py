"""Precision plans: each layer's dtype, the power of two that its weights are scaled by, and the reason.

docs/design.md, "Precision", summarizes the rules.

A plan's name is free; its base decides the thresholds that a bundle is judged by.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal

from l2p_calib.layout import QuantizationLayout
from l2p_runtime.contract import BasePrecision, PlanRef
from l2p_runtime.contract.codec import to_json

ComputeDType = Literal["float32", "float16", "bfloat16", "float8_e4m3fn"]

FLOAT8: Final = "float8_e4m3fn"
"""The dtype of FP8 layers. A linear layer rounds its inputs and weights to it, but not its outputs. An input of
attention is rounded to it; the output of attention has the plan's default dtype."""

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, FLOAT8: 1}
"""Bytes of a value of each dtype."""
SCALE_BYTES = 2
"""Bytes of the scale of an FP8 weight's output channel."""

OPSET_DECOMPOSED_ATTENTION = 20
OPSET_WHOLE_ATTENTION = 23


@dataclass(frozen=True, slots=True)
class LayerRule:
    """The dtype of one layer, where it differs from the plan's default.

    Attributes:
        layer: published layer name, as `t_embedder` or `layers.12`; or `residual`, the stream between blocks, of one
            network as `residual.trunk`.
        reason: why, with the figure that was measured.
    """

    layer: str
    dtype: ComputeDType
    reason: str

    def names(self, layer: str) -> bool:
        """Whether a layer or tensor is meant."""
        return layer == self.layer or layer.startswith(self.layer + ".")


@dataclass(frozen=True, slots=True)
class LayerScale:
    """A layer whose weights are stored times two to the power of `exponent`; the norm behind it undoes that."""

    layer: str
    exponent: int


@dataclass(frozen=True, slots=True)
class InputScale:
    """What the inputs of an FP8 layer are divided by, before any scaling by powers of two."""

    layer: str
    scale: float


@dataclass(frozen=True, slots=True)
class PrecisionPlan:
    """The dtype that each layer stores its weights in and computes in, scales of weights, and scales of FP8 inputs.

    Attributes:
        name: free; files and manifests know the plan by it.
        base: the plan of `PLANS` that it was made from; decides thresholds and what a GPU must have.
        default: dtype of layers that no rule names.
    """

    name: str
    base: BasePrecision
    default: ComputeDType
    rules: tuple[LayerRule, ...] = ()
    scales: tuple[LayerScale, ...] = ()
    inputs: tuple[InputScale, ...] = ()

    def dtype(self, layer: str) -> ComputeDType:
        """The dtype of a layer or of one of its tensors: the longest rule that names it, else the default."""
        matching = [rule for rule in self.rules if rule.names(layer)]
        return max(matching, key=lambda rule: len(rule.layer)).dtype if matching else self.default

    def carrier(self, layer: str) -> ComputeDType:
        """The dtype of a layer's outputs, and of its inputs before rounding: its own, or the default for FP8 layers."""
        dtype = self.dtype(layer)
        return self.default if dtype == FLOAT8 else dtype

    def exponent(self, layer: str) -> int:
        """The power of two that a layer's weights are scaled by."""
        return next((scale.exponent for scale in self.scales if scale.layer == layer), 0)

    def of_layers(self, layers: Collection[str]) -> PrecisionPlan:
        """The plan restricted to some layers, without the reasons: equal where the layers' ONNX graphs are equal.

        Args:
            layers: names of layers and tensors.
        """
        names = set(layers)
        rules = {rule.layer: replace(rule, reason="") for rule in self.rules if any(map(rule.names, names))}
        scales = [scale for scale in self.scales if scale.layer in names and scale.exponent]
        inputs = [item for item in self.inputs if item.layer in names]
        return replace(
            self,
            rules=tuple(rules[layer] for layer in sorted(rules)),
            scales=tuple(sorted(scales, key=lambda scale: scale.layer)),
            inputs=tuple(sorted(inputs, key=lambda item: item.layer)),
        )

    def weight_bytes(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Bytes of weights of these names and shapes, with the scales of those in FP8."""
        dtypes = {name: self.dtype(name) for name in shapes}
        values = sum(math.prod(shape) * ITEM_BYTES[dtypes[name]] for name, shape in shapes.items())
        return values + sum(SCALE_BYTES * shape[0] for name, shape in shapes.items() if dtypes[name] == FLOAT8)

    @property
    def dtypes(self) -> tuple[ComputeDType, ...]:
        """Every dtype that it computes in."""
        return tuple(dict.fromkeys([self.default, *(rule.dtype for rule in self.rules)]))

    @property
    def opset(self) -> int:
        """ONNX opset of the plan's ONNX graphs.

        TensorRT for RTX refuses the float32 `Attention` operator of opset 23 and builds it decomposed at 20
        (docs/design.md, "TensorRT facts"); a float16 or bfloat16 ONNX graph keeps it whole.
        """
        return OPSET_DECOMPOSED_ATTENTION if self.default == "float32" else OPSET_WHOLE_ATTENTION

    @property
    def ref(self) -> PlanRef:
        """The plan's name and the digest of its content."""
        text = json.dumps(to_json(self), sort_keys=True)
        return PlanRef(self.name, digest=hashlib.sha256(text.encode()).hexdigest()[:16], base=self.base)


Role = Literal["linear", "attention"]
"""Kinds of layers that may be in FP8: linear layers (`linear_layers`), and inputs of attention (`attentions`)."""

_REASONS: Mapping[Role, str] = {
    "linear": "a product of attention or feed-forward",
    "attention": "an input of attention itself",
}


@dataclass(frozen=True, slots=True)
class NamedPlan:
    """A plan before a model is known: the dtype of layers by role. A model's layouts give each layer its role.

    Attributes:
        name: free, as of a plan.
        base: the plan of `PLANS` that it is, or was made from.
        default: dtype of layers.
        float8: roles whose layers are in FP8; all others have the default, but for those that are always float32.
    """

    name: str
    base: BasePrecision
    default: ComputeDType
    float8: tuple[Role, ...] = ()

    def of(self, layouts: Iterable[QuantizationLayout]) -> PrecisionPlan:
        """The plan of a model's layers, by the layouts of its networks."""
        rules: list[LayerRule] = []
        for layout in layouts:
            fixed = layout.float32 if self.default != "float32" else ()
            rules += [LayerRule(item.layer, "float32", item.reason) for item in fixed]
            inputs = [part for attention in layout.attentions for part in attention.inputs]
            for role, parts in (("linear", layout.linear_layers), ("attention", inputs)):
                if role in self.float8:
                    rules += [LayerRule(part.layer, FLOAT8, _REASONS[role]) for part in parts]
        return PrecisionPlan(self.name, self.base, self.default, tuple(rules))

    @property
    def dtypes(self) -> tuple[ComputeDType, ...]:
        """Every dtype that a plan made from it may compute in."""
        found: list[ComputeDType] = [self.default, "float32"]
        return tuple(dict.fromkeys([*found, FLOAT8] if self.float8 else found))


PLANS: dict[BasePrecision, NamedPlan] = {
    "fp32": NamedPlan("fp32", "fp32", "float32"),
    "fp16": NamedPlan("fp16", "fp16", "float16"),
    "fp16-plain": NamedPlan("fp16-plain", "fp16-plain", "float16"),
    "fp8": NamedPlan("fp8", "fp8", "float16", ("linear",)),
    "fp8-attention": NamedPlan("fp8-attention", "fp8-attention", "float16", ("linear", "attention")),
    "fp8-plain": NamedPlan("fp8-plain", "fp8-plain", "float16", ("linear",)),
    "bf16": NamedPlan("bf16", "bf16", "bfloat16"),
}
"""The plans by name, as they are before anything is measured."""

SWEPT: tuple[BasePrecision, ...] = ("fp8", "fp8-attention")
"""Plans that a sweep can start from."""

MEASURED: tuple[BasePrecision, ...] = ("fp16", *SWEPT, "fp8-plain")
"""Plans that a build completes with measurements; the others are used unchanged."""
