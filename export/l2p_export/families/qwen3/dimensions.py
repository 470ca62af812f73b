"""Reads the configuration of a Qwen3 text encoder from its folder: sizes, rotary base, epsilon, tensor shapes.

Source: docs/model.md, "Text encoder". A value that calls for another network than `networks.py` builds is refused by
name.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l2p_export.tensors.folders import inside
from l2p_runtime.errors import ArtifactError

PRODUCT_SCALE = 2.0**-6
"""Scale of a feed-forward's product in float16; a power of two, so exact except for values that become subnormal."""

LAYER = "model.layers."
"""Prefix of layer names; the number follows."""

CONFIG_NAME = "config.json"
CONFIG_BYTES_MAX = 4 << 20

_SIZES = {
    "vocabulary": ("vocab_size", 1 << 24),
    "width": ("hidden_size", 1 << 16),
    "layers": ("num_hidden_layers", 1 << 10),
    "heads": ("num_attention_heads", 1 << 10),
    "kv_heads": ("num_key_value_heads", 1 << 10),
    "head_width": ("head_dim", 1 << 12),
    "ffn_width": ("intermediate_size", 1 << 20),
}
"""Dimension to its field in `config.json` and the maximum that is accepted."""

# Fields that change the network, and the values for which it is the one built here.
_FIXED: Mapping[str, tuple[Any, ...]] = {
    "model_type": ("qwen3",),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "use_sliding_window": (False, None),
    "rope_scaling": (None,),
    "quantization_config": (None,),
}
_REQUIRED = ("model_type",)


@dataclass(frozen=True, slots=True)
class TextEncoderConfig:
    """Everything that decides the network of a text encoder.

    Attributes:
        rope_theta: base of the rotary frequencies, a number that float32 holds exactly.
        norm_epsilon: epsilon of every norm.
    """

    sizes: TextEncoderDimensions
    rope_theta: float
    norm_epsilon: float

    @property
    def built_layers(self) -> int:
        """Number of layers in the network: all but the last, because the output is the hidden state before it."""
        return self.sizes.layers - 1


def network_shapes(config: TextEncoderConfig) -> dict[str, tuple[int, ...]]:
    """Published name to shape of the tensors that the network reads: no last layer, no final norm."""
    unused = (f"{LAYER}{config.built_layers}.", "model.norm.")
    return {name: shape for name, shape in text_encoder_shapes(config.sizes).items() if not name.startswith(unused)}


def read_config(folder: Path) -> TextEncoderConfig:
    """Read the `config.json` of a Hugging Face folder.

    Raises:
        ArtifactError: absent, not JSON, another architecture, or a field that is missing or out of bounds.
    """
    path = folder / CONFIG_NAME
    inside(folder, CONFIG_NAME)
    try:
        if path.stat().st_size > CONFIG_BYTES_MAX:
            raise ArtifactError(f"`{path}` has {path.stat().st_size:,} bytes, which is no configuration")
        parsed = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ArtifactError(
            f"cannot read `{path}`: {error.strerror or error}", hint="give the folder that holds the encoder's weights"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"`{path}` is not JSON: {error}", hint="download it again") from error
    try:
        return parse_config(parsed)
    except ArtifactError as error:
        raise ArtifactError(f"`{path}`: {error}", hint=error.hint) from error


def parse_config(config: object) -> TextEncoderConfig:
    """Check the fields of a parsed `config.json`.

    Raises:
        ArtifactError: a field is missing or has another value; the message names it.
    """
    if not isinstance(config, dict):
        raise ArtifactError(f"the configuration is a {type(config).__name__}, expected an object")
    for field in _REQUIRED:
        if field not in config:
            raise ArtifactError(f"`{field}` is missing", hint="give a Hugging Face folder of a Qwen3 model")
    for field, allowed in _FIXED.items():
        found = config.get(field, allowed[0])
        # Types must agree too: in Python 0 equals False, in a configuration it does not.
        if not any(type(found) is type(value) and found == value for value in allowed):
            raise ArtifactError(
                f"`{field}` is {_short(found)}, expected {json.dumps(allowed[0])}",
                hint="the text encoder of L2P is a plain Qwen3 in floats",
            )
    _check_layer_types(config.get("layer_types"))
    sizes = TextEncoderDimensions(**{name: _size(config, field, most) for name, (field, most) in _SIZES.items()})
    if sizes.layers < 2:
        raise ArtifactError("`num_hidden_layers` is 1, expected 2 or more: the hidden state before the last is taken")
    if sizes.heads % sizes.kv_heads:
        raise ArtifactError(
            f"`num_attention_heads` is {sizes.heads}, expected a multiple of {sizes.kv_heads} (kv heads)"
        )
    if sizes.head_width % 2:
        raise ArtifactError(f"`head_dim` is {sizes.head_width}, expected an even number for the rotation")
    epsilon = _number(config, "rms_norm_eps", 0.0, 1e-2)
    return TextEncoderConfig(sizes, _rope_theta(config), epsilon)


