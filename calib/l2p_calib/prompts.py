"""Calibration prompts: the captions that ship with the package, or a file of one's own."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from l2p_runtime.errors import UsageError

_FILE_BYTES_MAX = 1 << 20


def read_prompts(path: Path | None = None) -> tuple[str, ...]:
    """Prompts, one a line; empty lines and those that begin with `#` are left out.

    Args:
        path: None for those of the package (Apache-2.0).

    Raises:
        UsageError: no such file, not UTF-8, too large, or no prompt in it.
    """
    if path is None:
        text = resources.files("l2p_calib").joinpath("data/prompts.txt").read_text(encoding="utf-8")
    else:
        if not path.is_file():
            raise UsageError(f"there is no file `{path}`", hint="give a text file with one prompt a line")
        if path.stat().st_size > _FILE_BYTES_MAX:
            raise UsageError(f"`{path}` has {path.stat().st_size:,} bytes, expected at most {_FILE_BYTES_MAX:,}")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"`{path}` is not UTF-8: {error}") from error
    lines = (line.strip() for line in text.splitlines())
    prompts = tuple(dict.fromkeys(line for line in lines if line and not line.startswith("#")))
    if not prompts:
        raise UsageError(f"`{path}` holds no prompt", hint="write one prompt a line")
    return prompts
