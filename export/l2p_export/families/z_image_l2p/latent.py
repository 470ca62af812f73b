"""Latent source of the family: Z-Image, batched, built from the same blocks as the pixel networks.

A batch holds captions of one padded length and images of one size, so there are no lists and no masks; padded rows
hold the learned vectors and take part in attention, as published (docs/model.md, "Tokens, pads and captions").
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2p_export.families.linear import Linear
from l2p_export.families.z_image_l2p.dimensions import Dimensions
from l2p_export.families.z_image_l2p.networks import CaptionNetwork, DTypeOf, LayersNetwork, StemNetwork

LATENT_PATCH = 2
LATENT_CHANNELS = 16
FINAL_EPSILON = 1e-6


class FinalLayer(nn.Module):
    """Tokens to patches of latents: norm without gain, scaled by time, linear."""

    def __init__(self, d: Dimensions, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = Linear(d.width, LATENT_PATCH**2 * LATENT_CHANNELS, dtype=dtype)
        self.adaLN_modulation = nn.ModuleList([nn.SiLU(), Linear(d.time_width, d.width, dtype=dtype)])

    def forward(self, tokens: Tensor, modulation: Tensor) -> Tensor:
        """tokens [B,N,D], modulation [B,A], to [B,N,64]."""
        scale = modulation
        for layer in self.adaLN_modulation:
            scale = layer(scale)
        x = F.layer_norm(tokens, tokens.shape[-1:], eps=FINAL_EPSILON) * (1 + scale.unsqueeze(1))
        out: Tensor = self.linear(x)
        return out


class LatentModel(nn.Module):
    """The latent denoiser: noisy latents, time and prompt embeddings to x0 - noise."""

    def __init__(self, d: Dimensions, dtype_of: DTypeOf) -> None:
        super().__init__()
        d = latent_dimensions(d)
        self.caption = CaptionNetwork(d, dtype_of, range(d.context_refiners))
        self.stem = StemNetwork(d, dtype_of, range(d.noise_refiners), (), LATENT_CHANNELS)
        self.body = LayersNetwork(d, dtype_of, range(d.layers))
        final = FinalLayer(d, dtype_of("all_final_layer"))
        self.final = nn.ModuleDict({"all_final_layer": nn.ModuleDict({f"{LATENT_PATCH}-1": final})})

    def forward(
        self,
        latents: Tensor,
        time: Tensor,
        prompt_embeds: Tensor,
        caption_mask: Tensor,
        rope_cos: Tensor,
        rope_sin: Tensor,
    ) -> Tensor:
        """latents [B,16,h,w], time [B], prompt_embeds [B,T,C], caption_mask [B,T], tables [S,R], to [B,16,h,w]."""
        caption_tokens = prompt_embeds.shape[1]
        caption = self.caption(prompt_embeds, caption_mask, rope_cos[-caption_tokens:], rope_sin[-caption_tokens:])
        tokens, modulation = self.stem(latents, time, caption, rope_cos, rope_sin)
        tokens = self.body(tokens, modulation, rope_cos, rope_sin)
        rows, columns = latents.shape[2] // LATENT_PATCH, latents.shape[3] // LATENT_PATCH
        final = self.final["all_final_layer"][f"{LATENT_PATCH}-1"]  # type: ignore[index]
        return unpatch(final(tokens[:, : rows * columns], modulation), rows, columns)


def latent_dimensions(d: Dimensions) -> Dimensions:
    """The dimensions with latent patches of 2 in place of pixel patches."""
    return replace(d, patch_px=LATENT_PATCH)


def unpatch(patches: Tensor, rows: int, columns: int) -> Tensor:
    """Rows [B, h*w, 2*2*16] back to latents [B,16,2h,2w]; channel fastest within a patch."""
    x = torch.unflatten(patches, 2, (LATENT_PATCH, LATENT_PATCH, LATENT_CHANNELS))
    x = torch.unflatten(x, 1, (rows, columns))
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
