"""The small latent source: Z-Image's transformer and a Qwen3 text encoder at a small size, as one module."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from l2p_export.families.qwen3.dimensions import TextEncoderConfig, TextEncoderDimensions
from l2p_export.families.qwen3.networks import TextEncoderNetwork
from l2p_export.families.z_image_l2p.dimensions import Dimensions, published_dimensions
from l2p_export.families.z_image_l2p.latent import LATENT_PATCH, LatentModel
from l2p_export.training.source.tokens import VOCABULARY
from l2p_export.world.render import LABELS

GATE_AT_START = 0.5
"""Initial bias of a block's gates; with 0, the first thousands of steps learn nothing."""

TEXT_ENCODER = TextEncoderConfig(
    TextEncoderDimensions(vocabulary=VOCABULARY, width=96, layers=3, heads=3, kv_heads=3, head_width=32, ffn_width=256),
    rope_theta=1e6,
    norm_epsilon=1e-6,
)


def source_dimensions() -> Dimensions:
    """Dimensions of the small source: width 144, three heads of 48, six layers of which four are the trunk."""
    return replace(
        published_dimensions("1k"),
        width=144,
        head_width=48,
        ffn_width=int(144 / 3 * 8),
        caption_width=TEXT_ENCODER.sizes.width,
        time_width=144,
        layers=6,
        noise_refiners=1,
        context_refiners=1,
    )


PROBED_LAYER = 3
"""The main layer whose image tokens the probe reads, after three quarters of the trunk."""


class SourceModel(nn.Module):
    """Text encoder and transformer as one module, from captions and noisy latents to x0 - noise.

    A linear probe predicts from image tokens of a middle layer which label covers each patch. It teaches the trunk to
    read the layout from the caption: which of two objects has which colour is a small part of the loss of x0 - noise.
    The probe is not part of a saved source.
    """

    def __init__(self, d: Dimensions) -> None:
        super().__init__()

        def dtype_of(layer: str) -> torch.dtype:
            del layer
            return torch.float32

        self.text = TextEncoderNetwork(TEXT_ENCODER, dtype_of, range(TEXT_ENCODER.built_layers))
        self.latent = LatentModel(d, dtype_of)
        self.probe = nn.Linear(d.width, len(LABELS))

    def forward(self, latents: Tensor, time: Tensor, ids: Tensor, rope_cos: Tensor, rope_sin: Tensor) -> Tensor:
        """Latents [B,16,h,w], time [B], ids [B,T] with -1 as padding, RoPE tables [S,R] to x0 - noise [B,16,h,w]."""
        mask = ids >= 0
        embeds = self.text(ids.clamp(min=0).long(), mask.long())
        out: Tensor = self.latent(latents, time, embeds, mask, rope_cos, rope_sin)
        return out

    def probed(
        self, latents: Tensor, time: Tensor, ids: Tensor, rope_cos: Tensor, rope_sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `forward`, and the probe's logits [B,N,K] of the K `LABELS` for each of N image tokens."""
        seen: list[Tensor] = []
        layer = self.latent.body.layers[str(PROBED_LAYER)]
        hook = layer.register_forward_hook(lambda module, inputs, tokens: seen.append(tokens))
        try:
            made = self(latents, time, ids, rope_cos, rope_sin)
        finally:
            hook.remove()
        tokens = latents.shape[2] // LATENT_PATCH * (latents.shape[3] // LATENT_PATCH)
        return made, self.probe(seen[0][:, :tokens])


@torch.no_grad()
def initial_source(d: Dimensions, seed: int) -> SourceModel:
    """Initialize a source: weights that keep the variance of activations, gains of 1, gate biases of 0.5."""
    torch.manual_seed(seed)
    model = SourceModel(d)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.ndim == 1:
            parameter.fill_(1.0)
        elif "pad_token" in name or "embed_tokens" in name:
            parameter.normal_(std=0.5)
        elif "adaLN_modulation" in name or "all_final_layer" in name:
            parameter.normal_(std=0.1 / math.sqrt(parameter.shape[1]))
        else:
            parameter.normal_(std=1 / math.sqrt(parameter.shape[1]))
        if name.endswith("adaLN_modulation.0.bias"):
            # Chunks are scale, gate, scale, gate.
            parameter.view(4, -1)[1::2] = GATE_AT_START
    return model
