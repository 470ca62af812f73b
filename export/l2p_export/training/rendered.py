"""Renders of the small world as a corpus: its real images, where a source's own are too small or too poor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from l2p_export.training.corpus import append_rows, write_image, written_rows
from l2p_export.training.settings import require_settings
from l2p_export.training.world.captions import caption, describe
from l2p_export.training.world.render import render
from l2p_export.training.world.scenes import draw_description, place

if TYPE_CHECKING:
    from pathlib import Path

    from l2p_export.progress import Reporter


def world_captions(count: int, seed: int, *, held_out: bool = False) -> tuple[str, ...]:
    """Captions of the small world, said in its several ways; training combinations unless held out."""
    randoms = (np.random.default_rng([seed, index]) for index in range(count))
    return tuple(caption(draw_description(random, held_out=held_out), random) for random in randoms)


def render_corpus(
    prompts: Sequence[str],
    seeds_per_prompt: int,
    seed: int,
    size_px: tuple[int, int],
    out: Path,
    report: Reporter,
) -> int:
    """Render a corpus; a stopped run goes on with the next image.

    Args:
        prompts: captions of the small world, in order.
        seeds_per_prompt: images of each, with places of their own.
        seed: the first image's; each next one has the next. Rows state none: no model drew these.
        size_px: height and width.
        out: the corpus's folder.
        report: told of images.

    Returns:
        Images rendered by this call.

    Raises:
        UsageError: a prompt is none of the small world, or the folder holds a corpus of other settings.
        HostError: the disk is full; what was rendered is kept.
    """
    height, width = size_px
    short = min(height, width)
    descriptions = [describe(prompt) for prompt in prompts]
    settings: dict[str, object] = {
        "source": "renders",
        "prompts": len(prompts),
        "seeds_per_prompt": seeds_per_prompt,
        "seed": seed,
        "size": f"{width}x{height}",
    }
    require_settings(out, settings)
    total, done = len(prompts) * seeds_per_prompt, written_rows(out)
    with report.stage("rendering the corpus", total - done, "images") as advance:
        for number in range(done, total):
            index = number // seeds_per_prompt
            random = np.random.default_rng([seed + number])
            scene = place(descriptions[index], random, (height / short, width / short))
            image = render(scene, height, width)
            append_rows(out, [write_image(out, number, image, prompts[index], None)])
            advance(1)
    return total - done
