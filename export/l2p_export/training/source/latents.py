"""Rendered scenes as latents: encoded once, kept in a file, read by every epoch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from l2p_export.training.source.autoencoder import IMAGE_PX, encode
from l2p_export.training.source.tokens import caption_ids
from l2p_export.training.world.captions import caption
from l2p_export.training.world.render import render
from l2p_export.training.world.scenes import draw_description, place
from l2p_runtime.errors import HostError

if TYPE_CHECKING:
    import tokenizers
    from diffusers import AutoencoderKL

    from l2p_export.progress import Reporter

_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class LatentData:
    """Latents [N,16,h,w] of zero mean and unit variance, their captions' token numbers, and those of no caption."""

    latents: Tensor
    ids: Tensor
    empty: Tensor


def scene_latents(
    path: Path, model: AutoencoderKL, tokenizer: tokenizers.Tokenizer, count: int, seed: int, report: Reporter
) -> LatentData:
    """Latents and captions of `count` training scenes, shifted and scaled by the autoencoder's own numbers.

    Args:
        path: safetensors file that keeps them; read instead where it exists.
        model: trained autoencoder.
        tokenizer: the small world's.
        count: scenes.
        seed: where captions and places come from.
        report: told of scenes.

    Raises:
        HostError: the file cannot be written.
    """
    from safetensors.torch import load_file, save_file

    if not path.exists():
        parts, texts = [], []
        with report.stage("scenes as latents", count, "scenes") as advance:
            for start in range(0, count, _AT_ONCE):
                images = []
                for index in range(start, min(count, start + _AT_ONCE)):
                    random = np.random.default_rng([seed, index])
                    description = draw_description(random)
                    images.append(render(place(description, random), IMAGE_PX, IMAGE_PX))
                    texts.append(caption(description, random))
                parts.append(encode(model, np.stack(images)).to(torch.float16))
                advance(len(images))
        partial = path.with_suffix(".partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({"latents": torch.cat(parts).contiguous(), "ids": caption_ids(tokenizer, texts)}, partial)
            partial.replace(path)
        except OSError as error:
            raise HostError(f"cannot write `{path}`: {error.strerror or error}", hint="make room") from error
    stored = load_file(path)
    config = model.config
    latents = (stored["latents"].float() - config.shift_factor) * config.scaling_factor
    return LatentData(latents.to(torch.float16), stored["ids"], caption_ids(tokenizer, [""])[0])
