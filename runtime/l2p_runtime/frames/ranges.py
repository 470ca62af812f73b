"""Frame ranges in the dialects of Open Job Description and of fileseq (docs/frames.md, "Ranges").

    parse_frames("1-100x2")               50 frames; only fileseq writes x
    parse_frames("1-10:3")                refused: the dialects read it differently
    parse_frames("1-10:3", "openjd")      1, 4, 7, 10
    parse_frames("1-10:3", "fileseq")     1, 4, 7, 10, 3, 5, 9, 2, 6, 8

A range holds its spans, not its numbers, so that ten million frames take no more memory than ten.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal, get_args

from l2p_runtime.arguments import one_of, shown
from l2p_runtime.arguments import text as checked_text
from l2p_runtime.errors import UsageError

Dialect = Literal["openjd", "fileseq"]
DIALECTS: tuple[str, ...] = get_args(Dialect)

FRAMES_MAX = 10_000_000
FRAME_MIN, FRAME_MAX = -(2**31), 2**31 - 1
"""Frames are 32 bit numbers on every farm, and so are the image indexes of a seed."""

_PARTS_MAX = 100_000
"""The longest argument of a Linux process holds fewer."""
_CROSSINGS_MAX = 1_000_000
_SORTED_MAX = 1_000_000

_PART = re.compile(r"\s*(-?[0-9]{1,10})(?:\s*-\s*(-?[0-9]{1,10})(?:\s*([xy:])\s*(-?[0-9]{1,10}))?)?\s*")
_FORMS = {
    "openjd": "frames as 5, 1-100, 1-100:2 or 10-1:-3, joined by commas",
    "fileseq": "frames as 5, 1-100, 1-100x2, 1-100y2 or 1-100:2, joined by commas",
}

Mode = Literal["step", "without", "interleaved"]
_SIGNS: dict[Mode, str] = {"step": "x", "without": "y", "interleaved": ":"}


@dataclass(frozen=True, slots=True)
class Span:
    """One part of a frame range.

    Attributes:
        base: all frames from the first to the last, in steps of 1 or -1.
        mode: `step`: every `every`-th of them; `without`: all but these; `interleaved`: all, coarse before fine.
        every: 1 or more.
    """

    base: range
    mode: Mode = "step"
    every: int = 1

    @property
    def low(self) -> int:
        """The smallest frame, or one below it."""
        return min(self._ends)

    @property
    def high(self) -> int:
        """The largest frame, or one above it."""
        return max(self._ends)

    @property
    def _ends(self) -> tuple[int, int]:
        kept = self.base[:: self.every] if self.mode == "step" else self.base
        return kept[0], kept[-1]

    def __len__(self) -> int:
        if self.mode == "interleaved":
            return len(self.base)
        stepped = len(self.base[:: self.every])
        return stepped if self.mode == "step" else len(self.base) - stepped

    def __contains__(self, frame: object) -> bool:
        if self.mode == "interleaved":
            return frame in self.base
        is_stepped = frame in self.base[:: self.every]
        return is_stepped if self.mode == "step" else frame in self.base and not is_stepped

    def __iter__(self) -> Iterator[int]:
        if self.mode == "interleaved":
            return _interleaved(self.base, self.every)
        stepped = self.base[:: self.every]
        return iter(stepped) if self.mode == "step" else (frame for frame in self.base if frame not in stepped)

    def text(self) -> str:
        """As fileseq reads it."""
        if len(self.base) == 1:
            return str(self.base[0])
        sign = "" if self.mode == "step" and self.every == 1 else f"{_SIGNS[self.mode]}{self.every}"
        return f"{self.base[0]}-{self.base[-1]}{sign}"


@dataclass(frozen=True, slots=True)
class FrameRange:
    """Frames in their order, each once: a frame of several spans belongs to the first.

    Attributes:
        spans: parts of the range, in order.
    """

    spans: tuple[Span, ...]
    _earlier: tuple[tuple[Span, ...], ...] = field(init=False, repr=False, compare=False)
    _count: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_earlier", _crossed_before(self.spans))
        crossed = any(self._earlier)
        object.__setattr__(self, "_count", sum(1 for _ in self) if crossed else sum(map(len, self.spans)))

    def __len__(self) -> int:
        return self._count

    def __contains__(self, frame: object) -> bool:
        return any(frame in span for span in self.spans)

    def __iter__(self) -> Iterator[int]:
        for span, earlier in zip(self.spans, self._earlier, strict=True):
            if earlier:
                yield from (frame for frame in span if not any(frame in other for other in earlier))
            else:
                yield from span

    def __str__(self) -> str:
        return self.text("fileseq")

    def text(self, dialect: Dialect) -> str:
        """The range as text that `parse_frames` reads as the same frames in this dialect.

        fileseq keeps their order too; Open Job Description sorts them.

        Raises:
            UsageError: spans that cross, of more frames than can be sorted for Open Job Description.
        """
        if dialect == "fileseq":
            return ",".join(span.text() for span in self.spans)
        stepped = [span.base[:: span.every] if span.mode == "step" else span.base for span in self.spans]
        if any(self._earlier) or any(span.mode == "without" for span in self.spans):
            if len(self) > _SORTED_MAX:
                raise UsageError(f"frames `{_cut(str(self))}` cannot be written as Open Job Description has them")
            stepped = list(_runs(sorted(self)))
        return ",".join(_openjd_text(numbers) for numbers in sorted(stepped, key=min))


def parse_frames(text: str, dialect: Dialect | None = None) -> FrameRange:
    """Frames of a range as users and farms write it.

    Args:
        text: parts joined by commas, with spaces between numbers and signs.
        dialect: how `:` and overlaps are read; None takes what both dialects read as the same frames, and what only
            one of them can mean.

    Raises:
        UsageError: the text is no range in the dialect, means different frames in each, or is over `FRAMES_MAX`.
    """
    checked_text("frames", text)
    if dialect is not None:
        return _READERS[one_of("the frame dialect", dialect, DIALECTS)](text)
    found: dict[str, FrameRange] = {}
    for name, reader in _READERS.items():
        with suppress(UsageError):
            found[name] = reader(text)
    if not found:
        return _fileseq(text)  # which says what is wrong
    # What Open Job Description reads is in what fileseq reads: equal numbers of frames are equal frames.
    if len(found) == len(DIALECTS) and len(found["openjd"]) != len(found["fileseq"]):
        readings = " and ".join(f"{_told(frames)} in {name}" for name, frames in found.items())
        raise UsageError(
            f"frames `{_cut(text)}` are {readings}",
            hint="choose one with --frame-dialect (dialect= in Python), or write x instead of : for every n-th frame",
        )
    return found.get("fileseq") or found["openjd"]


def frames_of(numbers: Iterable[int]) -> FrameRange:
    """The range of some frames in their order, each given once."""
    return FrameRange(tuple(_span(run) for run in _runs(numbers)))


def _openjd(text: str) -> FrameRange:
    spans = []
    for part, first, last, sign, step in _parts(text, "openjd"):
        if last is None:
            spans.append(Span(range(first, first + 1)))
            continue
        if sign not in (None, ":") or step == 0 or (last - first) * step < 0:
            raise _refused(part, "openjd")
        spans.append(_span(_base(first, last)[:: abs(step)]))
    spans.sort(key=lambda span: span.low)
    for span, following in itertools.pairwise(spans):
        if span.high >= following.low:
            raise UsageError(
                f"frames `{_cut(text)}` overlap at {following.low}, which Open Job Description refuses",
                hint="--frame-dialect fileseq merges them",
            )
    return _limited(text, spans)


def _fileseq(text: str) -> FrameRange:
    spans = []
    for part, first, last, sign, step in _parts(text, "fileseq"):
        if last is None:
            spans.append(Span(range(first, first + 1)))
            continue
        # A minus before the step is only allowed where it says what is so.
        if step == 0 or (step < 0 and last >= first):
            raise _refused(part, "fileseq")
        base, every = _base(first, last), abs(step)
        if sign == "y":
            spans.append(Span(base, "without", every))
        elif sign == ":" and every > 1 and len(base) > 1:
            spans.append(Span(base, "interleaved", every))
        else:
            spans.append(_span(base[::every]))
    kept = [span for span in dict.fromkeys(spans) if len(span)]
    if not kept:
        raise UsageError(f"frames `{_cut(text)}` are none: y{spans[0].every} leaves out all of them")
    return _limited(text, kept)


_READERS = {"openjd": _openjd, "fileseq": _fileseq}


def _parts(text: str, dialect: str) -> Iterator[tuple[str, int, int | None, str | None, int]]:
    """Each part with its first frame, its last, the sign before the step, and the step."""
    if text.count(",") >= _PARTS_MAX:
        raise UsageError(f"frames have {text.count(',') + 1:,} parts, expected up to {_PARTS_MAX:,}")
    for part in text.split(","):
        match = _PART.fullmatch(part)
        if match is None:
            raise _refused(part, dialect)
        first, last = int(match[1]), None if match[2] is None else int(match[2])
        for frame in (first, first if last is None else last):
            if not FRAME_MIN <= frame <= FRAME_MAX:
                raise UsageError(f"frame {frame} is out of range, expected {FRAME_MIN:,} to {FRAME_MAX:,}")
        yield part, first, last, match[3], int(match[4] or 1)


def _limited(text: str, spans: Sequence[Span]) -> FrameRange:
    if (count := sum(map(len, spans))) > FRAMES_MAX:
        raise UsageError(
            f"frames `{_cut(text)}` are {count:,}, expected up to {FRAMES_MAX:,}", hint="draw them in several calls"
        )
    return FrameRange(tuple(spans))


def _refused(part: str, dialect: str) -> UsageError:
    sign = next((sign for sign in "xy" if sign in part), "") if dialect == "openjd" else ""
    hint = f"--frame-dialect fileseq reads {sign}" if sign else "negative frames are written as -5--1"
    return UsageError(f"frames hold {shown(part.strip())}, expected {_FORMS[dialect]}", hint=hint)


def _crossed_before(spans: Sequence[Span]) -> tuple[tuple[Span, ...], ...]:
    """For each span the earlier ones that reach into it."""
    crossed: list[list[int]] = [[] for _ in spans]
    active: list[int] = []
    crossings = 0
    for index in sorted(range(len(spans)), key=lambda index: spans[index].low):
        active = [other for other in active if spans[other].high >= spans[index].low]
        crossings += len(active)
        if crossings > _CROSSINGS_MAX:
            raise UsageError("frames have too many parts that overlap", hint="join the parts")
        for other in active:
            crossed[max(index, other)].append(min(index, other))
        active.append(index)
    return tuple(tuple(spans[other] for other in sorted(others)) for others in crossed)


def _interleaved(base: range, every: int) -> Iterator[int]:
    """Every n-th frame, then those of every smaller step that were not there yet."""
    seen = bytearray(len(base))
    for step in range(min(every, len(base)), 0, -1):
        if step == 1:
            yield from (base[index] for index in range(len(base)) if not seen[index])
            return
        for index in range(0, len(base), step):
            if not seen[index]:
                seen[index] = 1
                yield base[index]


def _runs(numbers: Iterable[int]) -> Iterator[range]:
    """Numbers in their order as ranges; a step other than 1 or -1 needs three numbers."""
    run: list[int] = []  # first, second, last, of one step
    for number in numbers:
        if len(run) == 3 and number - run[2] == run[1] - run[0]:
            run[2] = number
            continue
        if len(run) == 2 and number - run[1] == run[1] - run[0]:
            run.append(number)
            continue
        if len(run) == 3:
            yield _stepped(run)
            run = []
        elif len(run) == 2:
            if abs(run[1] - run[0]) == 1:
                yield _stepped(run)
                run = []
            else:
                yield range(run[0], run[0] + 1)
                run = run[1:]
        run.append(number)
    if len(run) == 2 and abs(run[1] - run[0]) != 1:
        yield from (range(number, number + 1) for number in run)
    elif run:
        yield _stepped(run)


def _stepped(run: Sequence[int]) -> range:
    step = run[1] - run[0] if len(run) > 1 else 1
    return range(run[0], run[-1] + (1 if step > 0 else -1), step)


def _span(numbers: range) -> Span:
    return Span(_base(numbers[0], numbers[-1]), "step", abs(numbers.step) if len(numbers) > 1 else 1)


def _base(first: int, last: int) -> range:
    return range(first, last + 1) if last >= first else range(first, last - 1, -1)


def _openjd_text(numbers: range) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    return f"{numbers[0]}-{numbers[-1]}" + ("" if numbers.step == 1 else f":{numbers.step}")


def _told(frames: FrameRange) -> str:
    first = [str(frame) for frame in itertools.islice(frames, 6)]
    return f"{len(frames):,} frames ({', '.join(first)}{', ...' if len(frames) > len(first) else ''})"


def _cut(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:60]}..."
