"""A shot: frames, where each is written, and how it is drawn. Everything is checked before anything is drawn."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2p_runtime.coarse import check_coarse
from l2p_runtime.errors import UsageError
from l2p_runtime.frames.names import PLACEHOLDERS, FramePattern
from l2p_runtime.frames.prompts import PromptLine, in_line
from l2p_runtime.frames.ranges import FrameRange
from l2p_runtime.guidance import prompts_of
from l2p_runtime.requests import ImageRequest, check_size, image_request
from l2p_runtime.text import bundle_tokenizer

if TYPE_CHECKING:
    from l2p_runtime.bundle import Bundle
    from l2p_runtime.contract import Manifest
    from l2p_runtime.text import Tokenizer

IMAGE_INDEXES = 2**32


@dataclass(frozen=True, slots=True, eq=False)
class FrameRequest:
    """One frame.

    Attributes:
        frame: its number.
        path: the file to write.
        call: keyword arguments of `Pipeline.generate`.
    """

    frame: int
    path: Path
    call: Mapping[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class Shot:
    """Frames that are drawn with one pipeline; iterating yields their requests one by one.

    Attributes:
        frames: which frames, in order.
        pattern: where they are written.
        call: keyword arguments of `Pipeline.generate`, for what a line does not say.
        lines: of a prompts file, by frame.
        prompts: that file.
        seed_per_frame: the frame is the image index of the seed, negative ones modulo 2^32; a line with a seed of its
            own has image index 0.
    """

    frames: FrameRange
    pattern: FramePattern
    call: Mapping[str, Any]
    lines: Mapping[int, PromptLine] = field(default_factory=dict)
    prompts: Path | None = None
    seed_per_frame: bool = False

    def __len__(self) -> int:
        return len(self.frames)

    def __iter__(self) -> Iterator[FrameRequest]:
        return map(self.request, self.frames)

    def path(self, frame: int) -> Path:
        """The file of a frame."""
        line = self.lines.get(frame)
        return self.pattern.path(frame) if line is None or line.out is None else self.pattern.folder / line.out

    def request(self, frame: int) -> FrameRequest:
        """What is drawn for a frame."""
        call = dict(self.call)
        if self.seed_per_frame:
            call["image_index"] = frame % IMAGE_INDEXES
        line = self.lines.get(frame)
        if line is not None:
            # A text of a line replaces embeddings of the whole shot.
            if line.prompt is not None:
                call |= {"prompt": line.prompt, "prompt_embeds": None}
            if line.negative is not None:
                call |= {"negative_prompt": line.negative, "negative_embeds": None}
            if line.seed is not None:
                call |= {"seed": line.seed, "image_index": 0}
            if line.size is not None:
                call["height"], call["width"] = line.size
            call |= {name: value for name in ("steps", "guidance") if (value := getattr(line, name)) is not None}
        return FrameRequest(frame, self.path(frame), call)


@dataclass(frozen=True, slots=True)
class ShotNeeds:
    """What drawing a shot takes.

    Attributes:
        calls: token rows and columns, and prompts of a step, to the tokens of the longest caption, unpadded.
        texts: tokens of each text that is encoded, from the longest.
    """

    calls: Mapping[tuple[tuple[int, int], int], int]
    texts: tuple[int, ...]


def check_shot(shot: Shot, bundle: Bundle) -> ShotNeeds:
    """Check every frame of a shot, before anything is drawn; equal ones once.

    Raises:
        UsageError: two frames of one file, frames without a prompt, or what `Pipeline.generate` refuses of one; what a
            line says is refused with its number.
        HostError: there are prompts, and `tokenizers` is not installed.
        ArtifactError: the bundle's tokenizer is damaged.
    """
    _check_files(shot)
    if shot.seed_per_frame and shot.call.get("rng", "philox") != "philox":
        raise UsageError(
            f"the noise {shot.call['rng']} has one image per seed, so that frames cannot have images of their own",
            hint="leave --seed-per-frame out, or take --rng philox",
        )
    count = _counter(bundle)
    calls: dict[tuple[tuple[int, int], int], int] = {}
    texts: dict[str, int] = {}
    for frame in _distinct(shot):
        call, line = shot.request(frame).call, shot.lines.get(frame)
        try:
            image = checked_call(bundle.manifest, call)
            longest = 0
            for caption in image.captions:
                length = len(caption)
                if isinstance(caption, str):
                    length = texts[caption] = count(caption, bool(call.get("truncate_prompt")))
                longest = max(longest, length)
            for key in _calls(bundle.manifest, call, image):
                calls[key] = max(calls.get(key, 0), longest)
        except UsageError as error:
            if line is not None:
                raise in_line(error, line.number, shot.prompts) from error
            if shot.lines:
                raise UsageError(f"frame {frame} has no line in `{shot.prompts}`: {error}", hint=error.hint) from error
            raise
    return ShotNeeds(calls, tuple(sorted(texts.values(), reverse=True)))


def checked_call(manifest: Manifest, call: Mapping[str, Any]) -> ImageRequest:
    """Check keyword arguments of `Pipeline.generate` against a bundle.

    Raises:
        UsageError: what `generate` refuses; but the length of prompts, which takes the tokenizer.
    """
    coarse = call.get("coarse")
    inputs = {name: call.get(name) for name in ("prompt", "negative_prompt", "prompt_embeds", "negative_embeds")}
    image = image_request(
        manifest,
        **inputs,
        height=call["height"],
        width=call["width"],
        seed=call.get("seed", 0),
        sampling={name: call.get(name) for name in ("steps", "guidance", "shift")},
        fine_guidance=1.0 if coarse is None else coarse.guidance,
        rng=call.get("rng", "philox"),
        dtype=call.get("dtype", "uint8"),
        image_index=call.get("image_index", 0),
        guidance_convention=call.get("guidance_convention", "l2p"),
    )
    model = manifest.model_on(call.get("base_grid"))
    if coarse is not None:
        check_size(model, coarse.height, coarse.width)
        check_coarse(coarse, *image.size_px)
    return image


def _calls(manifest: Manifest, call: Mapping[str, Any], image: ImageRequest) -> Iterator[tuple[tuple[int, int], int]]:
    """Token rows and columns, and prompts, of the steps of an image: of two sizes if it is drawn coarse first."""
    coarse = call.get("coarse")
    if coarse is None:
        yield image.grid, prompts_of(image.sampling.guidance)
        return
    yield check_size(manifest.model, coarse.height, coarse.width), prompts_of(image.sampling.guidance)
    yield image.grid, prompts_of(coarse.guidance)


def _counter(bundle: Bundle) -> Callable[[str, bool], int]:
    """Counts tokens of a text, which may be cut; loads the tokenizer for the first."""
    tokenizer: Tokenizer | None = None

    @functools.cache
    def count(text: str, truncate: bool) -> int:
        nonlocal tokenizer
        tokenizer = tokenizer or bundle_tokenizer(bundle)
        return len(tokenizer.tokens(text, truncate=truncate))

    return count


def _distinct(shot: Shot) -> Iterator[int]:
    """Frames that stand for all: one of those without a line, and each of those with one."""
    if not shot.lines:
        yield from itertools.islice(shot.frames, 1)
        return
    has_plain = False
    for frame in shot.frames:
        if frame in shot.lines:
            yield frame
        elif not has_plain:
            has_plain = True
            yield frame


def _check_files(shot: Shot) -> None:
    """Refuse two frames of one file, and a file of another format than the others."""
    pattern, suffix = shot.pattern, Path(shot.pattern.name(0)).suffix
    owners: dict[str, int] = {}
    for frame in shot.frames if shot.lines else ():
        line = shot.lines.get(frame)
        if line is None or line.out is None:
            continue
        problem = ""
        if Path(line.out).suffix.lower() != suffix.lower():
            problem = f"out is `{line.out}`, expected a name that ends in {suffix}, as --out does"
        owner = owners.setdefault(line.out, frame)
        named = pattern.frame(line.out)
        if named is not None and named in shot.frames and shot.path(named) == pattern.folder / line.out:
            # Names that two lines give are told above.
            owner = named if owner == frame else owner
        if owner != frame:
            problem = f"out is `{line.out}`, which frame {owner} is written to"
        if problem:
            raise in_line(UsageError(problem), line.number, shot.prompts)
    if pattern.digits is not None:
        return
    plain = list(itertools.islice(_without_out(shot), 2))
    if len(plain) > 1 or (plain and pattern.before in owners):
        raise UsageError(
            f"--out is `{pattern.before}` for {len(shot):,} frames, expected a name with the frame in it",
            hint=f"put {PLACEHOLDERS} into the name, for four digits",
        )


def _without_out(shot: Shot) -> Iterator[int]:
    return (frame for frame in shot.frames if frame not in shot.lines or shot.lines[frame].out is None)
