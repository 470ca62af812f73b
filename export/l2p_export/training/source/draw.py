"""Draws batches of images with a latent source, for a training corpus and for its evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from l2p_export.families.z_image_l2p.dimensions import Dimensions, published_dimensions, source_dimensions
from l2p_export.families.z_image_l2p.latent import LATENT_CHANNELS, LATENT_PATCH, LatentModel
from l2p_export.families.z_image_l2p.pixel import load_published
from l2p_export.families.z_image_l2p.specs import model_spec
from l2p_export.tensors.digests import weights_digest
from l2p_export.tensors.sources import read_tensor
from l2p_export.training.corpus.corpus import append_rows, corpus_images, next_image, write_image, written_corpus
from l2p_export.training.flow import sample
from l2p_export.training.loop.loop import CPU
from l2p_export.training.loop.settings import digest
from l2p_export.training.source.folder import Embeds, Source, encode_texts, folder_digest, load_autoencoder
from l2p_export.world.captions import describe
from l2p_export.world.judge import judge, require_judge
from l2p_runtime.errors import ArtifactError, UsageError
from l2p_runtime.noise import normal_noise
from l2p_runtime.positions import rope_tables

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from numpy.typing import NDArray

    from l2p_runtime.progress import Reporter


@dataclass(frozen=True, slots=True)
class DrawSpec:
    """Settings of drawing with a source.

    Attributes:
        guidance: s in v_without + s (v_with - v_without); 1 is none.
        batch: images drawn at once.
    """

    height_px: int
    width_px: int
    steps: int
    guidance: float
    shift: float
    batch: int = 16

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            UsageError: names the one that is wrong.
        """
        if self.steps < 1 or self.batch < 1:
            raise UsageError("steps and batch must be 1 or more")
        if not (0 <= self.guidance < math.inf and 0 < self.shift < math.inf):
            raise UsageError(f"guidance is {self.guidance} and shift {self.shift}, expected 0 or more, and above 0")


@dataclass(frozen=True, slots=True)
class Artist:
    """A source in memory, ready to draw."""

    source: Source
    dimensions: Dimensions
    model: LatentModel
    autoencoder: AutoencoderKL
    device: torch.device = CPU

    @property
    def px_per_latent(self) -> int:
        """Pixels per latent along a side."""
        return int(2 ** (len(self.autoencoder.config.block_out_channels) - 1))


def load_artist(source: Source, device: torch.device = CPU) -> Artist:
    """Load a source's transformer and autoencoder in float32 onto a device.

    Raises:
        ArtifactError: a tensor is missing or has the wrong shape.
    """
    shapes = {name: tensor.shape for name, tensor in source.transformer.tensors.items()}
    d = source_dimensions(shapes, published_dimensions("1k"))
    model = LatentModel(d, lambda layer: torch.float32).eval().requires_grad_(requires_grad=False)
    missing = load_published(
        model, {name: torch.from_numpy(read_tensor(tensor)) for name, tensor in source.transformer.tensors.items()}
    )
    if missing:
        raise ArtifactError(
            f"`{source.folder}` lacks {len(missing)} tensors of its transformer, `{missing[0]}` first",
            hint="fetch the folder again",
        )
    autoencoder = load_autoencoder(source)
    # PyTorch's method: the library's override warns about things that do not apply here.
    nn.Module.to(autoencoder, device)
    return Artist(source, d, model.to(device), autoencoder, device)


