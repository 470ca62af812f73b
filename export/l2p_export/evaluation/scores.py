"""Scores a model on the small world: verdicts of the judge by category and part, and a Frechet distance to renders.

Each image is judged when it is drawn, so memory holds one at a time. A folder keeps them; a stopped run resumes there.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from l2p_calib.prompts import numbered_prompts
from l2p_export.evaluation.contact_sheet import SHEET_IMAGES, contact_sheet, framed_tile
from l2p_export.evaluation.features import DIMENSIONS, features, frechet_distance
from l2p_export.training.corpus.corpus import (
    METADATA_NAME,
    PROMPTS_BYTES_MAX,
    append_rows,
    open_corpus,
    read_image,
    write_image,
    written_corpus,
    written_rows,
)
from l2p_export.world.captions import caption, describe
from l2p_export.world.judge import Verdict, judge
from l2p_export.world.render import render
from l2p_export.world.scenes import Description, draw_description, place
from l2p_runtime.errors import ArtifactError, HostError, UsageError
from l2p_runtime.files import write_text
from l2p_runtime.images.png import write_png
from l2p_runtime.noise import checked_seed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from l2p_export.evaluation.drawers import Draw, Drawer
    from l2p_runtime.progress import Reporter

SCORES_NAME, ROWS_NAME, SHEET_NAME = "scores.json", "rows.jsonl", "contact.png"

PARTS = ("background", "colours", "shapes", "relation", "object count")
"""Parts of a caption that the judge checks separately."""

_Z = 1.959963984540054
"""Half width of the central 95 % interval of a normal distribution, in standard deviations."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One image to draw: its caption, the parsed caption, and the seed of its noise."""

    text: str
    description: Description
    seed: int


@dataclass(frozen=True, slots=True)
class Score:
    """Number of images that passed, of `count`."""

    passed: int
    count: int

    @property
    def share(self) -> float | None:
        """Passed share, 0 to 1; None without images."""
        return self.passed / self.count if self.count else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Wilson's 95 % interval of the share (Wilson 1927); None without images.

        It stays within 0 and 1 and is wide for few images. The normal approximation has width 0 at shares of 0 and 1.
        """
        if not self.count:
            return None
        n, share = self.count, self.passed / self.count
        middle = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
        half = _Z / (1 + _Z**2 / n) * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
        return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True, slots=True)
class Row:
    """Verdict of the judge on one image; `parts` holds only the parts that its caption has."""

    prompt: Prompt
    passed: bool
    text: str
    parts: Mapping[str, bool]


@dataclass(frozen=True, slots=True)
class Frechet:
    """Distances between sets of images on fixed features (`features.py`).

    Attributes:
        images: in each set.
        to_renders: from the drawn images to renders of their descriptions; None with too few images.
        between_renders: from these renders to others of the same descriptions; a perfect model reaches this distance.
    """

    images: int
    to_renders: float | None
    between_renders: float | None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Scores of a set of images.

    Attributes:
        rows: one per image, in order.
        overall: all images.
        categories: kind of caption to its images.
        parts: part of a caption to the images whose captions have it.
        sheet: pixels [H,W,3] of the first images in green and red frames.
    """

    rows: tuple[Row, ...]
    overall: Score
    categories: Mapping[str, Score]
    parts: Mapping[str, Score]
    frechet: Frechet
    sheet: NDArray[np.uint8]


def world_prompts(count: int, seed: int, *, held_out: bool) -> tuple[Prompt, ...]:
    """Random captions of the small world in their plain wording; equal seeds give equal captions.

    Args:
        count: number of captions.
        seed: of the captions and of the first image's noise; the noise seed increases by 1 per image.
        held_out: use the held-out combinations instead of the training combinations.

    Raises:
        UsageError: a seed out of range.
    """
    _check_seeds(seed, count)
    random = np.random.default_rng(seed)
    drawn = (draw_description(random, held_out=held_out) for _ in range(count))
    return tuple(Prompt(caption(description), description, seed + index) for index, description in enumerate(drawn))


