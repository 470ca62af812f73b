"""Lock files that the kernel releases when their process ends."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from l2p_runtime.errors import HostError


@contextmanager
def locked(
    path: Path,
    waiting: Callable[[], None] | None = None,
    *,
    is_shared: bool = False,
    busy: str = "another process holds a lock",
) -> Iterator[None]:
    """Hold a lock file. The kernel releases it however the process ends; leaving the block removes the file.

    Args:
        path: the lock file.
        waiting: called before waiting for another holder; without it, another holder is an error.
        is_shared: others may hold it too.
        busy: what the error says.

    Raises:
        HostError: somebody else holds it.
    """
    handle = _acquire(path, waiting, fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX, busy)
    try:
        yield
    finally:
        if not is_shared:
            path.unlink(missing_ok=True)
        os.close(handle)


def _acquire(path: Path, waiting: Callable[[], None] | None, mode: int, busy: str) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(handle, mode | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES) or waiting is None:
                    raise HostError(busy, hint="wait for it, then try again") from error
                waiting()
                fcntl.flock(handle, mode)
            # Whoever held it has unlinked the file that was opened here; then the lock locks nothing.
            if os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
