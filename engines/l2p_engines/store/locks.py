"""Lock files that the kernel releases when their process ends; on file systems without locks, files that name it."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from l2p_engines.store.claims import claimed
from l2p_runtime.errors import HostError

_TRIES = 4
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


class _NoLocksError(Exception):
    """The file system has no locks, as network file systems answer with ENOLCK, ENOSYS, EOPNOTSUPP or ESTALE."""


@contextmanager
def locked(
    path: Path,
    waiting: Callable[[], None] | None = None,
    *,
    is_shared: bool = False,
    busy: str = "another process holds a lock",
) -> Iterator[None]:
    """Hold a lock file. The kernel releases it however the process ends; leaving the block removes the file.

    On a file system without locks, a file beside it says which process holds it (`claims.py`).

    Args:
        path: the lock file.
        waiting: called before waiting for another holder; without it, another holder is an error.
        is_shared: others may hold it too.
        busy: what the error says.

    Raises:
        HostError: somebody else holds it.
    """
    with ExitStack() as stack:
        try:
            handle = _acquire(path, waiting, fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX, busy)
            stack.callback(os.close, handle)
        except _NoLocksError as error:
            stack.enter_context(claimed(path, waiting, is_shared=is_shared, busy=busy, limit=str(error.args[0])))
        if not is_shared:
            stack.callback(path.unlink, missing_ok=True)
        yield


def _acquire(path: Path, waiting: Callable[[], None] | None, mode: int, busy: str) -> int:
    for attempt in itertools.count(1):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            _lock(handle, waiting, mode, busy)
            # Whoever held it has unlinked the file that was opened here; then the lock locks nothing.
            if os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        except FileNotFoundError:
            pass
        except _NoLocksError as error:
            # On a network file system, a file that another machine has removed answers so: a new one can be locked.
            if error.args[1] != errno.ESTALE or attempt == _TRIES:
                os.close(handle)
                raise
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
    raise AssertionError  # the loop has no end


def _lock(handle: int, waiting: Callable[[], None] | None, mode: int, busy: str) -> None:
    if _take(handle, mode | fcntl.LOCK_NB):
        return
    if waiting is None:
        raise HostError(busy, hint="wait for it, then try again")
    waiting()
    _take(handle, mode)


def _take(handle: int, mode: int) -> bool:
    """Lock a file; False if somebody else holds it and `mode` is not to wait."""
    try:
        fcntl.flock(handle, mode)
    except OSError as error:
        if error.errno in _HELD:
            return False
        raise _NoLocksError(error.strerror or str(error), error.errno) from error
    return True
