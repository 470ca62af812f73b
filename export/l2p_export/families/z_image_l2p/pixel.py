"""Whole L2P model as one torch module, for training: the five exported networks, called in order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from l2p_export.families.z_image_l2p.blocks import Block
from l2p_export.families.z_image_l2p.dimensions import Dimensions, network_blocks
from l2p_export.families.z_image_l2p.networks import network_module
from l2p_export.families.z_image_l2p.specs import HALO_ROWS

NETWORKS = ("caption", "stem", "trunk", "tail", "head")


@dataclass(frozen=True, slots=True)
class Window:
    """Token rows and columns that the head draws; the transformer sees the whole grid.

    Attributes:
        halo_tokens: number of tokens that the head reads on each side. With 3 or more, the pixels are those that the
            head draws of the whole image. With fewer, zeros replace the missing tokens, as they do around an image.
    """

    rows: slice
    columns: slice
    halo_tokens: int = HALO_ROWS


class PixelModel(nn.Module):
    """The pixel denoiser: noisy pixels, time and prompt embeddings to x0 - noise.

    Parameters are named `NETWORK.PUBLISHED`; `published_state` removes the prefix.
    """

    def __init__(self, d: Dimensions) -> None:
        super().__init__()
        self.patch_px = d.patch_px
        self.whole_head = d.patch_px != 2 ** len(d.levels)
        self.caption, self.stem, self.trunk, self.tail, self.head = (_trainable(name, d) for name in NETWORKS)

    def forward(
        self,
        image: Tensor,
        time: Tensor,
        prompt_embeds: Tensor,
        caption_mask: Tensor,
        rope_cos: Tensor,
        rope_sin: Tensor,
        window: Window | None = None,
    ) -> Tensor:
        """image [B,3,H,W], time [B], prompt_embeds [B,T,C], caption_mask [B,T], tables [S,R], to [B,3,H,W].

        With a window, the result has only the pixels of its tokens.
        """
        caption_tokens = prompt_embeds.shape[1]
        caption = self.caption(prompt_embeds, caption_mask, rope_cos[-caption_tokens:], rope_sin[-caption_tokens:])
        tokens, modulation = self.stem(image, time, caption, rope_cos, rope_sin)
        tokens = self.tail(self.trunk(tokens, modulation, rope_cos, rope_sin), modulation, rope_cos, rope_sin)
        rows, columns = image.shape[2] // self.patch_px, image.shape[3] // self.patch_px
        grid = torch.unflatten(tokens[:, : rows * columns], 1, (rows, columns))
        if window is None:
            whole: Tensor = self.head(image, grid)
            return whole
        return self._draw_window(image, grid, window)

    def _draw_window(self, image: Tensor, grid: Tensor, window: Window) -> Tensor:
        p, halo = self.patch_px, window.halo_tokens
        high, wide = (
            slice(max(0, part.start - halo), min(size, part.stop + halo))
            for part, size in zip((window.rows, window.columns), grid.shape[1:3], strict=True)
        )
        pixels = image[:, :, high.start * p : high.stop * p, wide.start * p : wide.stop * p]
        drawn: Tensor = self.head(pixels, grid[:, high, wide])
        top, left = (window.rows.start - high.start) * p, (window.columns.start - wide.start) * p
        height, width = (p * (part.stop - part.start) for part in (window.rows, window.columns))
        return drawn[:, :, top : top + height, left : left + width]


def _trainable(network: str, d: Dimensions) -> nn.Module:
    module = network_module(network, d, lambda layer: torch.float32, network_blocks(network, d))
    return module.train().requires_grad_(requires_grad=True)


def published_state(module: nn.Module) -> dict[str, Tensor]:
    """Published name to tensor, of a module whose parameters are named `NETWORK.PUBLISHED`."""
    return {name.partition(".")[2]: tensor for name, tensor in module.state_dict().items()}


def load_published(module: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Copy tensors that match by published name and shape.

    Returns:
        Published names of the tensors that were not changed.
    """
    kept = []
    with torch.no_grad():
        for name, tensor in published_state(module).items():
            found = tensors.get(name)
            if found is None or found.shape != tensor.shape:
                kept.append(name)
            else:
                tensor.copy_(found)
    return tuple(kept)


def checkpoint_activations(module: nn.Module) -> None:
    """Recompute each block, and each level of a pixel head, in the backward pass instead of keeping its activations."""
    for part in module.modules():
        if isinstance(part, (Block, nn.Sequential)):
            part.forward = partial(checkpoint, part.forward, use_reentrant=False)  # type: ignore[method-assign]
