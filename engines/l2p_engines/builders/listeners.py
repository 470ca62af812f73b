"""Listeners of an engine library while it builds: its log and its progress."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from l2p_engines.builders.request import BuildProgress
from l2p_engines.builders.trt import Module

ERRORS_KEPT = 50
WARNINGS_KEPT = 200
WRITING = "writing engine"
"""Phase of a build while its file is written, which the library does not report as a phase."""

_INTERVAL_SECONDS = 0.1
_SPOKEN_DEPTH = 1
"""Phases down to this depth are always reported: a small network has thousands of deeper ones."""
_MESSAGE_CHARACTERS = 2000


@dataclass(slots=True)
class Journal:
    """The library's log as it grows: its last errors, and each warning once.

    Attributes:
        tell: receives each line above the verbose level, as severity and text.
        logger: the library's logger object, which must outlive all objects that use it.
    """

    tell: Callable[[str, str], None] = lambda severity, text: None
    errors: deque[str] = field(default_factory=lambda: deque(maxlen=ERRORS_KEPT))
    warnings: dict[str, None] = field(default_factory=dict)
    logger: Any = None

    def log(self, severity: str, text: str) -> None:
        """Keep one line; never raises, since it is called from inside the library."""
        if severity == "VERBOSE":
            return
        text = text.encode(errors="replace").decode()[:_MESSAGE_CHARACTERS]
        if "ERROR" in severity:
            self.errors.append(text)
        elif severity == "WARNING" and len(self.warnings) < WARNINGS_KEPT:
            self.warnings[text] = None
        self.tell(severity, text)


@dataclass(slots=True)
class _Phase:
    parent: str | None
    steps: int
    depth: int
    done: int = 0


@dataclass(slots=True)
class Phases:
    """The nested phases of a build, reported as they change. Any of the library's threads may call it."""

    tell: Callable[[BuildProgress], None] = lambda progress: None
    fraction: float = 0.0
    _open: dict[str, _Phase] = field(default_factory=dict)
    _told: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase begins."""
        with self._lock:
            above = self._open.get(parent) if parent else None
            self._open[name] = _Phase(parent, max(steps, 0), above.depth + 1 if above else 0)
            self._say(name, always=self._open[name].depth <= _SPOKEN_DEPTH)

    def step(self, name: str, number: int) -> None:
        """Step `number`, counted from 0, is done."""
        with self._lock:
            if name in self._open:
                self._open[name].done = number + 1
                self._say(name)

    def finish(self, name: str) -> None:
        """A phase ends."""
        with self._lock:
            if name in self._open:
                self._open[name].done = self._open[name].steps
                self._say(name, always=self._open[name].depth == 0)
                del self._open[name]

    def wrote(self, size_bytes: int) -> None:
        """`size_bytes` of the engine are written so far."""
        with self._lock:
            self.tell(BuildProgress(WRITING, 0, size_bytes, 0, self.fraction))

    def _say(self, name: str, *, always: bool = False) -> None:
        phase = self._open[name]
        self.fraction = max(self.fraction, self._reached(name))
        now = time.monotonic()
        if always or now - self._told >= _INTERVAL_SECONDS:
            self._told = now
            self.tell(BuildProgress(name, phase.depth, phase.done, phase.steps, self.fraction))

    def _reached(self, name: str | None) -> float:
        """Fraction of the outermost phase that is done; a phase is a part of its parent's next step."""
        share = 0.0
        while name in self._open:
            phase = self._open[name]
            share = min((phase.done + share) / phase.steps, 1.0) if phase.steps else share
            name = phase.parent
        return share


def make_logger(trt: Module, journal: Journal) -> Any:
    """The library's logger object that fills a journal."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, text: str) -> None:
            journal.log(severity.name, text)

    journal.logger = Logger()
    return journal.logger


def make_monitor(trt: Module, phases: Phases) -> Any:
    """The library's progress object that reports phases. It never asks the library to stop: a kill is faster."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            phases.start(name, parent, int(steps))

        def step_complete(self, name: str, step: int) -> bool:
            phases.step(name, int(step))
            return True

        def phase_finish(self, name: str) -> None:
            phases.finish(name)

    return Monitor()
