"""What a run shows while it learns: a sheet of samples, the judge's score beside the step, and a plot of both."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from l2p_export.families.z_image_l2p.pixel import PixelModel
from l2p_export.families.z_image_l2p.specs import model_spec
from l2p_export.training.flow import sample
from l2p_export.training.loop.loop import PROGRESS_NAME
from l2p_export.training.source.draw import decode
from l2p_export.training.source.folder import encode_texts
from l2p_export.training.source.tokens import CAPTION_TOKENS, caption_ids
from l2p_export.world.captions import caption
from l2p_export.world.judge import judge
from l2p_export.world.scenes import Description, draw_description
from l2p_runtime.errors import HostError, UsageError
from l2p_runtime.noise import normal_noise
from l2p_runtime.positions import rope_tables

if TYPE_CHECKING:
    import tokenizers
    from diffusers import AutoencoderKL
    from numpy.typing import NDArray

    from l2p_export.families.z_image_l2p.dimensions import Dimensions
    from l2p_export.training.source.folder import Source
    from l2p_export.training.source.model import SourceModel

SCORES_NAME, PLOT_NAME = "scores.csv", "progress.png"
SHEET_COLUMNS = 8


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """What is drawn at each saved state: as many training captions as held-out ones, with fixed noise."""

    count: int = 32
    size_px: int = 128
    steps: int = 12
    guidance: float = 3.0
    shift: float = 2.0

    def __post_init__(self) -> None:
        """Check that there is something to judge, and what judges it.

        Raises:
            UsageError: fewer than two, which are no half of each.
            HostError: scikit-image or matplotlib is not installed.
        """
        if self.count < 2:
            raise UsageError(f"{self.count} samples, expected 2 or more", hint="or 0, for none at all")
        for library in ("skimage", "matplotlib"):
            if importlib.util.find_spec(library) is None:
                raise HostError(
                    f"samples need `{library}`, which is not installed", hint="pip install 'l2p-export[train]'"
                )


def source_samples(
    folder: Path, d: Dimensions, autoencoder: AutoencoderKL, tokenizer: tokenizers.Tokenizer, spec: SampleSpec
) -> Callable[[int, SourceModel], None]:
    """A function for `train_transformer` that draws, judges and plots at each saved state."""
    descriptions = _descriptions(spec.count)
    ids = caption_ids(tokenizer, [caption(description) for description in descriptions])
    empty = caption_ids(tokenizer, [""]).expand(spec.count, -1)
    side = spec.size_px // 8
    noise = _noise(spec.count, 16, side)
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
        _show(folder, step, images, descriptions)

    return show


def pixel_samples(folder: Path, d: Dimensions, source: Source, spec: SampleSpec) -> Callable[[int, PixelModel], None]:
    """A function for `transfer` that draws, judges and plots at each saved state."""
    descriptions = _descriptions(spec.count)
    embeds = encode_texts(source, [caption(description) for description in descriptions], CAPTION_TOKENS)
    empty = encode_texts(source, [""], CAPTION_TOKENS)
    side = spec.size_px // d.patch_px
    tables = [torch.from_numpy(table) for table in rope_tables(model_spec(d), side, side, CAPTION_TOKENS)]
    noise = _noise(spec.count, 3, spec.size_px)

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
        _show(folder, step, np.ascontiguousarray(pixels.numpy()), descriptions)

    return show


def write_plot(folder: Path) -> None:
    """Draw `progress.png` from the run's loss and scores."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    losses = _columns(folder / PROGRESS_NAME, ("step", "loss"))
    scores = _columns(folder / SCORES_NAME, ("step", "training", "held_out"))
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    if losses:
        kept = np.asarray(losses)
        # A mean over fifty steps, so that the trend shows in noise.
        width = min(50, len(kept))
        mean = np.convolve(kept[:, 1], np.ones(width) / width, "valid")
        left.plot(kept[width - 1 :, 0], mean)
        left.set_yscale("log")
    left.set(xlabel="step", ylabel="loss")
    if scores:
        points = np.asarray(scores)
        right.plot(points[:, 0], points[:, 1], label="training captions")
        right.plot(points[:, 0], points[:, 2], label="held-out captions")
        right.legend()
    right.set(xlabel="step", ylabel="right, by the judge", ylim=(0, 1))
    FigureCanvasAgg(figure).print_png(str(folder / PLOT_NAME))


def _show(folder: Path, step: int, images: NDArray[np.uint8], descriptions: Sequence[Description]) -> None:
    """Write the sheet, add the score, draw the plot."""
    from PIL import Image

    passed = np.array(
        [judge(image, description).passed for image, description in zip(images, descriptions, strict=True)]
    )
    half = len(passed) // 2
    new = not (folder / SCORES_NAME).exists()
    with (folder / SCORES_NAME).open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(("step", "training", "held_out"))
        writer.writerow((step, f"{passed[:half].mean():.4f}", f"{passed[half:].mean():.4f}"))
    columns = min(SHEET_COLUMNS, len(images))
    rows = [np.concatenate(list(images[i : i + columns]), axis=1) for i in range(0, len(images), columns)]
    Image.fromarray(np.concatenate([row for row in rows if row.shape == rows[0].shape])).save(folder / "samples.png")
    write_plot(folder)


def _descriptions(count: int) -> list[Description]:
    random = np.random.default_rng(5)
    half = count // 2
    return [draw_description(random) for _ in range(half)] + [
        draw_description(random, held_out=True) for _ in range(count - half)
    ]


def _noise(count: int, channels: int, side: int) -> Tensor:
    planes = [normal_noise(seed, channels=channels, rows=(0, side), cols=(0, side)) for seed in range(count)]
    return torch.from_numpy(np.stack(planes))


def _columns(path: Path, names: Sequence[str]) -> list[list[float]]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        return [[float(row[name]) for name in names] for row in csv.DictReader(file)]
