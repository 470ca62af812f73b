"""Shape tables of what an L2P model is made from: the latent Z-Image transformer and the Qwen3 text encoder.

Source: l2p.md 2.3 and 3. They identify source checkpoints by fingerprint, from the header alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from l2p_export.families.z_image_l2p.dimensions import Dimensions, expected_shapes

LATENT_PATCH_VALUES = 64
"""Values of a latent patch: 2 x 2 of 16 channels."""


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


def latent_shapes(d: Dimensions) -> dict[str, tuple[int, ...]]:
    """Published name to shape of the latent source of a model: its own embedder and final layer, no pixel head."""
    shared = {
        name: shape
        for name, shape in expected_shapes(d).items()
        if not name.startswith(("all_x_embedder.", "local_decoder."))
    }
    return shared | {
        "all_x_embedder.2-1.weight": (d.width, LATENT_PATCH_VALUES),
        "all_x_embedder.2-1.bias": (d.width,),
        "all_final_layer.2-1.linear.weight": (LATENT_PATCH_VALUES, d.width),
        "all_final_layer.2-1.linear.bias": (LATENT_PATCH_VALUES,),
        "all_final_layer.2-1.adaLN_modulation.1.weight": (d.width, d.time_width),
        "all_final_layer.2-1.adaLN_modulation.1.bias": (d.width,),
    }


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
