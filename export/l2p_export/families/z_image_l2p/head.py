"""Pixel head: a U-Net on the noisy image that takes the tail's tokens at its bottleneck.

Source: docs/model.md, "Pixel head".
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2p_export.families.z_image_l2p.dimensions import Dimensions


class Conv2d(nn.Conv2d):
    """A convolution that keeps the size and computes in the dtype of its weight."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, dtype: torch.dtype) -> None:
        super().__init__(in_channels, out_channels, kernel, padding=kernel // 2, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[B,in,H,W] to [B,out,H,W]."""
        return super().forward(x.to(self.weight.dtype))


class PixelHead(nn.Module):
    """U-Net `local_decoder`; submodules are named as published.

    Convolutions are 3x3 with bias and SiLU, pooling is 2x2 maximum, upsampling nearest x2 and a 3x3 convolution
    without activation. A decoder level reads [up, skip], the bottleneck [image, tokens].
    """

    def __init__(self, d: Dimensions, precision: torch.dtype | Callable[[str], torch.dtype]) -> None:
        """Build it with uninitialised weights, of one dtype or of one per convolution by its name, as `enc1.0`."""
        super().__init__()

        def conv(name: str, inputs: int, outputs: int, kernel: int) -> Conv2d:
            return Conv2d(inputs, outputs, kernel, precision if isinstance(precision, torch.dtype) else precision(name))

        self.levels = tuple(level.name for level in d.levels)
        self.enlarge_tokens = d.patch_px != 2 ** len(d.levels)
        channels = 3
        for level in d.levels:
            encoder = conv(f"enc{level.name}.0", channels, level.encoder, 3)
            self.add_module(f"enc{level.name}", nn.Sequential(encoder, nn.SiLU()))
            channels = level.encoder
        self.bottleneck = nn.Sequential(conv("bottleneck.0", channels + d.width, d.bottleneck, 1), nn.SiLU())
        channels = d.bottleneck
        for level in reversed(d.levels):
            upsample = nn.Upsample(scale_factor=2.0, mode="nearest")
            self.add_module(
                f"up{level.name}", nn.Sequential(upsample, conv(f"up{level.name}.1", channels, level.up, 3))
            )
            decoder = conv(f"dec{level.name}.0", level.up + level.encoder, level.decoder, 3)
            self.add_module(f"dec{level.name}", nn.Sequential(decoder, nn.SiLU()))
            channels = level.decoder
        self.out_conv = conv("out_conv", channels, 3, 1)
        self.is_mixed = len({parameter.dtype for parameter in self.parameters()}) > 1

    def forward(self, image: Tensor, tokens: Tensor) -> Tensor:
        """image [B,3,Hs,W], tokens [B,hs,w,D], to x0 - noise [B,3,Hs,W]."""
        skips = []
        x = image
        for level in self.levels:
            x = self.get_submodule(f"enc{level}")(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        # A plan may raise only the bottleneck: tokens are not scaled and may exceed float16.
        dtype = self._dtype(self.bottleneck, x)
        features = tokens.permute(0, 3, 1, 2).to(dtype)
        if self.enlarge_tokens:
            features = _five_for_two(_five_for_two(features, 2), 3)
        x = self.bottleneck(torch.cat([x.to(dtype), features], dim=1))
        for level, skip in zip(reversed(self.levels), reversed(skips), strict=True):
            x = self.get_submodule(f"up{level}")(x)
            decoder = self.get_submodule(f"dec{level}")
            dtype = self._dtype(decoder, x)
            x = decoder(torch.cat([x.to(dtype), skip.to(dtype)], dim=1))
        out: Tensor = self.out_conv(x)
        return out

    def _dtype(self, step: nn.Module, x: Tensor) -> torch.dtype:
        """The input dtype of a step: that of its weights if a plan mixes dtypes, else that of `x`."""
        return next(step.parameters()).dtype if self.is_mixed else x.dtype


def _five_for_two(x: Tensor, axis: int) -> Tensor:
    """Enlarge an axis of even size by 2.5, nearest: the bottleneck of the 160 px head is at 64 px.

    Source: docs/model.md, "Pixel head".
    """
    first, second = torch.unflatten(x, axis, (-1, 2)).unbind(axis + 1)
    return torch.stack([first, first, first, second, second], dim=axis + 1).flatten(axis, axis + 1)