def _rope_theta(config: Mapping[str, Any]) -> float:
    """The rotary base, at the top level or, since transformers 5, in `rope_parameters`."""
    nested = config.get("rope_parameters")
    if nested is None:
        theta = _number(config, "rope_theta", 1.0, 1e12)
    else:
        if not isinstance(nested, dict):
            raise ArtifactError(f"`rope_parameters` is {_short(nested)}, expected an object")
        kind = nested.get("rope_type", "default")
        if kind != "default":
            raise ArtifactError(f"`rope_parameters.rope_type` is {_short(kind)}, expected 'default'")
        theta = _number(nested, "rope_theta", 1.0, 1e12, "rope_parameters.")
    # The exporter writes scalars in float32. A base that float32 holds is equal in torch and in the ONNX graph.
    return float(struct.unpack("<f", struct.pack("<f", theta))[0])


def _check_layer_types(kinds: object) -> None:
    if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        raise ArtifactError(f"`layer_types` is {_short(kinds)}, expected only full_attention")


def _size(config: Mapping[str, Any], field: str, most: int) -> int:
    value = config.get(field)
    if type(value) is not int or not 1 <= value <= most:
        found = "missing" if field not in config else _short(value)
        raise ArtifactError(f"`{field}` is {found}, expected a whole number from 1 to {most}")
    return value


def _number(config: Mapping[str, Any], field: str, minimum: float, maximum: float, where: str = "") -> float:
    value = config.get(field)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not minimum < value <= maximum:
        found = "missing" if field not in config else _short(value)
        raise ArtifactError(f"`{where}{field}` is {found}, expected a number over {minimum:g} and up to {maximum:g}")
    return float(value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


@dataclass(frozen=True, slots=True)
class TextEncoderDimensions:
    """Sizes of a Qwen3 text encoder; the defaults are those of Qwen3-4B."""

    vocabulary: int = 151_936
    width: int = 2560
    layers: int = 36
    heads: int = 32
    kv_heads: int = 8
    head_width: int = 128
    ffn_width: int = 9728


def text_encoder_shapes(t: TextEncoderDimensions) -> dict[str, tuple[int, ...]]:
    """Published name to shape of a Qwen3 text encoder; no tensor has a bias, and there is no output head."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (t.vocabulary, t.width),
        "model.norm.weight": (t.width,),
    }
    for index in range(t.layers):
        layer = f"model.layers.{index}"
        shapes |= {
            f"{layer}.self_attn.q_proj.weight": (t.heads * t.head_width, t.width),
            f"{layer}.self_attn.k_proj.weight": (t.kv_heads * t.head_width, t.width),
            f"{layer}.self_attn.v_proj.weight": (t.kv_heads * t.head_width, t.width),
            f"{layer}.self_attn.o_proj.weight": (t.width, t.heads * t.head_width),
            f"{layer}.self_attn.q_norm.weight": (t.head_width,),
            f"{layer}.self_attn.k_norm.weight": (t.head_width,),
            f"{layer}.mlp.gate_proj.weight": (t.ffn_width, t.width),
            f"{layer}.mlp.up_proj.weight": (t.ffn_width, t.width),
            f"{layer}.mlp.down_proj.weight": (t.width, t.ffn_width),
            f"{layer}.input_layernorm.weight": (t.width,),
            f"{layer}.post_attention_layernorm.weight": (t.width,),
        }
    return shapes
