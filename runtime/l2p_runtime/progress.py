"""How long work tells where it stands; the command line draws it, tests and libraries may ignore it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Reporter(Protocol):
    """Receives the stages of a long piece of work."""

    def task(self, title: str, total: int = 0, unit: str = "bytes") -> AbstractContextManager[Callable[[int], None]]:
        """Enter a stage; the function it gives is told how much was done since the last call."""

    def phases(self, title: str) -> AbstractContextManager[Callable[[float, str], None]]:
        """Enter a stage that tells which part of it is done, from 0 to 1, what it is doing, and at 1 what it made."""

    def note(self, text: str) -> None:
        """Say one line that the user should read."""


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
