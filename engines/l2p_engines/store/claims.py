"""Locks for file systems that have none: a file that only one process can create, and that says which one it was.

A kernel lock ends with its process. A file stays, so it names its process in full: a process id alone may belong to
another process by now, on another machine or in another container.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from l2p_runtime.errors import HostError

_SUFFIX = ".held"
_BYTES_MAX = 4096
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
_POLL_SECONDS = 0.5
_UNWRITTEN_SECONDS = 10.0
"""Age from which a file that exists for an instant, as a claim before it is written, is a killed process's."""


@dataclass(frozen=True, slots=True)
class Claimant:
    """A process, such that no other one is ever equal to it.

    Attributes:
        host: name of the machine or container.
        machine: identity of its installation; empty where there is none.
        boot: identity of the running kernel.
        pids: inode of the namespace that the process id belongs to; a container has its own.
        pid: process id.
        start: when it was started, in clock ticks since the boot.
    """

    host: str
    machine: str
    boot: str
    pids: int
    pid: int
    start: int


@contextmanager
def claimed(
    path: Path, waiting: Callable[[], None] | None, *, is_shared: bool, busy: str, limit: str
) -> Iterator[None]:
    """Hold a claim on a lock file, beside it. One that a dead process of this machine left is removed.

    Args:
        path: the lock file; it is not opened.
        waiting: called before waiting for other holders; without it, another holder is an error.
        is_shared: others may share the claim.
        busy: what the error says.
        limit: why the file system cannot lock.

    Raises:
        HostError: somebody else holds it, or may hold it.
    """
    was_told = False
    while True:
        own = _beside(path, secrets.token_hex(8) if is_shared else "")
        holder = _claim(own)
        if holder is None:
            # Both sides make their own claim first and look at the others' then: at least one of them sees the other.
            others = [_beside(path, "")] if is_shared else _shared(path)
            holder = next((found for other in others if (found := _holder(other)) is not None), None)
            if holder is None:
                break
            own.unlink(missing_ok=True)
        if waiting is None:
            raise HostError(
                f"{busy}: {holder[1]}",
                hint=f"wait for it; if it was killed, remove `{holder[0]}`: this file system has no locks ({limit})",
            )
        if not was_told:
            waiting()
            was_told = True
        time.sleep(_POLL_SECONDS)
    try:
        yield
    finally:
        own.unlink(missing_ok=True)


def is_claim_on(name: str, lock: str) -> bool:
    """Whether a file name is that of a claim on a lock file of this name."""
    return name.startswith(f"{lock}.") and name.endswith(_SUFFIX)


def this_process() -> Claimant:
    """The process that runs this."""
    return Claimant(
        platform.node(),
        _text(Path("/etc/machine-id")),
        _text(Path("/proc/sys/kernel/random/boot_id")),
        _namespace(),
        os.getpid(),
        _start(os.getpid()),
    )


def is_dead(claimant: Claimant) -> bool:
    """Whether a process of this machine has ended. False where that cannot be known."""
    here = this_process()
    if claimant.boot != here.boot:
        # The machine was started anew, if it is this one: hosts without an identity may only have the same name.
        return bool(here.machine) and (claimant.host, claimant.machine) == (here.host, here.machine)
    if claimant.pids != here.pids:
        return False
    try:
        os.kill(claimant.pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        pass
    return _start(claimant.pid) not in (claimant.start, 0)


def _beside(path: Path, digits: str) -> Path:
    return path.with_name(f"{path.name}{digits and '.'}{digits}{_SUFFIX}")


def _shared(path: Path) -> list[Path]:
    pattern = re.compile(re.escape(path.name) + r"\.[0-9a-f]{16}" + re.escape(_SUFFIX))
    return [entry for entry in path.parent.iterdir() if pattern.fullmatch(entry.name)]


def _claim(own: Path) -> tuple[Path, str] | None:
    """Make a claim; who holds it, if somebody else does."""
    while True:
        try:
            handle = os.open(own, _NEW, 0o644)
        except FileExistsError:
            if (holder := _holder(own)) is not None:
                return holder
            continue
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(json.dumps(asdict(this_process())).encode("ascii"))
        except BaseException:
            own.unlink(missing_ok=True)
            raise
        return None


def _holder(claim: Path) -> tuple[Path, str] | None:
    """The claim and its process in words; None when there is none, or it was a dead one's and is removed."""
    try:
        with claim.open("rb") as file:
            data = file.read(_BYTES_MAX)
        age_seconds = time.time() - claim.stat().st_mtime
    except FileNotFoundError:
        return None
    except OSError as error:
        return claim, f"`{claim}` cannot be read ({error.strerror or error})"
    claimant = _read(data)
    if claimant is None:
        if data or age_seconds < _UNWRITTEN_SECONDS:
            return claim, f"`{claim}` does not say which process made it"
    elif not is_dead(claimant):
        return claim, f"process {claimant.pid} on {claimant.host}"
    _remove(claim, data)
    return None


def _remove(claim: Path, data: bytes) -> None:
    """Remove a dead process's claim, which reads `data`, unless another process is doing so."""
    guard = claim.with_name(f"{claim.name}.clearing{_SUFFIX}")
    try:
        os.close(os.open(guard, _NEW, 0o644))
    except FileExistsError:
        with contextlib.suppress(FileNotFoundError):
            if time.time() - guard.stat().st_mtime > _UNWRITTEN_SECONDS:
                guard.unlink()
        return
    try:
        # Read again: without the guard, the claim could be a living process's that was made since.
        if claim.read_bytes() == data:
            claim.unlink()
    except FileNotFoundError:
        pass
    finally:
        guard.unlink(missing_ok=True)


def _read(data: bytes) -> Claimant | None:
    try:
        values = json.loads(data)
        claimant = Claimant(**values)
    except (ValueError, TypeError, RecursionError):
        return None
    texts, numbers = (claimant.host, claimant.machine, claimant.boot), (claimant.pids, claimant.pid, claimant.start)
    is_whole = all(isinstance(text, str) for text in texts) and all(type(number) is int for number in numbers)
    return claimant if is_whole and claimant.pid > 0 else None


def _start(pid: int) -> int:
    """Clock ticks from the boot to a process's start; 0 when that cannot be read, -1 for one that has ended."""
    fields = _text(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    try:
        return -1 if fields[0] in ("Z", "X") else int(fields[19])
    except (IndexError, ValueError):
        return 0


def _namespace() -> int:
    try:
        return Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return 0


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
