"""Progress of a training run: a sheet of samples, the judge's score per step, and a plot of loss and scores."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from l2p_export.training.loop.loop import PROGRESS_NAME
from l2p_export.world.judge import judge
from l2p_export.world.scenes import Description, draw_description
from l2p_runtime.errors import HostError, UsageError
from l2p_runtime.files import atomic_file
from l2p_runtime.noise import normal_noise

if TYPE_CHECKING:
    from numpy.typing import NDArray


SCORES_NAME, PLOT_NAME = "scores.csv", "progress.png"
SHEET_COLUMNS = 8


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """Samples to draw at each saved state: half training captions, half held-out captions, with fixed noise."""

    count: int = 32
    size_px: int = 128
    steps: int = 12
    guidance: float = 3.0
    shift: float = 2.0

    def __post_init__(self) -> None:
        """Check the number of samples and the libraries.

        Raises:
            UsageError: fewer than two samples, so not one of each half.
            HostError: scikit-image or matplotlib is not installed.
        """
        if self.count < 2:
            raise UsageError(f"{self.count} samples, expected 2 or more", hint="or 0, for none at all")
        for library in ("skimage", "matplotlib"):
            if importlib.util.find_spec(library) is None:
                raise HostError(
                    f"samples need `{library}`, which is not installed", hint="pip install 'l2p-export[train]'"
                )


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
    with atomic_file(folder / PLOT_NAME) as file:
        FigureCanvasAgg(figure).print_png(file)


def show_samples(folder: Path, step: int, images: NDArray[np.uint8], descriptions: Sequence[Description]) -> None:
    """Write the sheet of samples, append the score to `scores.csv`, and draw the plot.

    Args:
        folder: of the run.
        step: optimizer steps so far.
        images: uint8 [N,H,W,3]; the first half is of training captions.
        descriptions: one per image.
    """
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
    sheet = Image.fromarray(np.concatenate([row for row in rows if row.shape == rows[0].shape]))
    with atomic_file(folder / "samples.png") as file:
        sheet.save(file, "PNG")
    write_plot(folder)


def sample_descriptions(count: int) -> list[Description]:
    """`count` descriptions, the same at every call: the first half training, the rest held-out combinations."""
    random = np.random.default_rng(5)
    half = count // 2
    return [draw_description(random) for _ in range(half)] + [
        draw_description(random, held_out=True) for _ in range(count - half)
    ]


def sample_noise(count: int, channels: int, side: int) -> Tensor:
    """Fixed noise [N,C,S,S] float32, one seed per sample."""
    planes = [normal_noise(seed, channels=channels, rows=(0, side), cols=(0, side)) for seed in range(count)]
    return torch.from_numpy(np.stack(planes))


def _columns(path: Path, names: Sequence[str]) -> list[list[float]]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        return [[float(row[name]) for name in names] for row in csv.DictReader(file)]
