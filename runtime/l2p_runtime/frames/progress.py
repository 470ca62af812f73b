"""Progress as render farms read it: lines on stdout (docs/frames.md, "Progress for farms")."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from l2p_runtime.frames.drawing import FrameEvent

Format = Literal["openjd", "percent", "afanasy", "tractor", "none"]
FORMATS: tuple[str, ...] = get_args(Format)

_LINE_MAX = 1000
_UNWRITTEN = 0.99
"""The share of a frame that is done when it is drawn."""


def progress_line(form: str, fraction: float) -> str:
    """The line that says which share of the work is done; empty for `none`.

    Shares are rounded down, so that 100 means that nothing is left.
    """
    if form == "openjd":
        return f"openjd_progress: {int(fraction * 1000) / 10}"
    percent = int(fraction * 100)
    if form == "tractor":
        return f"TR_PROGRESS {percent:03d}%"
    return {"percent": f"{percent}%", "afanasy": f"PROGRESS: {percent}%", "none": ""}[form]


def failure_line(form: str, reason: str) -> str:
    """The line that says why the work has failed; empty where a farm reads none."""
    words = " ".join(reason.split())
    return f"openjd_fail: {words[:_LINE_MAX]}" if form == "openjd" else ""


def progress_lines(form: str, write: Callable[[str], None]) -> Callable[[float], None]:
    """A function that takes the share that is done, and writes a line where it differs from the one before."""
    told = ""

    def tell(fraction: float) -> None:
        nonlocal told
        line = progress_line(form, fraction)
        if line not in ("", told):
            told = line
            write(line)

    return tell


def shares(frames: int, show: Callable[[float], None]) -> Callable[[FrameEvent], None]:
    """A function that takes events of frames, and shows which share of all is on disk or drawn; it never goes back.

    It reaches 1 when every frame is on disk.
    """
    there, shown = 0, 0.0
    drawn: dict[int, float] = {}

    def tell(event: FrameEvent) -> None:
        nonlocal there, shown
        if event.state == "drawing":
            done, steps = event.steps
            drawn[event.frame] = _UNWRITTEN * done / steps
        else:
            drawn.pop(event.frame, None)
            there += event.state != "failed"
        shown = max(shown, (there + sum(drawn.values())) / frames)
        show(shown)

    return tell
