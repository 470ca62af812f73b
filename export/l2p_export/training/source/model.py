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
"""Bias of a block's gates: from zero the first thousands of steps do nothing."""

TEXT_ENCODER = TextEncoderConfig(
    TextEncoderDimensions(vocabulary=VOCABULARY, width=96, layers=3, heads=3, kv_heads=3, head_width=32, ffn_width=256),
    rope_theta=1e6,
    norm_epsilon=1e-6,
)


def source_dimensions() -> Dimensions:
    """Width 144, three heads of 48, six layers of which four are the trunk; the rest follows Z-Image."""
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
"""The main layer whose image tokens are asked what lies where; three quarters of the trunk lie before it."""


class SourceModel(nn.Module):
    """Captions and noisy latents to x0 - noise; text encoder and transformer learn together.

    A probe reads from image tokens in the middle what lies where, which teaches the trunk to take it from the caption:
    of x0 - noise alone, which of two objects has which colour is a small part. It is no part of a saved source.
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
        """latents [B,16,h,w], time [B], ids [B,T] with -1 for padding, tables [S,R], to [B,16,h,w]."""
        mask = ids >= 0
        embeds = self.text(ids.clamp(min=0).long(), mask.long())
        out: Tensor = self.latent(latents, time, embeds, mask, rope_cos, rope_sin)
        return out

    def probed(
        self, latents: Tensor, time: Tensor, ids: Tensor, rope_cos: Tensor, rope_sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `forward`, and scores [B,N,K] of each of `LABELS` for each of N image tokens."""
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
    """Weights that keep the variance, gains of 1, gates half open."""
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
