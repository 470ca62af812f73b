"""Observes a worker while it builds: the memory that it holds, and whether it has stalled.

All figures come from `/proc`. If that cannot be read, no worker is taken for stalled.
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass
from pathlib import Path

STALLED_SECONDS = 60.0
"""How long a worker may send nothing and do nothing. TensorRT for RTX 1.7.1 waits for itself forever when memory is
refused to one of its threads: every thread sleeps, and no processor time is used (seen under `ulimit -d`)."""

_PROC = Path("/proc")
_LOOK_SECONDS = 1.0
_MEMORY_SECONDS = 0.05
_ASLEEP = "SZX"
"""Sleeping, ended, or ending. Running, waiting for a disk, and stopped by a signal or a debugger do not count."""


@dataclass(slots=True)
class StallWatch:
    """Finds a process that has stalled. It is looked at every `look_seconds` while it sends nothing.

    Signs of life are processor time, pages read from disk or swap, and any thread that is not asleep.

    Attributes:
        process: its id.
        limit_seconds: how long it may show no sign of life.
        idle_seconds: for how long it has shown none. Counted by looks and not by the clock, which also runs while
            both processes are suspended.
    """

    process: int
    limit_seconds: float = STALLED_SECONDS
    idle_seconds: float = 0.0
    _used: tuple[int, int] | None = None

    @property
    def look_seconds(self) -> float:
        """Seconds from one look to the next."""
        return min(_LOOK_SECONDS, self.limit_seconds / 10)

    def heard(self) -> None:
        """Reset the idle time: the process has sent something, or its work cannot be observed."""
        self.idle_seconds = 0.0

    def look(self) -> bool:
        """Look once more; return whether it has stalled."""
        used = _used(self.process)
        is_idle = used is not None and used == self._used and _is_asleep(self.process)
        self._used = used
        self.idle_seconds = self.idle_seconds + self.look_seconds if is_idle else 0.0
        return self.idle_seconds >= self.limit_seconds


class MemoryWatch(threading.Thread):
    """Reads a process's anonymous memory while it works: the kernel keeps no peak of only that."""

    def __init__(self, process: int) -> None:
        super().__init__(daemon=True)
        self.peak_bytes = 0
        self._status = _PROC / str(process) / "status"
        self._done = threading.Event()

    def run(self) -> None:
        """Read until stopped, or until the process ends."""
        while (found := re.search(r"RssAnon:\s+(\d+) kB", _read(self._status) or "")) is not None:
            self.peak_bytes = max(self.peak_bytes, int(found[1]) * 1024)
            if self._done.wait(_MEMORY_SECONDS):
                return

    def stop(self) -> int:
        """Stop, and return the maximum in bytes."""
        self._done.set()
        if self.is_alive():
            self.join()
        return self.peak_bytes


def _used(process: int) -> tuple[int, int] | None:
    """Processor time that a process has used, in clock ticks, and pages it read; None where that is not told."""
    fields = _fields(_PROC / str(process) / "stat")
    return (int(fields[11]) + int(fields[12]), int(fields[9])) if fields else None


def _is_asleep(process: int) -> bool:
    """Whether every thread of a process sleeps; False where that is not told."""
    try:
        threads = list((_PROC / str(process) / "task").iterdir())
    except OSError:
        return False
    states = [fields[0] for thread in threads if (fields := _fields(thread / "stat"))]
    return bool(states) and all(state in _ASLEEP for state in states)


def _fields(stat: Path) -> list[str]:
    """What follows the name in a `stat` file, from the state on; the name may hold spaces and parentheses."""
    return (_read(stat) or "").rpartition(")")[2].split()


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
