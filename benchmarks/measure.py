"""Measures a command's time and anonymous memory, in total and per stage that it reports on stderr."""

from __future__ import annotations

import re
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Figures:
    """Seconds and peak anonymous bytes of a command or of one of its stages."""

    seconds: float = 0.0
    peak_bytes: int = 0


@dataclass
class Measured:
    """Result of a command: exit code, total figures, figures per stage, and lines of stderr."""

    code: int
    whole: Figures
    stages: dict[str, Figures] = field(default_factory=dict)
    stderr: list[str] = field(default_factory=list)


def run_measured(command: list[str]) -> Measured:
    """Run a command and sample its memory a hundred times per second."""
    measured = Measured(-1, Figures())
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        current: list[str] = []
        thread = threading.Thread(target=_read_stages, args=(process, measured, current))
        thread.start()
        while process.poll() is None:
            anonymous = tree_anonymous_bytes(process.pid)
            measured.whole.peak_bytes = max(measured.whole.peak_bytes, anonymous)
            for title in current[-1:]:
                stage = measured.stages[title]
                stage.peak_bytes = max(stage.peak_bytes, anonymous)
            time.sleep(0.01)
        thread.join()
        measured.code = process.returncode
    measured.whole.seconds = time.perf_counter() - started
    return measured


def tree_anonymous_bytes(pid: int) -> int:
    """Anonymous memory of a process and its descendants."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    except OSError:
        children = []
    return anonymous_bytes(pid) + sum(tree_anonymous_bytes(int(child)) for child in children)


def anonymous_bytes(pid: int | str = "self") -> int:
    """Anonymous memory of a process: pages that no file backs."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return 0
    match = re.search(r"RssAnon:\s+(\d+) kB", status)
    return int(match[1]) * 1024 if match else 0


def _read_stages(process: subprocess.Popen[str], measured: Measured, current: list[str]) -> None:
    started: dict[str, float] = {}
    for line in process.stderr or ():
        measured.stderr.append(line.rstrip("\n"))
        if match := re.fullmatch(r"(.*) \.\.\.\n", line):
            measured.stages[match[1]] = Figures()
            started[match[1]] = time.perf_counter()
            current.append(match[1])
        elif (match := re.match(r"(.*): done in ", line)) and match[1] in started:
            measured.stages[match[1]].seconds = time.perf_counter() - started[match[1]]
            current.remove(match[1])
