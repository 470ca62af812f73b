"""Reads prompts by frame: a JSON Lines file, one object a line (docs/frames.md, "Prompts by frame").

{"frame": 1, "prompt": "a red circle"}
{"frame": 2, "prompt": "a blue square", "negative": "text", "seed": 7, "size": "512x512", "out": "title.png"}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from l2p_runtime.arguments import integer, real_number, shown, size, text, whole_number
from l2p_runtime.errors import L2PError, UsageError
from l2p_runtime.frames.ranges import FRAME_MAX, FRAME_MIN
from l2p_runtime.textfile import read_lines

FILE_BYTES_MAX = 64 << 20


@dataclass(frozen=True, slots=True)
class PromptLine:
    """What a line says of a frame; None where it says nothing.

    Attributes:
        number: of the line, from 1.
        size: height and width in pixels.
        out: name of the file, in the folder of the others.
    """

    number: int
    frame: int
    prompt: str | None = None
    negative: str | None = None
    seed: int | None = None
    size: tuple[int, int] | None = None
    steps: int | None = None
    guidance: float | None = None
    out: str | None = None


def read_prompts(path: Path) -> dict[int, PromptLine]:
    """The lines of a file by frame, in the order of the file; empty lines are skipped.

    Raises:
        UsageError: a line that is no object, an unknown key, a value of another type, a frame of two lines, no lines,
            or a file that is too large or no UTF-8 text. It names the line.
        OSError: the file cannot be read.
    """
    found: dict[int, PromptLine] = {}
    for number, words in enumerate(read_lines(path, FILE_BYTES_MAX), 1):
        if not words.strip():
            continue
        with_line = _parsed(words, number, path)
        earlier = found.setdefault(with_line.frame, with_line)
        if earlier is not with_line:
            raise UsageError(f"frame {with_line.frame} is in lines {earlier.number} and {number} of `{path}`")
    if not found:
        raise UsageError(f"`{path}` has no lines", hint='write {"frame": 1, "prompt": "a red circle"} for each frame')
    return found


def in_line(error: L2PError, line: int, path: Path | None) -> L2PError:
    """The same error, which says in what line it was found, and of what file if that is known."""
    place = f"line {line}" if path is None else f"line {line} of `{path}`"
    return type(error)(f"{place}: {error}", hint=error.hint)


def _parsed(words: str, number: int, path: Path) -> PromptLine:
    try:
        return PromptLine(number=number, **_values(_object(words)))
    except UsageError as error:
        raise in_line(error, number, path) from error


def _object(words: str) -> Mapping[str, Any]:
    try:
        found = json.loads(words, object_pairs_hook=_without_twins, parse_constant=_no_number)
    # Numbers of thousands of digits, and nesting without end.
    except (ValueError, RecursionError) as error:
        raise UsageError(f"no JSON: {error}", hint="write one object a line, without line breaks in it") from error
    if not isinstance(found, dict):
        raise UsageError(f"a {type(found).__name__}, expected an object with the keys {', '.join(_CHECKS)}")
    return found


def _values(found: Mapping[str, Any]) -> dict[str, Any]:
    if unknown := sorted(found.keys() - _CHECKS.keys()):
        raise UsageError(f"the key {shown(unknown[0])} is not known, expected {', '.join(_CHECKS)}")
    if "frame" not in found:
        raise UsageError("there is no `frame`")
    return {key: _CHECKS[key](key, value) for key, value in found.items()}


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise UsageError(f"the key {shown(key)} is there twice")
        found[key] = value
    return found


def _no_number(name: str) -> NoReturn:
    raise UsageError(f"{name} is no number of JSON")


def _frame(name: str, value: object) -> int:
    return whole_number(name, value, FRAME_MIN, FRAME_MAX)


def _seed(name: str, value: object) -> int:
    return whole_number(name, value, 0, 2**64 - 1)


def _plain_name(name: str, value: object) -> str:
    """A file name that leads into no other folder."""
    found = text(name, value)
    if found in ("", ".", "..") or "/" in found or "\\" in found:
        raise UsageError(f"{name} is {shown(found)}, expected a file name without a folder")
    return found


_CHECKS: Mapping[str, Callable[[str, object], Any]] = {
    "frame": _frame,
    "prompt": text,
    "negative": text,
    "seed": _seed,
    "size": size,
    "steps": integer,
    "guidance": real_number,
    "out": _plain_name,
}
"""Key to the check of its value."""
