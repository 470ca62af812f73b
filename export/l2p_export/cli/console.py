"""Shared parts of the commands: progress on stderr, data on stdout, options that mean the same everywhere."""

from __future__ import annotations

import bisect
import itertools
import json
import os
import re
import sys
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import click

from l2p_export.cli.stopping import Stops
from l2p_runtime import UsageError
from l2p_runtime.arguments import size

Command = TypeVar("Command", bound=Callable[..., Any])

_REDRAW_SECONDS = 0.1
_PLAIN_SECONDS = 5.0
# A rate measured over less time is not meaningful.
_RATE_SECONDS = 0.5
_CLEAR = "\r\x1b[K"
_MORE = "..."


@dataclass(slots=True)
class Session:
    """One run of the command line.

    Attributes:
        stops: the signals that have arrived.
        has_result: a JSON object was printed, so that an error prints no second one.
    """

    stops: Stops = field(default_factory=Stops)
    has_result: bool = False


def json_option(command: Command) -> Command:
    """`--json`: one JSON object on stdout instead of text."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")(command)


def quiet_option(command: Command) -> Command:
    """`--quiet`: no progress."""
    return click.option(
        "--quiet", "-q", is_flag=True, callback=_quieten, help="No progress on stderr; errors still show."
    )(command)


def _quieten(ctx: click.Context, param: click.Parameter, quiet: bool) -> bool:
    """Keep libraries, which are imported later, from advice and progress of their own."""
    del ctx, param
    if quiet:
        for library in ("DIFFUSERS", "TRANSFORMERS"):
            os.environ.setdefault(f"{library}_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        warnings.simplefilter("ignore")
    return quiet


def store_option(command: Command) -> Command:
    """`--store`: folder of a bundle's shared files."""
    return click.option(
        "--store",
        type=click.Path(path_type=Path),
        envvar="L2P_STORE",
        help="Store with the bundle's shared files, if it was moved since the build.",
    )(command)


def backend_option(command: Command) -> Command:
    """`--backend`: what runs a bundle's networks."""
    return click.option(
        "--backend",
        default="auto",
        show_default=True,
        help="auto: the fastest that runs here and that the bundle has files for; onnx: ONNX Runtime on the CPU; "
        "onnx-cuda: on a GPU; rtx or tensorrt: engines.",
    )(command)


def example(call: str) -> str:
    """The end of a command's help."""
    return f"\b\nExample:\n  l2p-export {call}"


def dry_run_option(command: Command) -> Command:
    """`--dry-run`: print what would be done."""
    return click.option(
        "--dry-run", is_flag=True, help="Check everything and print what would be done, without doing it."
    )(command)


def parse_size(text: str, option: str = "--size") -> tuple[int, int]:
    """Height and width in pixels, from `WIDTHxHEIGHT`.

    Raises:
        UsageError: the text is not a size.
    """
    return size(option, text)


def parse_grid(text: str | None) -> tuple[int, int] | None:
    """Token rows and columns, from `ROWSxCOLUMNS`; None for None.

    Raises:
        UsageError: the text is not a grid of positive sizes.
    """
    if text is None:
        return None
    match = re.fullmatch(r"([1-9][0-9]{0,8})[xX\u00d7]([1-9][0-9]{0,8})", text.strip())
    if match is None:
        raise UsageError(f"--base-grid is {text!r}, expected ROWSxCOLUMNS in tokens, as 64x64")
    return int(match[1]), int(match[2])


def print_json(data: object) -> None:
    """Write one JSON object to stdout."""
    session().has_result = True
    click.echo(json.dumps(data, indent=1, ensure_ascii=False))


def session() -> Session:
    """The run that this belongs to; one of its own outside of the command line."""
    context = click.get_current_context(silent=True)
    return (context.find_object(Session) if context else None) or Session()


