"""Qwen3 text encoder with its dimensions and no weights; implements `families.base.Networks`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from l2p_calib.layout import QuantizationLayout, layer_of
from l2p_engines.forecast.calls import Operations, Rows
from l2p_export.families.faults import shape_faults
from l2p_export.families.qwen3.dimensions import LAYER, TextEncoderConfig, network_shapes
from l2p_runtime.contract import TEXT_ENCODER, NetworkSpec, TensorSpec

if TYPE_CHECKING:
    import torch
    from torch import nn

    from l2p_export.families.base import Shapes

_ROWS: Rows = "caption"


@dataclass(frozen=True, slots=True)
class Qwen3Model:
    """One `qwen3` architecture; implements `families.base.Networks`, with `text_encoder` as its only network."""

    config: TextEncoderConfig

    @property
    def network(self) -> NetworkSpec:
        """Inputs and output: B prompts of L tokens, padded at the right."""
        return NetworkSpec(
            TEXT_ENCODER,
            (TensorSpec("input_ids", "int64", ("B", "L")), TensorSpec("attention_mask", "int64", ("B", "L"))),
            (TensorSpec("prompt_embeds", "float32", ("B", "L", self.config.sizes.width)),),
        )

    @property
    def networks(self) -> tuple[NetworkSpec, ...]:
        """The one network."""
        return (self.network,)

    @property
    def shapes(self) -> Shapes:
        """Published name and shape of every tensor that the network reads."""
        return network_shapes(self.config)

    @property
    def settings(self) -> TextEncoderConfig:
        """Heads, rotary base and epsilon, which show in no shape."""
        return self.config

    def faults(self, shapes: Shapes) -> list[str]:
        """Missing, unknown and misshapen tensors in `shapes`, one line each."""
        return shape_faults(shapes, self.shapes)

    def module(
        self,
        network: str,
        dtype_of: Callable[[str], torch.dtype],
        blocks: Iterable[str] | None = None,
        exponent_of: Callable[[str], int] | None = None,
    ) -> nn.Module:
        """Build the network on the current device, with uninitialised weights under published names.

        No norm follows a branch of it, so no plan scales its weights, and `exponent_of` is not used.
        """
        from l2p_export.families.qwen3.networks import text_encoder_module

        del exponent_of
        return text_encoder_module(self.config, dtype_of, self.blocks(network) if blocks is None else blocks)

    def blocks(self, network: str) -> tuple[str, ...]:
        """Names of its layers, as `model.layers.5`; the last is not one of them."""
        del network
        return tuple(f"{LAYER}{index}" for index in range(self.config.built_layers))

    def layout(self, network: str) -> QuantizationLayout:
        """Its layers. No plan scales them or has them in FP8; `precision/text.py` measures what float16 has to hold."""
        return QuantizationLayout(network, tuple(dict.fromkeys(map(layer_of, self.shapes))))

    def operations(self, network: str) -> Operations:
        """Every matrix except the embedding table is multiplied by one row per token."""
        sizes = self.config.sizes
        matrices = (name for name, shape in self.shapes.items() if len(shape) == 2 and name.startswith(LAYER))
        attention = (_ROWS, sizes.heads * sizes.head_width)
        return Operations(dict.fromkeys(matrices, _ROWS), {}, (attention,) * len(self.blocks(network)))

    def network_shapes(self, network: str) -> Shapes:
        """Published name and shape of every tensor that the network reads."""
        del network
        return self.shapes
