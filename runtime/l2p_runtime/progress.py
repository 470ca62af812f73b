"""Progress reports of long work. The command line shows them, tests and libraries may ignore them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Reporter(Protocol):
    """Receives the progress of the tasks of long work."""

    def task(self, title: str, total: int = 0, unit: str = "bytes") -> AbstractContextManager[Callable[[int], None]]:
        """Enter a task. Yields a function that receives the amount done since its last call."""

    def phases(self, title: str) -> AbstractContextManager[Callable[[float, str], None]]:
        """Enter a task. Yields a function that receives the fraction done, 0 to 1, and the phase; at 1, the result."""

    def note(self, text: str) -> None:
        """Show one line that the user should read."""


class Silent:
    """A reporter that says nothing."""

    @contextmanager
    def task(self, title: str, total: int = 0, unit: str = "bytes") -> Iterator[Callable[[int], None]]:
        """Do nothing."""
        del title, total, unit
        yield lambda amount: None

    @contextmanager
    def phases(self, title: str) -> Iterator[Callable[[float, str], None]]:
        """Do nothing."""
        del title
        yield lambda fraction, what: None

    def note(self, text: str) -> None:
        """Do nothing."""
        del text
