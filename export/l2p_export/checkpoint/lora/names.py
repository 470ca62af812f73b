"""Maps the keys of LoRA files to layers of the checkpoint, and to their part in a layer's change.

PEFT                 base_model.model.layers.12.attention.to_q.lora_A[.ADAPTER].weight
ai-toolkit           diffusion_model.layers.12.attention.to_q.lora_A.weight, .alpha
diffusers            transformer.layers.12.attention.to_q.lora_A.weight or .lora.down.weight, or bare
kohya, OneTrainer    lora_unet_layers_12_attention_to_q.lora_down.weight, .alpha; lora_transformer_
LyCORIS              lycoris_layers_12_attention_to_q.hada_w1_a, .lokr_w1, .lora_mid.weight, .dora_scale, .alpha
ComfyUI              diffusion_model.layers.12.attention_norm1.diff, .diff_b
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

Shapes = Mapping[str, tuple[int, ...]]

PEFT_PREFIX = "base_model.model."

_ADAPTER = r"(?:\.(?!weight$|bias$)(?P<adapter>[^.]+))?"
_PARTS = tuple(
    (re.compile(rf"(?P<layer>.+?){pattern}"), part)
    for part, pattern in (
        ("down", rf"\.lora_(?:A|down){_ADAPTER}(?:\.weight)?"),
        ("up", rf"\.lora_(?:B|up){_ADAPTER}(?:\.weight)?"),
        ("mid", rf"\.lora_mid{_ADAPTER}(?:\.weight)?"),
        ("bias", rf"\.lora_(?:B|up){_ADAPTER}\.bias"),
        ("down", r"(?:[._]lora|\.lora_linear_layer)\.down\.weight"),
        ("up", r"(?:[._]lora|\.lora_linear_layer)\.up\.weight"),
        ("bias", r"(?:[._]lora|\.lora_linear_layer)\.up\.bias"),
        ("magnitude", rf"\.lora_magnitude_vector{_ADAPTER}(?:\.weight)?"),
        ("dora_scale", r"\.dora_scale"),
        ("alpha", r"\.alpha"),
        *((part, rf"\.{part}{_ADAPTER}") for part in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")),
        *((part, rf"\.{part}{_ADAPTER}") for part in ("hada_t1", "hada_t2", "lokr_w1", "lokr_w2", "lokr_t2")),
        *((part, rf"\.{part}{_ADAPTER}") for part in ("lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b")),
        ("diff", r"\.(?:diff|w_norm)"),
        ("diff_b", r"\.(?:diff_b|b_norm)"),
    )
)

# What tools put before a layer's name, with underscores for dots; `lora_unet__` has two.
_WRAPPER = re.compile(
    r"_+|(?:base_model|diffusion_model|model|transformer|pipe|dit|prior_unet|unet|orig_mod|module|net|lora|lycoris)_+"
)
_DOTTED_WRAPPER = re.compile(r"(?:(?:model|diffusion_model|transformer|pipe|dit|unet|_orig_mod|module|net)\.)+")
_TEXT_ENCODER = re.compile(
    r"(?:base_model\.model\.)?(?:(?:lora|lycoris)_)?(?:te\d*|text_encoders?(?:_?\d+)?|text_model|cond_stage_model"
    r"|conditioner|clip_[lg]|qwen\w*?|t5xxl)[._].+"
)


@dataclass(frozen=True, slots=True)
class Key:
    """One parsed key of a LoRA file.

    Attributes:
        layer: the layer as the file spells it, with its prefix.
        part: as `down`, `up`, `alpha`, `hada_w1_a`.
        adapter: PEFT's name of the adapter; empty where the key has none.
    """

    layer: str
    part: str
    adapter: str = ""


def parse_key(name: str) -> Key | None:
    """Parse a key; None if it is of no kind that is read."""
    for pattern, part in _PARTS:
        match = pattern.fullmatch(name)
        if match is not None:
            return Key(match["layer"], part, match.groupdict().get("adapter") or "")
    return None


def is_text_encoder(name: str) -> bool:
    """Whether a key belongs to a text encoder."""
    return _TEXT_ENCODER.fullmatch(name) is not None


def module_name(layer: str) -> str:
    """The name that PEFT knew the layer by: without PEFT's own prefix, else without that of the tool."""
    if layer.startswith(PEFT_PREFIX):
        return layer.removeprefix(PEFT_PREFIX)
    return _DOTTED_WRAPPER.sub("", layer, count=1) if _DOTTED_WRAPPER.match(layer) else layer


class LayerNames:
    """Every name that a layer may have, to the published weights that it stands for.

    Names are looked up with underscores for dots: kohya writes them so, and every other spelling can be converted.
    """

    def __init__(self, shapes: Shapes, aliases: Mapping[str, tuple[str, ...]], replaced: Shapes | None = None) -> None:
        self._weights = {flat(name.removesuffix(".weight")): (name,) for name in shapes if name.endswith(".weight")} | {
            flat(layer): weights for layer, weights in aliases.items()
        }
        self._replaced = {flat(layer): shape for layer, shape in (replaced or {}).items()}

    def find(self, layer: str) -> str:
        """The layer with underscores and without what tools put before it; empty for an unknown layer."""
        name = flat(layer)
        while name not in self._weights and name not in self._replaced:
            wrapper = _WRAPPER.match(name)
            if wrapper is None:
                return ""
            name = name[wrapper.end() :]
        return name

    def weights(self, layer: str) -> tuple[str, ...]:
        """Published weights of a layer: several for a fused layer, none for an unknown one."""
        return self._weights.get(self.find(layer), ())

    def replaced(self, layer: str) -> tuple[int, ...] | None:
        """The shape of the weight of a layer that only the latent source has; None for any other."""
        return self._replaced.get(self.find(layer))


def flat(layer: str) -> str:
    """A name with underscores for dots."""
    return layer.replace(".", "_")
