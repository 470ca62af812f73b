"""Which processes are taken for stalled: those that say nothing, use nothing and wait for nothing but themselves."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from l2p_engines.builders.watching import STALLED_SECONDS, MemoryWatch, StallWatch

LIMIT_SECONDS = 0.3
LOOKS = 30
"""Three times as many as it takes to find a stalled one."""
BURN = "while True: pass"
HOLD = "held = b'x' * (64 << 20); print(flush=True); import time; time.sleep(60)"
SLEEP = "import time; print(flush=True); time.sleep(60)"
PROCESS = 4711


@contextmanager
def running(code: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def first_line(process: subprocess.Popen[bytes]) -> None:
    assert process.stdout is not None
    process.stdout.readline()


def stalls(watch: StallWatch) -> bool:
    """Whether a process is taken for stalled when it is looked at as a build does."""
    for _ in range(LOOKS):
        time.sleep(watch.look_seconds)
        if watch.look():
            return True
    return False


def test_a_process_that_sleeps_is_stalled() -> None:
    with running(SLEEP) as process:
        first_line(process)
        started = time.monotonic()
        watch = StallWatch(process.pid, LIMIT_SECONDS)
        assert stalls(watch)
        assert watch.idle_seconds >= LIMIT_SECONDS
        assert time.monotonic() - started >= LIMIT_SECONDS


def test_a_process_that_works_is_not() -> None:
    with running(BURN) as process:
        assert not stalls(StallWatch(process.pid, LIMIT_SECONDS))


def test_one_that_was_suspended_is_not() -> None:
    with running(SLEEP) as process:
        first_line(process)
        process.send_signal(signal.SIGSTOP)
        assert not stalls(StallWatch(process.pid, LIMIT_SECONDS))
        process.send_signal(signal.SIGCONT)
        assert stalls(StallWatch(process.pid, LIMIT_SECONDS))


def test_one_that_has_ended_or_cannot_be_read_is_not() -> None:
    with running("pass") as process:
        process.wait()
    assert not stalls(StallWatch(process.pid, LIMIT_SECONDS))


class Kernel:
    """A `/proc` of one process, to be changed between looks."""

    def __init__(self, root: Path, threads: int = 3) -> None:
        self.root = root / str(PROCESS)
        self.states = ["S"] * threads
        self.faults = self.user = self.system = 100
        self.write()

    def write(self) -> None:
        for index, state in enumerate(self.states):
            thread = self.root / "task" / str(PROCESS + index)
            thread.mkdir(parents=True, exist_ok=True)
            (thread / "stat").write_text(f"{thread.name} (a (worker) S 9) {state} 1 2 3")
        numbers = ["1"] * 8 + [str(self.faults), "1", str(self.user), str(self.system), "1"]
        (self.root / "stat").write_text(f"{PROCESS} (a (worker) R 9) S {' '.join(numbers)}")


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr("l2p_engines.builders.watching._PROC", tmp_path)
    return Kernel(tmp_path)


def looks(kernel: Kernel, change: Callable[[int], bool] = lambda look: False) -> int | None:
    """How many looks it takes until the process is taken for stalled; None when a great many do not do.

    Args:
        change: told which look comes next; whether it has changed the process.
    """
    watch = StallWatch(PROCESS)
    for look in range(1, 300):
        if change(look):
            kernel.write()
        if watch.look():
            return look
    return None


def test_it_takes_the_stated_time_without_a_sign_of_life(kernel: Kernel) -> None:
    assert StallWatch(PROCESS).look_seconds == 1.0
    # The first look has nothing to compare with.
    assert looks(kernel) == STALLED_SECONDS + 1


@pytest.mark.parametrize("state", "RDTt")
@pytest.mark.parametrize("index", [0, 2])
def test_a_thread_that_runs_or_waits_for_a_disk_or_is_stopped_is_a_sign_of_life(
    kernel: Kernel, state: str, index: int
) -> None:
    kernel.states[index] = state
    kernel.write()
    assert looks(kernel) is None


@pytest.mark.parametrize("name", ["user", "system", "faults"])
def test_so_is_a_little_work_now_and_then(kernel: Kernel, name: str) -> None:
    def work(look: int) -> bool:
        setattr(kernel, name, 100 + look // 50)
        return look % 50 == 0

    assert looks(kernel, work) is None


def test_any_sign_of_life_begins_the_time_anew(kernel: Kernel) -> None:
    def wait(look: int) -> bool:
        kernel.states[1] = "D" if look == 40 else "S"
        return look in {40, 41}

    assert looks(kernel, wait) == 40 + STALLED_SECONDS
    watch = StallWatch(PROCESS)
    for _ in range(40):
        assert not watch.look()
    watch.heard()
    assert [watch.look() for _ in range(60)] == [False] * 59 + [True]


@pytest.mark.parametrize("missing", ["stat", "task"])
def test_where_the_kernel_does_not_tell_none_is_stalled(kernel: Kernel, missing: str) -> None:
    kernel.root.joinpath(missing).rename(kernel.root / "gone")
    watch = StallWatch(PROCESS)
    assert not any(watch.look() for _ in range(200))


def test_the_most_memory_that_a_process_held_is_seen() -> None:
    with running(HOLD) as process:
        watch = MemoryWatch(process.pid)
        watch.start()
        first_line(process)
        time.sleep(0.2)
        assert 64 << 20 < watch.stop() < 128 << 20
        assert watch.stop() == watch.peak_bytes


def test_watching_memory_ends_with_the_process_and_need_not_begin() -> None:
    with running("pass") as process:
        watch = MemoryWatch(process.pid)
        assert watch.stop() == 0
        watch = MemoryWatch(process.pid)
        watch.start()
        process.wait()
        watch.join(5)
        assert not watch.is_alive()
