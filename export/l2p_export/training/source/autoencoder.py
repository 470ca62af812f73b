"""Trains the autoencoder of a latent source: diffusers' `AutoencoderKL` with 8 px per latent and 16 channels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from l2p_export.training.corpus.reader import as_values
from l2p_export.training.loop.loop import CPU, Schedule, generator, train
from l2p_export.world.batched import render_batch
from l2p_export.world.scenes import draw_description, place

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

    from l2p_runtime.progress import Reporter

LATENT_CHANNELS = 16
"""As in Z-Image, so that a source's patches of 2 x 2 latents have the published 64 values."""

CONFIG: Mapping[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (8, 16, 32, 64),
    "layers_per_block": 1,
    "latent_channels": LATENT_CHANNELS,
    "norm_num_groups": 4,
    "mid_block_add_attention": False,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}

IMAGE_PX = 128
CROP_PX = 64
KL_WEIGHT = 1e-4
"""Weight of the KL divergence per latent value from a unit normal, against the mean squared error per pixel value."""

EDGE_WEIGHT = 0.1
"""Weight of the mean absolute error, which keeps edges sharp where squares of small errors vanish."""


def train_autoencoder(folder: Path, schedule: Schedule, report: Reporter, device: torch.device = CPU) -> AutoencoderKL:
    """Train on crops of rendered scenes, and set `scaling_factor` and `shift_factor` from the model's latents.

    Raises:
        As `loop.train`.
    """
    from diffusers import AutoencoderKL

    torch.manual_seed(schedule.seed)
    model = AutoencoderKL(**CONFIG, sample_size=IMAGE_PX).to(device, memory_format=torch.channels_last)

    def loss(step: int, micro: int) -> Tensor:
        size = schedule.batch // schedule.micro_batches
        image = _crops(np.random.default_rng([schedule.seed, step, micro]), size, device)
        posterior = model.encode(image).latent_dist
        draws = generator(schedule.seed, step, micro, device=device)
        noise = torch.randn(posterior.mean.shape, generator=draws, device=device)
        made = model.decode(posterior.mean + posterior.std * noise).sample
        difference = made - image
        error = difference.square().mean() + EDGE_WEIGHT * difference.abs().mean()
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        total: Tensor = error + KL_WEIGHT * divergence
        return total

    settings = {"stage": "autoencoder", "schedule": asdict(schedule), "config": dict(CONFIG)}
    averaged = train(model, loss, schedule, folder, settings, report, title="autoencoder")
    model.load_state_dict(averaged)
    model.eval().requires_grad_(requires_grad=False)
    latents = encode(model, _images(np.random.default_rng([schedule.seed, 1 << 31]), 256, device))
    model.register_to_config(scaling_factor=float(1 / latents.std()), shift_factor=float(latents.mean()))
    return model


@torch.no_grad()
def encode(model: AutoencoderKL, images: Tensor, batch: int = 32) -> Tensor:
    """Posterior means [N,16,H/8,W/8] of uint8 pixels [N,3,H,W], neither shifted nor scaled."""
    return torch.cat([model.encode(as_values(part)).latent_dist.mean for part in torch.split(images, batch)])


def _images(random: np.random.Generator, count: int, device: torch.device) -> Tensor:
    scenes = [place(draw_description(random), random) for _ in range(count)]
    return render_batch(scenes, IMAGE_PX, IMAGE_PX, device).contiguous(memory_format=torch.channels_last)


def _crops(random: np.random.Generator, count: int, device: torch.device) -> Tensor:
    """A random crop of each image, a quarter of its area."""
    corners = random.integers(0, IMAGE_PX - CROP_PX + 1, (count, 2))
    images = _images(random, count, device)
    cut = [image[:, y : y + CROP_PX, x : x + CROP_PX] for image, (y, x) in zip(images, corners.tolist(), strict=True)]
    return as_values(torch.stack(cut).contiguous(memory_format=torch.channels_last))
