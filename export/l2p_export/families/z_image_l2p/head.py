"""The pixel head: a U-Net on the noisy image that takes the tail's tokens at its bottleneck (l2p.md 1.2, 6.2)."""

from __future__ import annotations

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
    without activation. A decoder stage reads [up, skip], the bottleneck [image, tokens].
    """

    def __init__(self, d: Dimensions, dtype: torch.dtype) -> None:
        super().__init__()
        self.stages = tuple(stage.name for stage in d.stages)
        self.enlarge_tokens = d.patch_px != 2 ** len(d.stages)
        channels = 3
        for stage in d.stages:
            self.add_module(f"enc{stage.name}", nn.Sequential(Conv2d(channels, stage.encoder, 3, dtype), nn.SiLU()))
            channels = stage.encoder
        self.bottleneck = nn.Sequential(Conv2d(channels + d.width, d.bottleneck, 1, dtype), nn.SiLU())
        channels = d.bottleneck
        for stage in reversed(d.stages):
            upsample = nn.Upsample(scale_factor=2.0, mode="nearest")
            self.add_module(f"up{stage.name}", nn.Sequential(upsample, Conv2d(channels, stage.up, 3, dtype)))
            decoder = Conv2d(stage.up + stage.encoder, stage.decoder, 3, dtype)
            self.add_module(f"dec{stage.name}", nn.Sequential(decoder, nn.SiLU()))
            channels = stage.decoder
        self.out_conv = Conv2d(channels, 3, 1, dtype)

    def forward(self, image: Tensor, tokens: Tensor) -> Tensor:
        """image [B,3,Hs,W], tokens [B,hs,w,D], to x0 - noise [B,3,Hs,W]."""
        skips = []
        x = image
        for stage in self.stages:
            x = self.get_submodule(f"enc{stage}")(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        features = tokens.permute(0, 3, 1, 2).to(x.dtype)
        if self.enlarge_tokens:
            features = _five_for_two(_five_for_two(features, 2), 3)
        x = self.bottleneck(torch.cat([x, features], dim=1))
        for stage, skip in zip(reversed(self.stages), reversed(skips), strict=True):
            x = self.get_submodule(f"up{stage}")(x)
            x = self.get_submodule(f"dec{stage}")(torch.cat([x, skip], dim=1))
        out: Tensor = self.out_conv(x)
        return out


def _five_for_two(x: Tensor, axis: int) -> Tensor:
    """Enlarge an axis of even size by 2.5, nearest: the bottleneck of the 160 px head stands at 64 px (l2p.md 6.2)."""
    first, second = torch.unflatten(x, axis, (-1, 2)).unbind(axis + 1)
    return torch.stack([first, first, first, second, second], dim=axis + 1).flatten(axis, axis + 1)