class Console:
    """Implements `progress.Reporter` on stderr: a redrawn line on a terminal, plain flushed lines elsewhere."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._redraws = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._stops = session().stops

    @contextmanager
    def task(self, title: str, total: int = 0, unit: str = "bytes") -> Iterator[Callable[[int], None]]:
        """Show the progress of a task, and at its end how long it took."""
        self._stops.again()
        started = shown = first = time.monotonic()
        done = 0

        def advance(amount: int) -> None:
            nonlocal done, shown, first
            self._stops.again()
            now = time.monotonic()
            # Time before the first piece, e.g. for tracing an ONNX graph, does not count into the rate.
            first = first if done else now
            done += amount
            if now - shown >= (_REDRAW_SECONDS if self._redraws else _PLAIN_SECONDS):
                shown = now
                self._write(_line(title, done, total, unit, now - first), final=False)

        self._write(title if self._redraws else f"{title} ...", final=not self._redraws)
        yield advance
        seconds = time.monotonic() - started
        rate = f", {_amount(done / seconds, unit)}/s" if done and seconds >= _RATE_SECONDS else ""
        done_text = f", {_amount(done, unit)}{rate}" if done else ""
        self._write(f"{title}: done in {seconds:.1f} s{done_text}", final=True)

    @contextmanager
    def phases(self, title: str) -> Iterator[Callable[[float, str], None]]:
        """Show which share of a task is done, its current phase, and at its end how long it took."""
        self._stops.again()
        started = shown = time.monotonic()
        result = ""

        def tell(fraction: float, what: str) -> None:
            nonlocal shown, result
            self._stops.again()
            result = f", {what}" if fraction >= 1 else ""
            now = time.monotonic()
            if now - shown >= (_REDRAW_SECONDS if self._redraws else _PLAIN_SECONDS):
                shown = now
                left = (now - started) * (1 - fraction) / fraction if fraction > 0 else 0.0
                left_text = f", {_duration(left)} left" if now - started >= _RATE_SECONDS and left else ""
                self._write(f"{title}: {fraction:.0%}{left_text}; {what}", final=not self._redraws)

        self._write(title if self._redraws else f"{title} ...", final=not self._redraws)
        yield tell
        self._write(f"{title}: done in {time.monotonic() - started:.1f} s{result}", final=True)

    def done(self, text: str) -> None:
        """Write one complete line of progress."""
        self._write(text, final=True)

    def note(self, text: str) -> None:
        """Write one line even when quiet: it is about the result, not about progress."""
        click.echo(f"{_CLEAR if self._redraws else ''}note: {text}", err=True)

    def _write(self, text: str, *, final: bool) -> None:
        if self._quiet:
            return
        if self._redraws:
            # A redrawn line that the terminal wraps would stay, and every redraw add another.
            sys.stderr.write(_CLEAR + (f"{text}\n" if final else _cut(text, _columns() - 1)))
        else:
            sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def _columns() -> int:
    """Width of the terminal that stderr is; 80 where it does not say."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def _cut(text: str, columns: int) -> str:
    """As much of a line as fits; a wide character takes two columns."""
    widths = [_width(character) for character in text]
    if sum(widths) <= columns:
        return text
    kept = bisect.bisect_right(list(itertools.accumulate(widths)), max(columns - len(_MORE), 0))
    return (text[:kept] + _MORE)[: max(columns, 0)]


def _width(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _line(title: str, done: int, total: int, unit: str, seconds: float) -> str:
    rate = done / seconds if seconds else 0.0
    if not total:
        return f"{title}: {_amount(done, unit)}"
    speed = f", {_amount(rate, unit)}/s" if rate else ""
    left = f", {_duration((total - done) / rate)} left" if rate and total > done else ""
    return f"{title}: {_amount(done, unit)} of {_amount(total, unit)}, {min(done / total, 1.0):.0%}{speed}{left}"


def _amount(value: float, unit: str) -> str:
    if unit != "bytes":
        return f"{value:.{0 if value >= 10 or value == int(value) else 2}f} {unit}"
    return format_bytes(int(value))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def format_bytes(value: int) -> str:
    """Bytes as people read them: `1.5 GiB`."""
    size, units = float(value), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.1f} {units[0]}"
