"""A Unix socket that only its user reaches: in a private folder, with the peer's user checked on both ends.

A path may be longer than the 107 bytes that the address of a Unix socket holds: it is given through the open folder.
(unix(7), Linux man-pages)
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from l2p_runtime.errors import HostError, UsageError

_BACKLOG = 64
_SEND_SECONDS = 30
"""A peer that reads nothing for so long has gone."""

_CREDENTIALS = struct.Struct("3i")
_TIME = struct.Struct("ll")
_HOW = "use a folder of your own, as /run/user/1000/l2p/socket"


@dataclass(frozen=True, slots=True)
class Listener:
    """A socket whose folder this process has locked.

    Attributes:
        path: of the socket.
        connections: accepts peers.
        folder: descriptor of the folder, with the lock.
        identity: device and inode of the socket's file.
    """

    path: Path
    connections: socket.socket
    folder: int
    identity: tuple[int, int]

    def is_there(self) -> bool:
        """Whether the socket can still be found: its file is removed with the folder of a session."""
        return _identity(self.path.name, self.folder) == self.identity

    def start(self) -> None:
        """Let peers connect; before, they are refused."""
        self.connections.listen(_BACKLOG)

    def close(self) -> None:
        """Remove the socket and release the folder."""
        self.connections.close()
        if self.is_there():
            with suppress(OSError):
                os.unlink(self.path.name, dir_fd=self.folder)
        os.close(self.folder)


def bind(path: Path) -> Listener:
    """Take a path for a socket; its folder is made if it is not there. What a killed process left is replaced.

    Raises:
        UsageError: the path names no file, or another kind of file is there.
        HostError: the folder is not private, or another process has taken it.
    """
    if not path.name:
        raise UsageError(f"the socket is `{path}`, expected the path of a file")
    make_private_folder(path.parent)
    folder = _open_private(path.parent)
    try:
        return _bind(path, folder)
    except BaseException:
        os.close(folder)
        raise


def make_private_folder(path: Path) -> None:
    """Make a folder for a socket, or check the one that is there.

    Raises:
        HostError: it cannot be made, belongs to somebody else, or others can enter it.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise HostError(f"cannot make the folder `{path}`: {error.strerror or error}", hint=_HOW) from error
    os.close(_open_private(path))


def connect(path: Path) -> socket.socket:
    """Connect to what listens at a path, if it belongs to the same user.

    Raises:
        HostError: nobody listens there, or the folder or the peer is not the user's own.
    """
    with _private_folder(path.parent) as folder:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(_address(path, folder))
            _require_same_user(connection)
        except OSError as error:
            connection.close()
            raise HostError(
                f"no worker listens at `{path}`: {error.strerror or error}",
                hint="start one: l2p-export worker start BUNDLE --socket PATH",
            ) from error
        except HostError:
            connection.close()
            raise
    _limit_sending(connection)
    return connection


def accept(listener: Listener) -> socket.socket | None:
    """The next peer; None for one of another user, which is turned away.

    Raises:
        OSError: the listener is closed.
    """
    connection, _ = listener.connections.accept()
    try:
        _require_same_user(connection)
    except (HostError, OSError):
        connection.close()
        return None
    _limit_sending(connection)
    return connection


def peer_process(connection: socket.socket) -> int:
    """Process number of the peer, as the kernel knows it."""
    return _credentials(connection)[0]


def _bind(path: Path, folder: int) -> Listener:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise HostError(
            f"another worker is in `{path.parent}`",
            hint="stop it with l2p-export worker stop, or choose another folder",
        ) from error
    except OSError as error:
        raise HostError(
            f"`{path.parent}` takes no lock: {error.strerror or error}", hint="use a local folder"
        ) from error
    # Whoever had made the socket would hold the lock.
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.stat(path.name, dir_fd=folder, follow_symlinks=False).st_mode):
            raise UsageError(f"`{path}` is a file and no socket", hint="choose another --socket")
        os.unlink(path.name, dir_fd=folder)
    connections = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connections.bind(_address(path, folder))
        os.chmod(path.name, 0o600, dir_fd=folder)
        identity = _identity(path.name, folder)
    except OSError as error:
        connections.close()
        raise HostError(f"cannot listen at `{path}`: {error.strerror or error}", hint=_HOW) from error
    if identity is None:
        connections.close()
        raise HostError(f"`{path}` was removed while it was made")
    return Listener(path, connections, folder, identity)


@contextmanager
def _private_folder(path: Path) -> Iterator[int]:
    folder = _open_private(path)
    try:
        yield folder
    finally:
        os.close(folder)


def _open_private(path: Path) -> int:
    """Open a folder that nobody else can enter."""
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise HostError(
            f"cannot open the folder `{path}` of the socket: {error.strerror or error}",
            hint="start a worker: l2p-export worker start BUNDLE --socket PATH",
        ) from error
    status = os.fstat(folder)
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        os.close(folder)
        raise HostError(
            f"the folder `{path}` belongs to user {status.st_uid} with mode {stat.S_IMODE(status.st_mode):o}, expected "
            f"user {os.geteuid()} and mode 700",
            hint=_HOW,
        )
    return folder


def _address(path: Path, folder: int) -> str:
    return f"/proc/self/fd/{folder}/{path.name}"


def _identity(name: str, folder: int) -> tuple[int, int] | None:
    try:
        status = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _credentials(connection: socket.socket) -> tuple[int, int, int]:
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    process, user, group = _CREDENTIALS.unpack(packed)
    return process, user, group


def _require_same_user(connection: socket.socket) -> None:
    user = _credentials(connection)[1]
    if user != os.geteuid():
        raise HostError(f"the other end of the socket belongs to user {user}, expected {os.geteuid()}")


def _limit_sending(connection: socket.socket) -> None:
    """Bound how long a message waits for its reader; reading waits for as long as drawing takes."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIME.pack(_SEND_SECONDS, 0))
