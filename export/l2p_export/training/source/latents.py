"""Latents of rendered scenes: encoded once, cached in a file, used in every epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from l2p_export.training.loop.loop import CPU
from l2p_export.training.source.autoencoder import encode
from l2p_export.training.source.tokens import caption_ids
from l2p_export.world.batched import render_batch, what_lies_where
from l2p_export.world.captions import caption
from l2p_export.world.scenes import Scene, draw_description, place, scenes_digest
from l2p_runtime.errors import HostError
from l2p_runtime.tensorfile import write_tensorfile

if TYPE_CHECKING:
    import tokenizers
    from diffusers import AutoencoderKL

    from l2p_runtime.progress import Reporter

_PIXELS_AT_ONCE = 1 << 20
"""Pixels that are encoded at once: 64 scenes of 128 px."""

_MADE_FROM = "made_from"


@dataclass(frozen=True, slots=True)
class LatentData:
    """Latents [N,16,h,w] of zero mean and unit variance, token ids of their captions, and of the empty caption.

    Attributes:
        shares: [N, h*w/4, K], the share of each of the K `LABELS` in each patch of 2 x 2 latents.
        made_from: identifies the autoencoder and the scenes.
    """

    latents: Tensor
    ids: Tensor
    empty: Tensor
    shares: Tensor
    made_from: str = ""


@dataclass(frozen=True, slots=True)
class SceneSet:
    """A set of training scenes: number, side of the images, and seed of captions and positions."""

    count: int
    size_px: int
    seed: int


def scene_latents(
    path: Path,
    model: AutoencoderKL,
    tokenizer: tokenizers.Tokenizer,
    scenes: SceneSet,
    report: Reporter,
    device: torch.device = CPU,
) -> LatentData:
    """Latents and captions of training scenes, normalized with the autoencoder's shift and scale.

    Args:
        path: safetensors cache file; read if it was made from the same inputs, else written.
        model: trained autoencoder, on the device.
        tokenizer: the small world's.
        scenes: the scenes to encode.
        report: gets the number of scenes.
        device: device of the result.

    Raises:
        HostError: the file cannot be written.
    """
    # Identifies the file's inputs: latents of another autoencoder or another set of scenes are recomputed.
    drawn = [_scene(scenes.seed, index) for index in range(scenes.count)]
    made_from = f"{_digest(model)} {scenes_digest(drawn)} {scenes.size_px}"
    stored = _read(path, made_from)
    if stored is None:
        stored = _encode(model, tokenizer, drawn, scenes.size_px, report, device)
        _write(path, stored, made_from)
    config = model.config
    latents = (stored["latents"].to(device).float() - config.shift_factor) * config.scaling_factor
    rows, columns = (size // 2 for size in latents.shape[2:])
    at_once = _at_once(scenes.size_px)
    shares = [
        what_lies_where([scene for _, scene in drawn[start : start + at_once]], rows, columns, device).to(torch.float16)
        for start in range(0, scenes.count, at_once)
    ]
    return LatentData(
        latents.to(torch.float16),
        stored["ids"].to(device),
        caption_ids(tokenizer, [""])[0].to(device),
        torch.cat(shares).flatten(1, 2),
        made_from,
    )


def _scene(seed: int, index: int) -> tuple[str, Scene]:
    random = np.random.default_rng([seed, index])
    description = draw_description(random)
    scene = place(description, random)
    return caption(description, random), scene


def _at_once(size_px: int) -> int:
    return max(1, _PIXELS_AT_ONCE // size_px**2)


def _encode(
    model: AutoencoderKL,
    tokenizer: tokenizers.Tokenizer,
    drawn: Sequence[tuple[str, Scene]],
    size_px: int,
    report: Reporter,
    device: torch.device,
) -> dict[str, Tensor]:
    parts, at_once = [], _at_once(size_px)
    with report.task(f"scenes of {size_px} px as latents", len(drawn), "scenes") as advance:
        for start in range(0, len(drawn), at_once):
            scenes = [scene for _, scene in drawn[start : start + at_once]]
            images = render_batch(scenes, size_px, size_px, device).contiguous(memory_format=torch.channels_last)
            parts.append(encode(model, images, at_once).to(torch.float16))
            advance(len(scenes))
    latents = torch.cat(parts).cpu().contiguous()
    return {"latents": latents, "ids": caption_ids(tokenizer, [text for text, _ in drawn])}


def _read(path: Path, made_from: str) -> dict[str, Tensor] | None:
    """The stored tensors, or None if the file is absent, damaged or made from other inputs."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get(_MADE_FROM) == made_from:
                return {name: file.get_tensor(name) for name in ("latents", "ids")}
    except (OSError, SafetensorError):
        pass
    return None


def _write(path: Path, tensors: dict[str, Tensor], made_from: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensorfile(path, {name: tensor.numpy() for name, tensor in tensors.items()}, {_MADE_FROM: made_from})
    except OSError as error:
        raise HostError(f"cannot write `{path}`: {error.strerror or error}", hint="make room, then again") from error


def _digest(model: AutoencoderKL) -> str:
    digest = hashlib.sha256()
    for name, values in sorted(model.state_dict().items()):
        digest.update(name.encode() + values.to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()
