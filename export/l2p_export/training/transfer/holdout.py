"""Images held out from a transfer, and the loss on them: the same noise and sigmas at every saved state."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from l2p_export.training.corpus.rendered import RenderedScenes
from l2p_export.training.flow import draw_sigmas
from l2p_export.training.loop.loop import generator
from l2p_export.training.transfer.batches import Batch, Captions, Draws, assembler, draw_window
from l2p_runtime.errors import HostError, UsageError
from l2p_runtime.files import write_text

if TYPE_CHECKING:
    from l2p_export.families.z_image_l2p.dimensions import Dimensions
    from l2p_export.training.corpus.reader import Images
    from l2p_export.training.loop.distributed import ProcessGroup
    from l2p_export.training.transfer.spec import TransferSpec

LOSSES_NAME = "holdout.csv"
COLUMNS = ("step", "loss")

DRAWS_PER_IMAGE = 4
"""Sigmas at which each image is seen, because the loss depends more on sigma than on the image."""

_GROUP = 64
"""Samples of a group, whose sigmas are drawn together."""

_STREAM = 1 << 40
"""Takes the place of a step in random seeds; no run has as many steps."""


def holdout_count(holdout: float, images: int) -> int:
    """Number of held-out images; a `holdout` below 1 is a share.

    Raises:
        UsageError: no image would be left to train on.
    """
    count = max(1, round(holdout * images)) if 0 < holdout < 1 else int(holdout)
    if count >= images:
        raise UsageError(f"{count} of {images} images held out leave none to train on", hint="give a smaller --holdout")
    return count


def split_images(images: Images, count: int, seed: int) -> tuple[Images, Images | None]:
    """Images to train on, and `count` held-out images chosen by the seed; both in their order."""
    if not count:
        return images, None
    held_out = set(np.random.default_rng([seed, _STREAM]).permutation(len(images))[:count].tolist())
    parts = ([index for index in range(len(images)) if (index in held_out) == is_held] for is_held in (False, True))
    training, held = (_subset(images, part) for part in parts)
    return training, held


def held_out_batches(
    images: Images, captions: Captions, d: Dimensions, spec: TransferSpec, ranks: ProcessGroup
) -> Callable[[], Iterator[Batch]]:
    """Make a function that yields all held-out images `DRAWS_PER_IMAGE` times at each size.

    Captions are never dropped. Batches are as large as a rank's in training, and windows of the head are drawn as
    there, so they need no more memory.
    """
    assemble = assembler(images, captions, d, spec, ranks.device)
    drawn = list(_draws(captions, spec))
    count = spec.schedule.batch // (spec.schedule.micro_batches * ranks.size)

    def every() -> Iterator[Batch]:
        for number, draws in enumerate(drawn):
            seed = (spec.schedule.seed, _STREAM, number)
            for start in range(0, len(draws.places), count):
                yield assemble(draws, range(start, min(start + count, len(draws.places))), seed)

    return every


def mean_loss(batches: Iterator[Batch], loss: Callable[[Batch], torch.Tensor]) -> float:
    """Mean of a loss over all samples, without gradients."""
    total, samples = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            total += float(loss(batch)) * len(batch.mixed)
            samples += len(batch.mixed)
    return total / samples


def append_loss(folder: Path, step: int, loss: float) -> None:
    """Append a row to `holdout.csv`; rows of this step and of later ones, from before a resume, are dropped.

    Raises:
        HostError: the file cannot be written.
    """
    path = folder / LOSSES_NAME
    rows = [(before, value) for before, value in read_losses(folder) if before < step]
    lines = [",".join(COLUMNS), *(f"{at},{value:.6g}" for at, value in [*rows, (step, loss)])]
    try:
        write_text(path, "\n".join(lines) + "\n")
    except OSError as error:
        raise HostError(f"cannot write `{path}`: {error.strerror or error}", hint="make room, then again") from error


def read_losses(folder: Path) -> list[tuple[int, float]]:
    """Rows of `holdout.csv`: step and loss; damaged rows are left out."""
    path = folder / LOSSES_NAME
    if not path.is_file():
        return []
    rows = (line.split(",") for line in path.read_text(encoding="utf-8", errors="replace").split("\n"))
    return [(int(row[0]), float(row[1])) for row in rows if len(row) == len(COLUMNS) and _is_row(*row)]


def _draws(captions: Captions, spec: TransferSpec) -> Iterator[Draws]:
    """The random draws of all samples, in groups whose size follows from no number of ranks or micro batches."""
    number = 0
    for size_px in sorted(set(spec.sizes_px)):
        for length, places in captions.places.items():
            every = [place for place in places for _ in range(DRAWS_PER_IMAGE)]
            for start in range(0, len(every), _GROUP):
                part = tuple(every[start : start + _GROUP])
                draws = generator(spec.schedule.seed, _STREAM, number)
                yield Draws(
                    length,
                    size_px,
                    part,
                    draw_sigmas(len(part), spec.shift, draws),
                    torch.zeros(len(part), dtype=torch.bool),
                    draw_window(size_px // spec.patch_px, spec, draws),
                )
                number += 1


def _subset(images: Images, places: list[int]) -> Images:
    rows = tuple(images.rows[place] for place in places)
    if isinstance(images, RenderedScenes):
        return replace(images, rows=rows, scenes=tuple(images.scenes[place] for place in places))
    return replace(images, rows=rows)


def _is_row(step: str, loss: str) -> bool:
    try:
        return step.isdecimal() and math.isfinite(float(loss))
    except ValueError:
        return False
