"""Maps the keys of LoRA files to published layer names: prefixes, underscores for dots, fused q/k/v.

PEFT                 base_model.model.layers.12.attention.to_q.lora_A[.default].weight
ai-toolkit           diffusion_model.layers.12.attention.to_q.lora_A.weight, .alpha
diffusers            transformer.layers.12.attention.to_q.lora_A.weight, or bare
kohya, OneTrainer    lora_unet_layers_12_attention_to_q.lora_down.weight, .alpha; lora_transformer_
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Shapes = Mapping[str, tuple[int, ...]]

# `lora_unet__` is what kohya's own network module writes when its prefix ends in an underscore.
_PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "pipe.dit.",
    "lora_unet__",
    "lora_unet_",
    "lora_transformer_",
)
_KEY = re.compile(r"(.+)\.(?:(lora_A|lora_down)(?:\.default)?\.weight|(lora_B|lora_up)(?:\.default)?\.weight|(alpha))")
_REFUSED = (
    (re.compile(r"dora_scale|lora_magnitude_vector"), "DoRA", "it rescales whole weight columns, which is no sum"),
    (re.compile(r"\.hada_"), "LoHa", "its change is a product of two products"),
    (re.compile(r"\.lokr_"), "LoKr", "its change is a Kronecker product"),
    (re.compile(r"\.lora_mid\."), "LoCon with a core tensor", "its change is a product of three tensors"),
    (re.compile(r"\.(?:boft|oft)_"), "OFT", "it rotates weights, which is no sum"),
)


@dataclass(frozen=True, slots=True)
class Key:
    """One parsed key of a LoRA file.

    Attributes:
        layer: the layer without prefix, as the file spells it.
        part: `down`, `up` or `alpha`.
    """

    layer: str
    part: str


def parse_key(name: str) -> Key | None:
    """Parse a key; None if it is not a LoRA's."""
    match = _KEY.fullmatch(name)
    if match is None:
        return None
    return Key(without_prefix(match[1]), "down" if match[2] else "up" if match[3] else "alpha")


def without_prefix(layer: str) -> str:
    """Strip the prefixes that tools put before the layer's name."""
    while prefix := next((prefix for prefix in _PREFIXES if layer.startswith(prefix)), ""):
        layer = layer.removeprefix(prefix)
    return layer


def refusal(name: str) -> tuple[str, str] | None:
    """The method that a key belongs to, and why it cannot be merged; None for a plain LoRA."""
    return next(((method, reason) for pattern, method, reason in _REFUSED if pattern.search(name)), None)


class LayerNames:
    """Every name that a layer may have, to the published weights that it stands for.

    Names are looked up with underscores for dots: kohya writes them so, and every other spelling can be converted.
    """

    def __init__(self, shapes: Shapes, aliases: Mapping[str, tuple[str, ...]]) -> None:
        self._weights: dict[str, tuple[str, ...]] = {}
        for name, shape in shapes.items():
            # Matrices and convolutions; a norm or a bias has no two sides.
            if name.endswith(".weight") and len(shape) in (2, 4):
                self._weights[_flat(name.removesuffix(".weight"))] = (name,)
        self._weights |= {_flat(layer): weights for layer, weights in aliases.items()}

    def weights(self, layer: str) -> Sequence[str]:
        """Published weights of a layer, given without prefix: several for a fused layer, none for an unknown one."""
        return self._weights.get(_flat(layer), ())


def _flat(layer: str) -> str:
    return layer.replace(".", "_")
