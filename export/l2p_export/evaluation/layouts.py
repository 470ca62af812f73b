"""Writes images into the folders that public benchmark scripts read. Nothing is judged; any prompts work.

GenEval (github.com/djghosh13/geneval, evaluation/evaluate_images.py at 16f1681): folders named by a number hold the
prompt's line as `metadata.jsonl`, of which `prompt`, `tag`, `include` and `exclude` are read, and `samples/NUMBER.png`
of any size. The script ignores other files.

DPG-Bench (github.com/TencentQQGYLab/ELLA, dpg_bench/compute_dpg_bench.py at 025f650): one file per prompt file,
with the same name up to the first dot. It holds `--pic-num` (4 in its dist_eval.sh) squares of `--resolution` pixels in
a grid of 2 x 2. For other files, its own results among them, the script prints `Failed filename` and ignores them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from l2p_calib.prompts import FILE_BYTES_MAX
from l2p_export.training.corpus.corpus import PROMPTS_BYTES_MAX
from l2p_export.training.loop.settings import locked_folder, require_settings
from l2p_runtime.errors import HostError, UsageError
from l2p_runtime.files import write_text
from l2p_runtime.images.png import write_png
from l2p_runtime.noise import checked_seed
from l2p_runtime.textfile import read_lines, read_text

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from l2p_export.evaluation.drawers import Drawer
    from l2p_runtime.progress import Reporter

LAYOUTS = ("geneval", "dpg")

GRID_IMAGES = 4
"""Images in a file of DPG-Bench."""

_READ_BY_GENEVAL = ("prompt", "tag")


@dataclass(frozen=True, slots=True)
class Picture:
    """One image file: the images of one prompt, in a grid if there are several.

    Attributes:
        name: path in the folder, with slashes.
        place: source of the prompt, for error messages.
        text: the prompt.
        seeds: one per image: one or `GRID_IMAGES`.
    """

    name: str
    place: str
    text: str
    seeds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """Contents of a benchmark's folder: pictures to draw, and the text of other files by name."""

    benchmark: str
    pictures: tuple[Picture, ...]
    texts: Mapping[str, str] = field(default_factory=dict)

    @property
    def images(self) -> int:
        """Images to draw for all pictures."""
        return sum(len(picture.seeds) for picture in self.pictures)


def read_layout(benchmark: str, prompts: Path, images_per_prompt: int, seed: int) -> Layout:
    """Read a benchmark's prompts and lay out its folder.

    Args:
        benchmark: one of `LAYOUTS`.
        prompts: GenEval's `evaluation_metadata.jsonl`, or DPG-Bench's folder of text files.
        images_per_prompt: images of each; DPG-Bench takes 4.
        seed: of the first image; it increases by 1 per image.

    Raises:
        UsageError: no such benchmark, prompts that are absent, empty or not in its format, another count than it takes,
            or a seed out of range.
    """
    if benchmark not in LAYOUTS:
        raise UsageError(f"there is no layout {benchmark!r}", hint=f"take one of {', '.join(LAYOUTS)}")
    if images_per_prompt < 1:
        raise UsageError(f"images per prompt are {images_per_prompt}, expected 1 or more")
    layout = (_geneval if benchmark == "geneval" else _dpg)(prompts, images_per_prompt, seed)
    checked_seed(seed)
    checked_seed(seed + layout.images - 1)
    return layout


def check_size(layout: Layout, height_px: int, width_px: int) -> None:
    """Refuse a size that a benchmark's script would crop wrongly.

    Raises:
        UsageError: DPG-Bench with images that are not square.
    """
    if layout.benchmark == "dpg" and height_px != width_px:
        raise UsageError(
            f"images of {width_px}x{height_px} px do not suit DPG-Bench, whose script cuts squares",
            hint="give a square --size, and its side to the script as the resolution",
        )


def write_layout(layout: Layout, drawer: Drawer, out: Path, reporter: Reporter) -> int:
    """Draw the pictures that a folder lacks; a stopped run resumes with the next picture.

    Args:
        layout: contents of the folder.
        drawer: the model.
        out: the folder.
        reporter: gets the number of images.

    Returns:
        Images drawn by this call.

    Raises:
        UsageError: the folder holds images of other settings, or the size does not suit the benchmark.
        HostError: another command writes there, or the disk is full; what was drawn is kept.
    """
    check_size(layout, drawer.height_px, drawer.width_px)
    with locked_folder(out):
        require_settings(out, _settings(layout, drawer))
        for name, text in layout.texts.items():
            _write_text(out / name, text)
        return _draw(layout, drawer, out, reporter)