def draw_images(artist: Artist, texts: Sequence[str], seeds: Sequence[int], spec: DrawSpec) -> NDArray[np.uint8]:
    """Draw one image for each text, from the noise of its seed.

    Returns:
        uint8 pixels [N,H,W,3].

    Raises:
        UsageError: a size that does not divide, or a text that is too long.
    """
    side_px = artist.px_per_latent * LATENT_PATCH
    if spec.height_px % side_px or spec.width_px % side_px or min(spec.height_px, spec.width_px) < side_px:
        raise UsageError(
            f"{spec.width_px}x{spec.height_px} does not divide into tokens, expected multiples of {side_px} px"
        )
    height, width = spec.height_px // artist.px_per_latent, spec.width_px // artist.px_per_latent
    noises = [normal_noise(seed, channels=LATENT_CHANNELS, rows=(0, height), cols=(0, width)) for seed in seeds]
    # A batch holds captions of one padded length, because the position of the image tokens follows from it.
    lengths = [-(-len(artist.source.tokenizer.tokens(text)) // 32) * 32 for text in texts]
    images = np.empty((len(texts), spec.height_px, spec.width_px, 3), np.uint8)
    for length in sorted(set(lengths)):
        members = [index for index, found in enumerate(lengths) if found == length]
        for start in range(0, len(members), spec.batch):
            part = members[start : start + spec.batch]
            embeds = encode_texts(artist.source, [texts[index] for index in part], length)
            noise = torch.from_numpy(np.stack([noises[index] for index in part]))
            images[part] = _draw(artist, embeds, noise, spec)
    return images


def draw_corpus(
    artist: Artist,
    prompts: Sequence[str],
    seeds_per_prompt: int,
    seed: int,
    spec: DrawSpec,
    out: Path,
    report: Reporter,
    *,
    judged: bool = False,
) -> int:
    """Draw a corpus of `seeds_per_prompt` images per prompt; a stopped run resumes with the next image.

    Args:
        artist: the loaded source.
        prompts: captions, in order.
        seeds_per_prompt: images per prompt.
        seed: of the first image; it increases by 1 per image.
        spec: settings of drawing.
        out: the corpus's folder.
        report: gets the number of images.
        judged: keep only images that show their caption, which must be one of the small world.

    Returns:
        Images added by this call.

    Raises:
        UsageError: no prompt, one that the judge cannot read, a seed out of range, or the folder holds a corpus of
            other settings.
        HostError: another command writes there, the disk is full (drawn images are kept), or scikit-image, which the
            judge needs, is not installed.
    """
    total = corpus_images(prompts, seeds_per_prompt, seed)
    if judged:
        require_judge()
    descriptions = [describe(prompt) for prompt in prompts] if judged else None
    settings: dict[str, object] = {
        # By content, because a folder of the same name may hold another source when a run resumes.
        "source": weights_digest(artist.source.transformer.tensors, artist.source.transformer.tensors),
        "source_files": folder_digest(artist.source.folder),
        "prompts": digest(prompts),
        "seeds_per_prompt": seeds_per_prompt,
        "seed": seed,
        "size": f"{spec.width_px}x{spec.height_px}",
        "steps": spec.steps,
        "guidance": spec.guidance,
        "shift": spec.shift,
    }
    if judged:
        settings["judged"] = True
    with written_corpus(out, settings):
        done, added = next_image(out), 0
        with report.task("drawing the corpus", total - done, "images") as advance:
            for start in range(done, total, spec.batch):
                numbers = range(start, min(total, start + spec.batch))
                texts = [prompts[number // seeds_per_prompt] for number in numbers]
                images = draw_images(artist, texts, [seed + number for number in numbers], spec)
                rows = [
                    write_image(out, number, image, text, seed + number)
                    for number, image, text in zip(numbers, images, texts, strict=True)
                    if descriptions is None or judge(image, descriptions[number // seeds_per_prompt]).passed
                ]
                append_rows(out, rows)
                advance(len(numbers))
                added += len(rows)
    return added


@torch.no_grad()
def _draw(artist: Artist, embeds: Embeds, noise: Tensor, spec: DrawSpec) -> NDArray[np.uint8]:
    rows, columns = noise.shape[2] // LATENT_PATCH, noise.shape[3] // LATENT_PATCH
    device = artist.device
    used = {
        has_caption: Embeds(found.values.to(device), found.mask.to(device))
        for has_caption, found in ((True, embeds), (False, encode_texts(artist.source, [""])))
    }
    model = model_spec(artist.dimensions)
    tables = {
        length: tuple(torch.from_numpy(table).to(device) for table in rope_tables(model, rows, columns, length))
        for length in {found.values.shape[1] for found in used.values()}
    }

    def predict(mixed: Tensor, time: Tensor, has_caption: bool) -> Tensor:
        found = used[has_caption]
        values, mask = (part.expand(len(mixed), *part.shape[1:]) for part in (found.values, found.mask))
        made: Tensor = artist.model(mixed, time, values, mask, *tables[values.shape[1]])
        return made

    latents = sample(predict, noise.to(device), spec.steps, spec.guidance, spec.shift)
    return decode(artist.autoencoder, latents)


def decode(autoencoder: AutoencoderKL, latents: Tensor) -> NDArray[np.uint8]:
    """Decode latents [N,16,h,w] of unit variance to uint8 pixels [N,H,W,3]."""
    config = autoencoder.config
    decoded = autoencoder.decode(latents / config.scaling_factor + (config.shift_factor or 0.0)).sample
    pixels = ((decoded.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return np.ascontiguousarray(pixels.permute(0, 2, 3, 1).cpu().numpy())
