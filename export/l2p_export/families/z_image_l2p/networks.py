"""Five networks of one denoising call, cut from one L2P transformer (docs/design.md, "Networks").

    network   inputs                                              outputs
    caption   prompt_embeds [B,T,C] caption_mask [B,T] rope [T,R]  caption [B,T,D]
    stem      image [B,3,H,W] time [B] caption rope [S,R]          tokens [B,S,D] modulation [B,A]
    trunk     tokens modulation rope                               tokens_out [B,S,D]
    tail      tokens modulation rope                               tokens_out [B,S,D]
    head      image [B,3,Hs,W] tokens [B,hs,w,D]                   prediction [B,3,Hs,W]

Sequence order is image tokens, image pads, caption. Every input and output is float32; inside, a network casts to the
dtype of its own weights. Parameters have their published names, so a state dict is a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn

from l2p_export.families.linear import Linear
from l2p_export.families.z_image_l2p.blocks import Block, BlockPrecision, RMSNorm, TimeEmbedding
from l2p_export.families.z_image_l2p.dimensions import Dimensions
from l2p_export.families.z_image_l2p.head import PixelHead
from l2p_export.families.z_image_l2p.layout import ATTENTION_BRANCH, FFN_BRANCH

DTypeOf: TypeAlias = Callable[[str], torch.dtype]
"""Layer name to the dtype of its weights, and `residual.NETWORK` to that of the stream between its blocks: what a
module needs of a precision plan."""

ExponentOf: TypeAlias = Callable[[str], int]
"""Layer name to the power of two that its weights are scaled by."""


def unscaled(layer: str) -> int:
    """The exponent of every layer without scaling: 0."""
    del layer
    return 0


class CaptionNetwork(nn.Module):
    """Prompt embeddings to caption tokens: embed, insert the learned pad where the mask is false, refine."""

    def __init__(
        self,
        d: Dimensions,
        dtype_of: DTypeOf,
        context_refiners: Iterable[int],
        exponent_of: ExponentOf = unscaled,
    ) -> None:
        super().__init__()
        self.residual = dtype_of("residual.caption")
        linear = Linear(d.caption_width, d.width, dtype=dtype_of("cap_embedder.1"))
        self.cap_embedder = nn.ModuleList([RMSNorm(d.caption_width, dtype_of("cap_embedder.0")), linear])
        self.cap_pad_token = nn.Parameter(torch.empty(1, d.width, dtype=dtype_of("cap_pad_token")))
        self.context_refiner = _blocks(
            "context_refiner", context_refiners, d, dtype_of, exponent_of, self.residual, modulated=False
        )

    def forward(self, prompt_embeds: Tensor, caption_mask: Tensor, rope_cos: Tensor, rope_sin: Tensor) -> Tensor:
        """See the module docstring."""
        x = prompt_embeds
        for layer in self.cap_embedder:
            x = layer(x)
        x = torch.where(caption_mask.unsqueeze(-1), x.to(self.residual), self.cap_pad_token.to(self.residual))
        for block in self.context_refiner.values():
            x = block(x, None, rope_cos, rope_sin)
        return x.to(torch.float32)


class StemNetwork(nn.Module):
    """Noisy pixels and time to tokens: patch embedding, pads, noise refiner, then the layers before the trunk."""

    def __init__(
        self,
        d: Dimensions,
        dtype_of: DTypeOf,
        noise_refiners: Iterable[int],
        layers: Iterable[int],
        image_channels: int = 3,
        exponent_of: ExponentOf = unscaled,
    ) -> None:
        super().__init__()
        self.patch_px = d.patch_px
        self.residual = dtype_of("residual.stem")
        embedder = f"{d.patch_px}-1"
        dtype = dtype_of(f"all_x_embedder.{embedder}")
        self.all_x_embedder = nn.ModuleDict({embedder: Linear(image_channels * d.patch_px**2, d.width, dtype=dtype)})
        self.x_pad_token = nn.Parameter(torch.empty(1, d.width, dtype=dtype_of("x_pad_token")))
        self.t_embedder = TimeEmbedding(d, dtype_of("t_embedder"))
        self.noise_refiner = _blocks(
            "noise_refiner", noise_refiners, d, dtype_of, exponent_of, self.residual, modulated=True
        )
        self.layers = _blocks("layers", layers, d, dtype_of, exponent_of, self.residual, modulated=True)

    def forward(
        self, image: Tensor, time: Tensor, caption: Tensor, rope_cos: Tensor, rope_sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See the module docstring."""
        modulation = self.t_embedder(time)
        x = self.all_x_embedder[f"{self.patch_px}-1"](patches(image, self.patch_px)).to(self.residual)
        # One pad row after the image tokens, then rows 0..S-T-1, clamped to that row. This pads to any S, no pads
        # included, without a size that export would have to compare with zero.
        pad = self.x_pad_token.to(self.residual).unsqueeze(0).expand(x.shape[0], 1, -1)
        rows = torch.arange(rope_cos.shape[0] - caption.shape[1], device=x.device).clamp(max=x.shape[1])
        x = torch.cat([x, pad], dim=1).index_select(1, rows)
        image_cos, image_sin = rope_cos[: -caption.shape[1]], rope_sin[: -caption.shape[1]]
        for block in self.noise_refiner.values():
            x = block(x, modulation, image_cos, image_sin)
        x = torch.cat([x, caption.to(x.dtype)], dim=1)
        for block in self.layers.values():
            x = block(x, modulation, rope_cos, rope_sin)
        return x.to(torch.float32), modulation