def _draw(layout: Layout, drawer: Drawer, out: Path, reporter: Reporter) -> int:
    pending = [picture for picture in layout.pictures if not (out / picture.name).is_file()]
    texts = [picture.text for picture in pending for _ in picture.seeds]
    seeds = [seed for picture in pending for seed in picture.seeds]
    if not pending:
        return 0
    images = drawer.draw(texts, seeds)
    with reporter.task("drawing", len(texts), "images") as advance:
        for picture in pending:
            pixels = _side_by_side(images, len(picture.seeds))
            _make_folder((out / picture.name).parent)
            said = {"prompt": picture.text, "seed": " ".join(map(str, picture.seeds))}
            write_png(out / picture.name, pixels, said)
            advance(len(picture.seeds))
    return len(texts)


def _geneval(path: Path, images_per_prompt: int, seed: int) -> Layout:
    """One folder per line of a JSON Lines file."""
    try:
        lines = read_lines(path, PROMPTS_BYTES_MAX)
    except OSError as error:
        raise UsageError(
            f"cannot read prompts from `{path}`: {error}", hint="give GenEval's evaluation_metadata.jsonl"
        ) from error
    pictures: list[Picture] = []
    texts: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place, folder = f"`{path}` line {number}", f"{len(texts):05}"
        prompt = _geneval_prompt(line, place)
        texts[f"{folder}/metadata.jsonl"] = line.strip() + "\n"
        for sample in range(images_per_prompt):
            name = f"{folder}/samples/{sample:05}.png"
            pictures.append(Picture(name, place, prompt, (seed + len(pictures),)))
    if not texts:
        raise UsageError(f"`{path}` holds no prompt", hint="give GenEval's evaluation_metadata.jsonl")
    return Layout("geneval", tuple(pictures), texts)


def _geneval_prompt(line: str, place: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{place} is no JSON: {error}", hint="give GenEval's evaluation_metadata.jsonl") from error
    for name in _READ_BY_GENEVAL:
        if not isinstance(row, dict) or not isinstance(row.get(name), str):
            raise UsageError(
                f"{place} has no text `{name}`, which GenEval's script reads",
                hint="give GenEval's evaluation_metadata.jsonl",
            )
    prompt: str = row["prompt"]
    return prompt


def _dpg(folder: Path, images_per_prompt: int, seed: int) -> Layout:
    """One grid per text file of a folder, sorted by name."""
    hint = "give DPG-Bench's folder of prompts, one .txt file each"
    if images_per_prompt != GRID_IMAGES:
        raise UsageError(f"images per prompt are {images_per_prompt}, DPG-Bench takes a grid of {GRID_IMAGES}")
    if not folder.is_dir():
        raise UsageError(f"cannot read prompts from `{folder}`: it is no folder", hint=hint)
    pictures: list[Picture] = []
    for path in sorted(folder.glob("*.txt")):
        if "." in path.stem:
            raise UsageError(f"`{path}` has a dot in its name, where DPG-Bench's script cuts it off", hint="rename it")
        try:
            text = read_text(path, FILE_BYTES_MAX).strip()
        except OSError as error:
            raise UsageError(f"cannot read a prompt from `{path}`: {error}", hint=hint) from error
        if not text:
            raise UsageError(f"`{path}` holds no prompt", hint="write the prompt into it, or remove it")
        first = seed + GRID_IMAGES * len(pictures)
        pictures.append(Picture(f"{path.stem}.png", f"`{path}`", text, tuple(range(first, first + GRID_IMAGES))))
    if not pictures:
        raise UsageError(f"`{folder}` holds no .txt file", hint=hint)
    return Layout("dpg", tuple(pictures))


def _settings(layout: Layout, drawer: Drawer) -> dict[str, object]:
    digest = hashlib.sha256()
    for picture in layout.pictures:
        digest.update(f"{picture.name}\0{picture.text}\n".encode())
    return {
        "layout": layout.benchmark,
        "prompts": digest.hexdigest(),
        "images": layout.images,
        "seed": layout.pictures[0].seeds[0],
        **drawer.settings,
    }


def _side_by_side(images: Iterator[NDArray[np.uint8]], count: int) -> NDArray[np.uint8]:
    """The next image, or the next four in a grid: left to right, then the row below."""
    if count == 1:
        return next(images)
    upper, lower = ([next(images) for _ in range(count // 2)] for _ in range(2))
    return np.concatenate([np.concatenate(row, axis=1) for row in (upper, lower)])


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HostError(f"cannot make `{folder}`: {error.strerror or error}", hint="choose another --out") from error


def _write_text(path: Path, text: str) -> None:
    _make_folder(path.parent)
    try:
        write_text(path, text)
    except OSError as error:
        raise HostError(f"cannot write `{path}`: {error.strerror or error}", hint="make room, then again") from error
