"""Locks, on file systems that have them and on those that answer that they have none."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from l2p_engines.store import claims
from l2p_engines.store.claims import is_dead, this_process
from l2p_engines.store.locks import locked
from l2p_engines.store.output import open_output
from l2p_engines.store.shared import open_store, prune_store
from l2p_engines.store.stages import Home, StageOutput, run_stage, sweep_work
from l2p_runtime.errors import HostError

LACKING = [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ESTALE, errno.EIO]

HOLDER = """
import fcntl, os, sys, time
from pathlib import Path

def flock(handle, mode):
    raise OSError(37, "No locks available")

fcntl.flock = flock
from l2p_engines.store.locks import locked

with locked(Path(sys.argv[1]), is_shared=len(sys.argv) > 2):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(params=LACKING, ids=[errno.errorcode[number] for number in LACKING])
def lacking(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file system without locks; what it answers."""

    def flock(handle: int, mode: int) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", flock)
    return os.strerror(request.param)


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(handle: int, mode: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def killed_holder(path: Path, *arguments: str) -> int:
    """A process that held a lock when it was killed."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(path), *arguments], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(HostError, match=f"busy: process {process.pid} on "), locked(path, busy="busy"):
            pass
        process.send_signal(signal.SIGKILL)
    return process.pid


def write_claim(path: Path, **changes: str | int) -> None:
    path.write_text(json.dumps(asdict(replace(this_process(), **changes))))


def test_a_file_system_without_locks_still_excludes(lacking: str, tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    with locked(path):
        says = f"another import: process {os.getpid()} on "
        with pytest.raises(HostError, match=says) as caught, locked(path, busy="another import"):
            pass
        assert lacking in caught.value.hint
        assert f"remove `{path}.held`" in caught.value.hint
    assert names(tmp_path) == []
    with locked(path):
        pass


def test_a_kernel_lock_that_is_held_is_no_lack_of_locks(tmp_path: Path) -> None:
    with locked(tmp_path / "x"), pytest.raises(HostError) as caught, locked(tmp_path / "x", busy="held"):
        pass
    assert str(caught.value) == "held"
    assert names(tmp_path) == []


def test_a_stale_handle_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, answers = fcntl.flock, [errno.ESTALE, errno.ESTALE]

    def flock(handle: int, mode: int) -> None:
        if answers:
            raise OSError(answers.pop(), "Stale file handle")
        real(handle, mode)

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path / "x"):
        assert names(tmp_path) == ["x"]


@pytest.mark.usefixtures("no_locks")
def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    killed_holder(tmp_path / "x")
    assert names(tmp_path) == ["x", "x.held"]
    with locked(tmp_path / "x"):
        pass
    assert names(tmp_path) == []


@pytest.mark.usefixtures("no_locks")
def test_a_killed_process_shares_nothing(tmp_path: Path) -> None:
    killed_holder(tmp_path / "x", "shared")
    with locked(tmp_path / "x"):
        pass
    assert names(tmp_path) == []


@pytest.mark.usefixtures("no_locks")
def test_a_process_id_that_was_given_again(tmp_path: Path) -> None:
    write_claim(tmp_path / "x.held", start=this_process().start - 1)
    with locked(tmp_path / "x"):
        pass
    assert names(tmp_path) == []


@pytest.mark.usefixtures("no_locks")
@pytest.mark.parametrize(
    "changes",
    [
        {"host": "elsewhere", "boot": "another", "machine": "another"},
        {"boot": "another", "machine": ""},
        {"pids": 7, "pid": 1, "start": 1},
    ],
    ids=["another machine", "a namesake", "another container with a process 1"],
)
def test_what_cannot_be_known_to_be_dead_is_held(changes: dict[str, str | int], tmp_path: Path) -> None:
    write_claim(tmp_path / "x.held", **changes)
    with pytest.raises(HostError) as caught, locked(tmp_path / "x", busy="busy"):
        pass
    assert f"process {changes.get('pid', os.getpid())} on {changes.get('host', this_process().host)}" in str(
        caught.value
    )
    assert (tmp_path / "x.held").exists()


def test_a_machine_that_was_started_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    here = replace(this_process(), machine="0123")
    monkeypatch.setattr(claims, "this_process", lambda: here)
    assert is_dead(replace(here, boot="the one before"))
    assert not is_dead(here)
    assert not is_dead(replace(here, boot="the one before", machine="4567"))


def test_a_zombie_is_dead() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        deadline = time.monotonic() + 30
        while (claims._start(process.pid)) != -1:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert is_dead(replace(this_process(), pid=process.pid, start=5))


def test_a_process_that_another_user_runs_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its signals are not ours to send, which says that it is there."""

    def kill(pid: int, number: int) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "kill", kill)
    assert not is_dead(this_process())
    # Started at another time: the process id was given again, to somebody else.
    assert is_dead(replace(this_process(), start=this_process().start - 1))


def test_a_process_id_beyond_any_kernels_is_nobodys() -> None:
    assert not is_dead(replace(this_process(), pid=1 << 80, start=5))


@pytest.mark.usefixtures("no_locks")
def test_a_claim_that_cannot_be_written_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **more: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(claims.json, "dumps", full)
    with pytest.raises(OSError, match="No space left"), locked(tmp_path / "x"):
        pass
    assert names(tmp_path) == ["x"]


@pytest.mark.usefixtures("no_locks")
def test_a_claim_that_cannot_be_read_is_held(tmp_path: Path) -> None:
    """What it says is not known, so nothing is removed."""
    (tmp_path / "x.held").mkdir()
    with pytest.raises(HostError, match=r"`.*x\.held` cannot be read \(Is a directory\)"), locked(tmp_path / "x"):
        pass
    assert (tmp_path / "x.held").is_dir()


def test_a_claim_that_is_gone_is_not_looked_for(tmp_path: Path) -> None:
    """Its holder may remove it between any two looks at it."""
    claim = tmp_path / "x.held"
    assert claims._holder(claim) is None
    claims._remove(claim, b"data")
    assert names(tmp_path) == []


def test_a_claim_that_was_made_since_stays(tmp_path: Path) -> None:
    """A dead process's claim was read, but another process has removed it and claimed the lock itself."""
    claim = tmp_path / "x.held"
    write_claim(claim)
    claims._remove(claim, b"what the dead process had written")
    assert names(tmp_path) == ["x.held"]


@pytest.mark.usefixtures("no_locks")
def test_a_system_without_proc_frees_what_it_can_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There, a process is alive as long as its id is somebody's."""
    read_text, stat = Path.read_text, Path.stat

    def hidden(real: Callable[..., Any]) -> Callable[..., Any]:
        def look(path: Path, *arguments: Any, **more: Any) -> Any:
            if path.parts[1:2] == ("proc",):
                raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))
            return real(path, *arguments, **more)

        return look

    monkeypatch.setattr(Path, "read_text", hidden(read_text))
    monkeypatch.setattr(Path, "stat", hidden(stat))
    here = this_process()
    assert (here.boot, here.pids, here.start) == ("", 0, 0)
    with subprocess.Popen([sys.executable, "-S", "-c", ""]) as process:
        pass
    assert is_dead(replace(here, pid=process.pid))
    says = f"busy: process {os.getpid()} on "
    with locked(tmp_path / "x"), pytest.raises(HostError, match=says), locked(tmp_path / "x", busy="busy"):
        pass
    assert names(tmp_path) == []


