"""Rendered corpora of the small world: exact images, where those that a source draws are too small or too poor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from l2p_export.training.corpus.corpus import (
    Row,
    append_rows,
    corpus_images,
    write_image,
    written_corpus,
    written_rows,
)
from l2p_export.training.corpus.pictures import PIXELS_MAX
from l2p_export.training.loop.settings import digest
from l2p_export.world.captions import caption, describe
from l2p_export.world.render import render
from l2p_export.world.scenes import Scene, draw_description, place
from l2p_runtime.errors import UsageError
from l2p_runtime.noise import checked_seed

SHORT_SIDE_MIN_PX = 16
"""Below this, a shape has only a few pixels."""

if TYPE_CHECKING:
    from pathlib import Path

    from l2p_runtime.progress import Reporter


def world_captions(count: int, seed: int, *, held_out: bool = False) -> tuple[str, ...]:
    """Random captions of the small world in varied wording; training combinations unless `held_out`.

    Raises:
        UsageError: a seed out of range.
    """
    checked_seed(seed)
    randoms = (np.random.default_rng([seed, index]) for index in range(count))
    return tuple(caption(draw_description(random, held_out=held_out), random) for random in randoms)


@dataclass(frozen=True, slots=True)
class RenderedScenes:
    """Scenes of the small world with their captions, rendered on demand."""

    rows: tuple[Row, ...]
    scenes: tuple[Scene, ...]

    def __len__(self) -> int:
        """Number of scenes."""
        return len(self.scenes)


def world_scenes(count: int, seed: int) -> RenderedScenes:
    """The scenes that `render_corpus` renders as squares for the `count` captions of a seed.

    Raises:
        UsageError: none, or a seed out of range.
    """
    texts = world_captions(count, seed)
    corpus_images(texts, 1, seed)
    scenes = tuple(place(describe(text), np.random.default_rng([seed + index])) for index, text in enumerate(texts))
    return RenderedScenes(tuple(Row(f"scene {index}", text, None) for index, text in enumerate(texts)), scenes)


def render_corpus(
    prompts: Sequence[str],
    seeds_per_prompt: int,
    seed: int,
    size_px: tuple[int, int],
    out: Path,
    report: Reporter,
) -> int:
    """Render a corpus; a stopped run resumes with the next image.

    Args:
        prompts: captions of the small world, in order.
        seeds_per_prompt: images per prompt, each with its own random positions.
        seed: of the first image; it increases by 1 per image. Rows store no seed, because no model drew the images.
        size_px: height and width.
        out: the corpus's folder.
        report: gets the number of images.

    Returns:
        Images rendered by this call.

    Raises:
        UsageError: no prompt, one that is not a caption of the small world, a size or seed out of range, or the folder
            holds a corpus of other settings.
        HostError: another command writes there, or the disk is full; what was rendered is kept.
    """
    height, width = size_px
    short = min(height, width)
    if short < SHORT_SIDE_MIN_PX or height * width > PIXELS_MAX:
        raise UsageError(
            f"an image of {width}x{height} px, expected sides of at least {SHORT_SIDE_MIN_PX} px and up to "
            f"{PIXELS_MAX:,} pixels"
        )
    total = corpus_images(prompts, seeds_per_prompt, seed)
    descriptions = [describe(prompt) for prompt in prompts]
    settings: dict[str, object] = {
        "source": "renders",
        "prompts": digest(prompts),
        "seeds_per_prompt": seeds_per_prompt,
        "seed": seed,
        "size": f"{width}x{height}",
    }
    with written_corpus(out, settings):
        done = written_rows(out)
        with report.task("rendering the corpus", total - done, "images") as advance:
            for number in range(done, total):
                index = number // seeds_per_prompt
                random = np.random.default_rng([seed + number])
                scene = place(descriptions[index], random, (height / short, width / short))
                image = render(scene, height, width)
                append_rows(out, [write_image(out, number, image, prompts[index], None)])
                advance(1)
        return total - done
