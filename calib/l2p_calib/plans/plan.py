"""Precision plans: each layer's dtype, the power of two that its weights are scaled by, and why.

docs/design.md, "Precision", has the rules in short.

A plan's name is free; its base says what a bundle is judged by.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal

from l2p_calib.layout import ATTENTION_INPUTS
from l2p_runtime.contract import BasePrecision, PlanRef
from l2p_runtime.contract.codec import to_json

ComputeDType = Literal["float32", "float16", "bfloat16", "float8_e4m3fn"]

FLOAT8: Final = "float8_e4m3fn"
"""The dtype of products of FP8 numbers: their inputs and weights are rounded to it, what they make is not. An input of
attention that has it is rounded, and attention makes the plan's default."""

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
            network as `residual.trunk`; after `*.`, the end of layers' names, as `*.feed_forward.w1`.
        reason: why, with the figure that was measured.
    """

    layer: str
    dtype: ComputeDType
    reason: str

    def names(self, layer: str) -> bool:
        """Whether a layer or tensor is meant."""
        if self.layer.startswith("*."):
            return f"{self.layer[1:]}." in f"{layer}."
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
    """Which dtype each layer's weights are stored in, and so computes in; scales of weights, and of inputs of FP8.

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
        """The dtype of what a layer makes, and of what it reads before it is rounded: its own, but for FP8 layers."""
        dtype = self.dtype(layer)
        return self.default if dtype == FLOAT8 else dtype

    def exponent(self, layer: str) -> int:
        """The power of two that a layer's weights are scaled by."""
        return next((scale.exponent for scale in self.scales if scale.layer == layer), 0)

    def of_layers(self, layers: Collection[str]) -> PrecisionPlan:
        """What it says of some layers, without the reasons: equal where the layers' graphs are equal.

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
        """ONNX operator set of the plan's graphs.

        TensorRT for RTX refuses the float32 `Attention` operator of opset 23 and builds it decomposed at 20
        (docs/design.md, "TensorRT facts"); a float16 or bfloat16 graph keeps it whole.
        """
        return OPSET_DECOMPOSED_ATTENTION if self.default == "float32" else OPSET_WHOLE_ATTENTION

    @property
    def ref(self) -> PlanRef:
        """The plan's name and the digest of its content."""
        text = json.dumps(to_json(self), sort_keys=True)
        return PlanRef(self.name, digest=hashlib.sha256(text.encode()).hexdigest()[:16], base=self.base)


_FP16_RULES = (LayerRule("t_embedder", "float32", "angles reach 1000 rad; float16 spaces numbers there by 0.5"),)

_FP8_RULES = (
    *_FP16_RULES,
    *(
        LayerRule(f"*.{layer}", FLOAT8, "a product of attention or feed-forward")
        for layer in (
            *(f"attention.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
            *(f"feed_forward.{name}" for name in ("w1", "w2", "w3")),
        )
    ),
)

_ATTENTION_RULES = tuple(
    LayerRule(f"*.attention.{name}", FLOAT8, "an input of attention itself") for name in ATTENTION_INPUTS
)

PLANS: dict[BasePrecision, PrecisionPlan] = {
    "fp32": PrecisionPlan("fp32", "fp32", "float32"),
    "fp16": PrecisionPlan("fp16", "fp16", "float16", _FP16_RULES),
    "fp16-plain": PrecisionPlan("fp16-plain", "fp16-plain", "float16", _FP16_RULES),
    "fp8": PrecisionPlan("fp8", "fp8", "float16", _FP8_RULES),
    "fp8-attention": PrecisionPlan("fp8-attention", "fp8-attention", "float16", (*_FP8_RULES, *_ATTENTION_RULES)),
    "fp8-plain": PrecisionPlan("fp8-plain", "fp8-plain", "float16", _FP8_RULES),
    "bf16": PrecisionPlan(
        "bf16",
        "bf16",
        "bfloat16",
        (LayerRule("t_embedder", "float32", "angles reach 1000 rad; bfloat16 spaces numbers there by 4"),),
    ),
}
"""The plans by name, as they are before anything is measured."""

SWEPT: tuple[BasePrecision, ...] = ("fp8", "fp8-attention")
"""Plans that a sweep can start from."""

MEASURED: tuple[BasePrecision, ...] = ("fp16", *SWEPT, "fp8-plain")
"""Plans that a build completes from what it measures; the others are taken as they stand."""
