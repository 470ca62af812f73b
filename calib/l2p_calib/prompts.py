"""Reads prompts, one per line: the captions that ship with the package, or a user's own file."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from l2p_runtime.errors import UsageError
from l2p_runtime.textfile import read_lines

FILE_BYTES_MAX = 1 << 20
"""Maximum size of a file of prompts to calibrate on; all of it is read."""


def read_prompts(path: Path | None = None, bytes_max: int = FILE_BYTES_MAX) -> tuple[str, ...]:
    """Prompts in their order; empty lines and those that begin with `#` are left out.

    Args:
        path: None for those of the package (Apache-2.0).
        bytes_max: maximum size of the file.

    Raises:
        UsageError: the file cannot be read, is not UTF-8, too large, holds no prompt, or has a carriage return in a
            line.
    """
    if path is not None:
        return tuple(text for _, text in numbered_prompts(path, bytes_max))
    text = resources.files("l2p_calib").joinpath("data/prompts.txt").read_text(encoding="utf-8")
    return tuple(line for _, line in _prompts(text.split("\n")))


def numbered_prompts(path: Path, bytes_max: int = FILE_BYTES_MAX) -> tuple[tuple[int, str], ...]:
    """As `read_prompts`: the number of each prompt's line, from 1, and the prompt."""
    try:
        lines = read_lines(path, bytes_max)
    except OSError as error:
        raise UsageError(
            f"cannot read prompts from `{path}`: {error.strerror or error}",
            hint="give a text file, one prompt per line",
        ) from error
    prompts = _prompts(lines)
    if not prompts:
        raise UsageError(f"`{path}` holds no prompt", hint="write one prompt per line")
    for number, text in prompts:
        # It ends a line in files of old Macs, and overwrites one in terminals; no model was trained on it.
        if "\r" in text:
            raise UsageError(
                f"`{path}` line {number} has a carriage return inside a prompt",
                hint="end lines with a newline, or with a carriage return and a newline",
            )
    return prompts


def _prompts(lines: list[str]) -> tuple[tuple[int, str], ...]:
    stripped = ((number, line.strip()) for number, line in enumerate(lines, 1))
    return tuple((number, line) for number, line in stripped if line and not line.startswith("#"))
