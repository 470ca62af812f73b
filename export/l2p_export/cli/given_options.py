"""Options that a command was given, as arguments that another process takes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from l2p_export.farm.job import Argument

_GIVEN = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)
_WORD = re.compile(r"[A-Za-z0-9_.,:+x\u00d7-]*")
_TEXTS = ("prompt", "negative")
"""Options whose value is text, whatever it is."""


def given_options(ctx: click.Context, options: Iterable[click.Parameter]) -> tuple[Argument, ...]:
    """Those of some options that a command was given, with absolute paths; arguments are left out.

    Args:
        ctx: of the command.
        options: of the command, in the order of the result.
    """
    found: list[Argument] = []
    for option in options:
        name = str(option.name)
        if isinstance(option, click.Option) and ctx.get_parameter_source(name) in _GIVEN:
            value = ctx.params[name]
            found += [_argument(option, single) for single in (value if option.multiple else (value,))]
    return tuple(found)


def absolute(path: Path) -> Path:
    """A path from the root; a link in it stays, since another machine may know only that name."""
    return Path(os.path.abspath(path))  # noqa: PTH100 - links stay


def _argument(option: click.Option, value: Any) -> Argument:
    if option.is_flag:
        return Argument(option.opts[0], "", "flag")
    if isinstance(option.type, click.Path):
        path = absolute(value)
        return Argument(option.opts[0], str(path), "folder" if path.is_dir() else "file")
    text = str(value)
    is_word = option.name not in _TEXTS and _WORD.fullmatch(text) is not None
    return Argument(option.opts[0], text, "word" if is_word else "text")