def file_prompts(path: Path, images_per_prompt: int, seed: int) -> tuple[Prompt, ...]:
    """Captions of the small world from a text file, one per line.

    Args:
        path: UTF-8; empty lines and lines that begin with # are ignored.
        images_per_prompt: images of each caption, in consecutive order.
        seed: of the first image; it increases by 1 per image.

    Raises:
        UsageError: no such file, no prompt in it, a line that is not a caption of the small world, or a seed out of
            range.
    """
    texts = numbered_prompts(path, PROMPTS_BYTES_MAX)
    _check_seeds(seed, len(texts) * images_per_prompt)
    prompts: list[Prompt] = []
    for number, text in texts:
        try:
            description = describe(text)
        except UsageError as error:
            raise UsageError(
                f"`{path}` line {number}: {error}",
                hint=f"{error.hint}; --layout draws any prompts for the public benchmarks, without judging",
            ) from error
        for _ in range(images_per_prompt):
            prompts.append(Prompt(text, description, seed + len(prompts)))
    return tuple(prompts)


def draw_all(
    drawer: Drawer, prompts: Sequence[Prompt], out: Path | None, reporter: Reporter
) -> Iterator[NDArray[np.uint8]]:
    """Yield the image [H,W,3] of each prompt, in order.

    With a folder, the images that it holds are read. The others are drawn, and written there as a corpus one by one as
    they are consumed. The folder is locked until all images are consumed.

    Args:
        drawer: the model.
        prompts: what to draw.
        out: the folder, or None to keep nothing.
        reporter: gets the number of images.

    Raises:
        UsageError: the folder holds images of other settings.
        ArtifactError: an image in the folder was changed or damaged, or is of another prompt.
        HostError: another command writes there, or the disk is full; what was drawn is kept.
    """
    if out is None:
        yield from _draw_rest(drawer, prompts, None, 0, reporter)
        return
    texts = "\n".join(prompt.text for prompt in prompts)
    settings: dict[str, object] = {
        "evaluation": "small world",
        "prompts": hashlib.sha256(texts.encode()).hexdigest(),
        "images": len(prompts),
        "seed": prompts[0].seed,
        **drawer.settings,
    }
    with written_corpus(out, settings):
        done = written_rows(out)
        if done:
            yield from _drawn_before(out, prompts, reporter)
        yield from _draw_rest(drawer, prompts, out, done, reporter)


def _drawn_before(out: Path, prompts: Sequence[Prompt], reporter: Reporter) -> Iterator[NDArray[np.uint8]]:
    """The images that a folder holds, which must be those of the first prompts."""
    corpus = open_corpus(out)
    for number, row in enumerate(corpus.rows):
        if number >= len(prompts) or (row.text, row.seed) != (prompts[number].text, prompts[number].seed):
            raise ArtifactError(
                f"`{out / METADATA_NAME}`: image {number + 1}, of {row.text!r} and seed {row.seed}, is not one of this "
                "evaluation",
                hint="give another --out",
            )
    with reporter.task("judging what was drawn before", len(corpus), "images") as advance:
        for row in corpus.rows:
            yield read_image(corpus, row)
            advance(1)


def _draw_rest(
    drawer: Drawer, prompts: Sequence[Prompt], out: Path | None, done: int, reporter: Reporter
) -> Iterator[NDArray[np.uint8]]:
    """Draw the prompts from number `done` on, and write each image to the folder before it is yielded."""
    if done >= len(prompts):
        return
    with reporter.task("drawing", len(prompts) - done, "images") as advance:
        for number, image in enumerate(_draw(drawer.draw, prompts[done:]), done):
            if out is not None:
                prompt = prompts[number]
                append_rows(out, [write_image(out, number, image, prompt.text, prompt.seed)])
            yield image
            advance(1)


def evaluate(prompts: Sequence[Prompt], images: Iterable[NDArray[np.uint8]]) -> Evaluation:
    """Judge one image for each prompt, and compare all of them with renders.

    Args:
        prompts: one or more.
        images: sRGB pixels [H,W,3] of each, all of one size.

    Raises:
        UsageError: no image, or an array that is not an image.
        ValueError: the numbers of images and prompts differ.
    """
    if not prompts:
        raise UsageError("there is no image to score", hint="give at least one prompt")
    rows: list[Row] = []
    tiles: list[NDArray[np.uint8]] = []
    found = np.empty((3, len(prompts), DIMENSIONS))
    for index, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        verdict = judge(image, prompt.description)
        rows.append(Row(prompt, verdict.passed, verdict.text, _parts(verdict)))
        if index < SHEET_IMAGES:
            tiles.append(framed_tile(image, passed=verdict.passed))
        height, width = image.shape[:2]
        renders = (_render(prompt, height, width, which) for which in range(2))
        found[:, index] = [features(pixels) for pixels in (image, *renders)]
    drawn, rendered, others = found
    frechet = Frechet(len(rows), frechet_distance(drawn, rendered), frechet_distance(rendered, others))
    names = [_categories(row.prompt.description) for row in rows]
    return Evaluation(
        tuple(rows),
        _score(row.passed for row in rows),
        {name: _score(row.passed for row, of in zip(rows, names, strict=True) if of[name]) for name in names[0]},
        {name: _score(row.parts[name] for row in rows if name in row.parts) for name in PARTS},
        frechet,
        contact_sheet(tiles),
    )


