"""Samples of a source during training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from l2p_export.families.z_image_l2p.specs import model_spec
from l2p_export.training.flow import sample
from l2p_export.training.sheet import SampleSpec, sample_descriptions, sample_noise, show_samples
from l2p_export.training.source.draw import decode
from l2p_export.training.source.tokens import CAPTION_TOKENS, caption_ids
from l2p_export.world.captions import caption
from l2p_runtime.positions import rope_tables

if TYPE_CHECKING:
    import tokenizers
    from diffusers import AutoencoderKL

    from l2p_export.families.z_image_l2p.dimensions import Dimensions
    from l2p_export.training.source.model import SourceModel


def source_samples(
    folder: Path, d: Dimensions, autoencoder: AutoencoderKL, tokenizer: tokenizers.Tokenizer, spec: SampleSpec
) -> Callable[[int, SourceModel], None]:
    """Make a callback for `train_transformer` that draws, judges and plots samples at each saved state."""
    descriptions = sample_descriptions(spec.count)
    ids = caption_ids(tokenizer, [caption(description) for description in descriptions])
    empty = caption_ids(tokenizer, [""]).expand(spec.count, -1)
    side = spec.size_px // 8
    noise = sample_noise(spec.count, 16, side)
    tables = [torch.from_numpy(table) for table in rope_tables(model_spec(d), side // 2, side // 2, CAPTION_TOKENS)]

    def show(step: int, model: SourceModel) -> None:
        device = next(model.parameters()).device
        positions = [table.to(device) for table in tables]

        def predict(mixed: Tensor, time: Tensor, has_caption: bool) -> Tensor:
            made: Tensor = model(mixed, time, (ids if has_caption else empty).to(device), *positions)
            return made

        latents = sample(predict, noise.to(device), spec.steps, spec.guidance, spec.shift)
        with torch.no_grad():
            images = decode(autoencoder, latents)
        show_samples(folder, step, images, descriptions)

    return show
