"""Options and arguments that name what a command reads."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from l2p_runtime.errors import UsageError

Command = TypeVar("Command", bound=Callable[..., Any])

_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
_HINT = "check the path; a relative one starts in the working folder"


class InputPath(click.Path):
    """A file or folder that is read.

    Args:
        noun: what it is, for the error when there is none.

    Raises:
        UsageError: nothing is there.
    """

    def __init__(self, noun: str) -> None:
        super().__init__(path_type=Path)
        self.noun = noun

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path, of something that is there."""
        if not isinstance(value, os.PathLike):
            require_input(str(value), self.noun)
        return super().convert(value, param, ctx)


def require_input(path: str, noun: str) -> None:
    """Refuse a path where nothing is. What may not be looked at is left to the reader to explain.

    Raises:
        UsageError: an empty path, or one that names nothing.
    """
    if not path:
        raise UsageError(f"the path of the {noun} is empty", hint="give a path; in a script, check the variable")
    try:
        os.stat(path)  # noqa: PTH116 - an empty path is no folder here
    except OSError as error:
        if error.errno in _ABSENT:
            raise UsageError(f"there is no {noun} `{path}`", hint=_HINT) from error
    except ValueError as error:
        raise UsageError(f"there is no {noun} `{path!r}`: {error}", hint=_HINT) from error


def lora_option(command: Command) -> Command:
    """`--lora`, as text that `parse_lora` takes; its file or folder is there."""
    return click.option(
        "--lora",
        "loras",
        multiple=True,
        metavar="FILE:STRENGTH",
        callback=_existing_loras,
        help="Merge a LoRA; repeatable.",
    )(command)


def _existing_loras(ctx: click.Context, param: click.Parameter, texts: tuple[str, ...]) -> tuple[str, ...]:
    del ctx, param
    if texts:
        from l2p_export.checkpoint.lora import parse_lora

        for text in texts:
            require_input(str(parse_lora(text).path), "LoRA")
    return texts