class LayersNetwork(nn.Module):
    """A run of main layers: the trunk, or the tail."""

    def __init__(
        self,
        d: Dimensions,
        dtype_of: DTypeOf,
        layers: Iterable[int],
        name: str = "trunk",
        exponent_of: ExponentOf = unscaled,
    ) -> None:
        super().__init__()
        self.residual = dtype_of(f"residual.{name}")
        self.layers = _blocks("layers", layers, d, dtype_of, exponent_of, self.residual, modulated=True)

    def forward(self, tokens: Tensor, modulation: Tensor, rope_cos: Tensor, rope_sin: Tensor) -> Tensor:
        """See the module docstring."""
        x = tokens.to(self.residual)
        for block in self.layers.values():
            x = block(x, modulation, rope_cos, rope_sin)
        return x.to(torch.float32)


class HeadNetwork(nn.Module):
    """The pixel head, under its published name."""

    def __init__(self, d: Dimensions, dtype_of: DTypeOf) -> None:
        super().__init__()
        self.local_decoder = PixelHead(d, lambda layer: dtype_of(f"local_decoder.{layer}"))

    def forward(self, image: Tensor, tokens: Tensor) -> Tensor:
        """See the module docstring."""
        prediction: Tensor = self.local_decoder(image, tokens)
        return prediction.to(torch.float32)


def network_module(
    name: str, d: Dimensions, dtype_of: DTypeOf, blocks: Iterable[str], exponent_of: ExponentOf = unscaled
) -> nn.Module:
    """Build one network on the current device; its weights are uninitialised.

    Args:
        name: `caption`, `stem`, `trunk`, `tail` or `head`.
        d: dimensions of the model.
        dtype_of: weight dtype of each layer, by published layer name.
        blocks: the transformer blocks to build, as `layers.5`.
        exponent_of: the power of two that the weights of each layer are scaled by.
    """
    groups: dict[str, list[int]] = {"context_refiner": [], "noise_refiner": [], "layers": []}
    for block in blocks:
        group, _, index = block.partition(".")
        groups[group].append(int(index))
    builders: Mapping[str, Callable[[], nn.Module]] = {
        "caption": lambda: CaptionNetwork(d, dtype_of, groups["context_refiner"], exponent_of),
        "stem": lambda: StemNetwork(d, dtype_of, groups["noise_refiner"], groups["layers"], exponent_of=exponent_of),
        "trunk": lambda: LayersNetwork(d, dtype_of, groups["layers"], "trunk", exponent_of),
        "tail": lambda: LayersNetwork(d, dtype_of, groups["layers"], "tail", exponent_of),
        "head": lambda: HeadNetwork(d, dtype_of),
    }
    return builders[name]().eval().requires_grad_(requires_grad=False)


def patches(image: Tensor, patch_px: int) -> Tensor:
    """Cut image [B,C,H,W] into rows [B, H/p * W/p, p*p*C]: row, column, channel within a patch, channel fastest."""
    x = torch.unflatten(torch.unflatten(image, 3, (-1, patch_px)), 2, (-1, patch_px))
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def _blocks(
    group: str,
    indices: Iterable[int],
    d: Dimensions,
    dtype_of: DTypeOf,
    exponent_of: ExponentOf,
    residual: torch.dtype,
    *,
    modulated: bool,
) -> nn.ModuleDict:
    def block(name: str) -> Block:
        attention, ffn = (
            sum(exponent_of(f"{name}.{layer}") for layer in layers) for layers in (ATTENTION_BRANCH, FFN_BRANCH)
        )
        # By the dtypes that it is built with, not run with: training keeps a float32 residual and narrower norms.
        ends = {dtype_of(f"{name}.{branch[-1]}") for branch in (ATTENTION_BRANCH, FFN_BRANCH)}
        is_wide = residual == torch.float32 and ends != {torch.float32}
        precision = BlockPrecision(partial(_inside, dtype_of, name), attention, ffn, is_wide)
        return Block(d, precision, modulated=modulated)

    return nn.ModuleDict({str(index): block(f"{group}.{index}") for index in indices})


def _inside(dtype_of: DTypeOf, block: str, layer: str) -> torch.dtype:
    return dtype_of(f"{block}.{layer}")