@pytest.mark.usefixtures("no_locks")
@pytest.mark.parametrize("content", [b"[]", b"{}", b'{"pid": 1}', b"\xff", b"[" * 9000, b"null"])
def test_a_claim_of_something_else_is_named_and_kept(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.held").write_bytes(content)
    with pytest.raises(HostError, match=r"`.*x\.held` does not say"), locked(tmp_path / "x"):
        pass
    assert (tmp_path / "x.held").read_bytes() == content


@pytest.mark.usefixtures("no_locks")
def test_an_empty_claim_is_one_that_is_being_written_or_a_killed_ones(tmp_path: Path) -> None:
    claim = tmp_path / "x.held"
    claim.touch()
    with pytest.raises(HostError), locked(tmp_path / "x"):
        pass
    os.utime(claim, (time.time() - 60,) * 2)
    with locked(tmp_path / "x"):
        pass
    assert names(tmp_path) == []


@pytest.mark.usefixtures("no_locks")
def test_a_process_that_was_killed_while_it_cleared_another_ones(tmp_path: Path) -> None:
    write_claim(tmp_path / "x.held", start=1)
    guard = tmp_path / "x.held.clearing.held"
    guard.touch()
    os.utime(guard, (time.time() - 60,) * 2)
    with locked(tmp_path / "x"):
        pass
    assert names(tmp_path) == []


@pytest.mark.usefixtures("no_locks")
def test_sharers_share_and_keep_others_out(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with locked(path, is_shared=True), locked(path, is_shared=True):
        with pytest.raises(HostError), locked(path):
            pass
        with locked(path, is_shared=True):
            pass
    with locked(path):
        with pytest.raises(HostError), locked(path, is_shared=True):
            pass
        assert [name for name in names(tmp_path) if name.endswith(".held")] == ["x.held"]
    assert names(tmp_path) == []


@pytest.mark.usefixtures("no_locks")
@pytest.mark.parametrize("is_stale", [False, True])
def test_only_one_of_many_holds_it(*, is_stale: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "_POLL_SECONDS", 0.001)
    path = tmp_path / "x"
    inside: list[int] = []
    most: list[int] = []

    def turn(_: int) -> None:
        with locked(path, lambda: None):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.001)
            inside.pop()

    if is_stale:
        write_claim(tmp_path / "x.held", start=1)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(turn, range(40)))
    assert most == [1] * 40
    assert names(tmp_path) == []


@pytest.mark.usefixtures("no_locks")
def test_a_waiter_is_told_once_and_gets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "_POLL_SECONDS", 0.001)
    told: list[str] = []
    other = locked(tmp_path / "x")
    other.__enter__()

    def waiting() -> None:
        told.append("waiting")
        with ThreadPoolExecutor(1) as pool:
            pool.submit(lambda: other.__exit__(None, None, None)).result()

    with locked(tmp_path / "x", waiting):
        assert told == ["waiting"]


@pytest.mark.usefixtures("no_locks")
def test_a_bundle_a_stage_and_a_store_without_locks(tmp_path: Path) -> None:
    out, store = tmp_path / "out", tmp_path / "store"

    def make(work: Path) -> StageOutput:
        assert sweep_work(work.parents[1]) == []
        (work / "x").write_bytes(b"x")
        return StageOutput("graphs", ((work / "x", "0" * 64),))

    def refused(call: Callable[[], object]) -> None:
        with pytest.raises(HostError, match="process"):
            call()

    with open_output(out), open_store(store) as home:
        with pytest.raises(HostError, match="another build is writing"), open_output(out):
            pass
        refused(lambda: prune_store(store))
        run_stage(home, "graph", "x", {}, make)
        run_stage(Home(out), "graph", "x", {}, make)
    killed_holder(out / ".build.lock")
    assert (out / ".build.lock.held").exists()
    with open_output(out):
        pass
    assert prune_store(store)
    assert not list(store.rglob("*.held"))
    assert names(out) == ["graphs", "stages"]
