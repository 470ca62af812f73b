"""Samples of a pixel model during training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from l2p_export.families.z_image_l2p.pixel import PixelModel
from l2p_export.training.flow import sample
from l2p_export.training.sheet import SampleSpec, sample_descriptions, sample_noise, show_samples
from l2p_export.training.source.folder import encode_texts
from l2p_export.training.source.tokens import CAPTION_TOKENS
from l2p_export.training.transfer.spec import trained_model
from l2p_export.world.captions import caption
from l2p_runtime.positions import rope_tables

if TYPE_CHECKING:
    from l2p_export.families.z_image_l2p.dimensions import Dimensions
    from l2p_export.training.source.folder import Source
    from l2p_export.training.transfer.spec import TransferSpec


def pixel_samples(
    folder: Path, d: Dimensions, source: Source, spec: SampleSpec, transfer: TransferSpec
) -> Callable[[int, PixelModel], None]:
    """Make a callback for `transfer` that draws, judges and plots samples at each saved state."""
    descriptions = sample_descriptions(spec.count)
    embeds = encode_texts(source, [caption(description) for description in descriptions], CAPTION_TOKENS)
    empty = encode_texts(source, [""], CAPTION_TOKENS)
    side = spec.size_px // d.patch_px
    model = trained_model(d, transfer)
    tables = [torch.from_numpy(table) for table in rope_tables(model, side, side, CAPTION_TOKENS, transfer.positions)]
    noise = sample_noise(spec.count, 3, spec.size_px)

    def show(step: int, model: PixelModel) -> None:
        device = next(model.parameters()).device
        positions = [table.to(device) for table in tables]

        def predict(mixed: Tensor, time: Tensor, has_caption: bool) -> Tensor:
            used = embeds if has_caption else empty
            values, mask = (part.to(device).expand(len(mixed), *part.shape[1:]) for part in (used.values, used.mask))
            made: Tensor = model(mixed, time, values, mask, *positions)
            return made

        made = sample(predict, noise.to(device), spec.steps, spec.guidance, spec.shift).cpu()
        pixels = ((made.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
        show_samples(folder, step, np.ascontiguousarray(pixels.numpy()), descriptions)

    return show
