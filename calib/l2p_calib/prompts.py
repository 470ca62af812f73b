"""Reads prompts, one per line: the captions that ship with the package, or a user's own file."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from l2p_runtime.errors import UsageError

FILE_BYTES_MAX = 1 << 20
"""Maximum size of a file of prompts to calibrate on; all of it is read."""


def read_prompts(path: Path | None = None, most_bytes: int = FILE_BYTES_MAX) -> tuple[str, ...]:
    """Prompts in their order; empty lines and those that begin with `#` are left out.

    Args:
        path: None for those of the package (Apache-2.0).
        most_bytes: maximum size of the file.

    Raises:
        UsageError: the file cannot be read, is not UTF-8, too large, or holds no prompt.
    """
    if path is None:
        text = resources.files("l2p_calib").joinpath("data/prompts.txt").read_text(encoding="utf-8")
    else:
        text = _read(path, most_bytes)
    lines = (line.strip() for line in text.splitlines())
    prompts = tuple(line for line in lines if line and not line.startswith("#"))
    if not prompts:
        raise UsageError(f"`{path}` holds no prompt", hint="write one prompt per line")
    return prompts


def _read(path: Path, most_bytes: int) -> str:
    try:
        size_bytes = path.stat().st_size
        if size_bytes > most_bytes:
            raise UsageError(f"`{path}` has {size_bytes:,} bytes, expected at most {most_bytes:,}")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"cannot read prompts from `{path}`: {error.strerror or error}",
            hint="give a text file, one prompt per line",
        ) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"`{path}` is not UTF-8: {error}", hint="save it as UTF-8") from error