def scores_json(evaluation: Evaluation) -> dict[str, object]:
    """All figures of an evaluation as JSON values."""
    frechet = evaluation.frechet
    return {
        "overall": _score_json(evaluation.overall),
        "categories": {name: _score_json(score) for name, score in evaluation.categories.items()},
        "parts": {name: _score_json(score) for name, score in evaluation.parts.items()},
        "frechet": {
            "to_renders": frechet.to_renders,
            "between_renders": frechet.between_renders,
            "images": frechet.images,
            "dimensions": DIMENSIONS,
            "features": "4x4 block colours and 8 edge directions; not Inception, not comparable with a published FID",
            "reason": frechet_reason(frechet),
        },
    }


def frechet_reason(frechet: Frechet) -> str:
    """Reason why there is no distance; empty if there is one."""
    if frechet.to_renders is not None:
        return ""
    return f"not enough images: {frechet.images}, wanted more than the {DIMENSIONS} features"


def write_evaluation(out: Path, evaluation: Evaluation, scores: Mapping[str, object]) -> None:
    """Write `scores.json`, `rows.jsonl` (in the order of `metadata.jsonl`) and the contact sheet, each atomically.

    Raises:
        HostError: the files cannot be written.
    """
    rows = [
        {
            "prompt": row.prompt.text,
            "seed": row.prompt.seed,
            "held_out": row.prompt.description.held_out,
            "passed": row.passed,
            "verdict": row.text,
            "parts": row.parts,
        }
        for row in evaluation.rows
    ]
    _write_text(out / ROWS_NAME, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_png(out / SHEET_NAME, evaluation.sheet, {})
    _write_text(out / SCORES_NAME, json.dumps(scores, indent=1, ensure_ascii=False) + "\n")


def _parts(verdict: Verdict) -> dict[str, bool]:
    values = (verdict.background, verdict.colours, verdict.shapes, verdict.relation, verdict.count)
    return {name: value for name, value in zip(PARTS, values, strict=True) if value is not None}


def _categories(description: Description) -> dict[str, bool]:
    """Each category to whether a description belongs to it."""
    objects, named, held_out = len(description.things), description.background is not None, description.held_out
    return {
        "one object": objects == 1,
        "two objects": objects == 2,
        "background named": named,
        "no background named": not named,
        "held-out combination": held_out,
        "training combination": not held_out,
    }


def _score(passed: Iterable[bool]) -> Score:
    values = list(passed)
    return Score(sum(values), len(values))


def _score_json(score: Score) -> dict[str, object]:
    low, high = score.interval or (None, None)
    return {"share": score.share, "low": low, "high": high, "passed": score.passed, "count": score.count}


def _draw(draw: Draw, prompts: Sequence[Prompt]) -> Iterator[NDArray[np.uint8]]:
    return draw([prompt.text for prompt in prompts], [prompt.seed for prompt in prompts])


def _render(prompt: Prompt, height: int, width: int, which: int) -> NDArray[np.uint8]:
    """Render a prompt's description at random positions; `which` selects them."""
    short = min(height, width)
    scene = place(prompt.description, np.random.default_rng([prompt.seed, which]), (height / short, width / short))
    return render(scene, height, width)


def _check_seeds(seed: int, count: int) -> None:
    checked_seed(seed)
    checked_seed(seed + max(count, 1) - 1)


def _write_text(path: Path, text: str) -> None:
    try:
        write_text(path, text)
    except OSError as error:
        raise HostError(f"cannot write `{path}`: {error.strerror or error}", hint="make room, then again") from error
