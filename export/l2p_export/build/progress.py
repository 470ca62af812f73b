"""Progress of a whole build beside that of its current stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from l2p_runtime.progress import Reporter

COUNTED = ("graph", "proof", "engine")
"""Kinds of stages that take a build its time, and whose number is known before it starts."""


@dataclass(frozen=True, slots=True)
class WholeBuild:
    """Puts before the title of each task how many stages of the build are done and left; implements `Reporter`.

    Attributes:
        reporter: shows the tasks.
        finished: kind of every stage that was found or made so far; it grows.
        total: number of stages of the counted kinds.
    """

    reporter: Reporter
    finished: Sequence[str]
    total: int

    def task(self, title: str, total: int = 0, unit: str = "bytes") -> AbstractContextManager[Callable[[int], None]]:
        """Enter a task of the build."""
        return self.reporter.task(self._placed(title), total, unit)

    def phases(self, title: str) -> AbstractContextManager[Callable[[float, str], None]]:
        """Enter a task of the build."""
        return self.reporter.phases(self._placed(title))

    def note(self, text: str) -> None:
        """Show one line that the user should read."""
        self.reporter.note(text)

    def _placed(self, title: str) -> str:
        done = sum(kind in COUNTED for kind in self.finished)
        return f"[{done} done, {max(self.total - done, 0)} left] {title}"
