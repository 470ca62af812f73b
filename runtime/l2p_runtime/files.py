"""Writes files that are complete or absent: under a temporary name, synced, then renamed into place.

A temporary name is `.NAME.DIGITS.partial`, with 16 random hexadecimal digits: writers of one path never share it,
whatever their process ids. Its writer holds a kernel lock on it, which ends with the process, whichever container or
machine that ran in: so `sweep_partials` tells what a killed process left from what is being written.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from l2p_runtime.contract.codec import to_json

_PARTIAL = re.compile(r"\.(.*)\.[0-9a-f]{16}\.partial", re.DOTALL)
_RANDOM_BYTES = 8
_NAME_BYTES_MAX = 255
_TRIES = 16
"""Names to try. A name that is taken was guessed by somebody else."""

_ABANDONED_SECONDS = 86_400
"""Age of a temporary file that nobody writes any more, on a file system without locks."""

# File systems without a sync of folders answer one of these.
_CANNOT_SYNC = (errno.EINVAL, errno.EBADF, errno.ENOTSUP)


@contextmanager
def atomic_file(path: Path, *, work: Path | None = None) -> Iterator[BinaryIO]:
    """Write a file that appears complete or not at all, and survives a power cut.

    After the block the file is synced and renamed over `path`, and the folder is synced. If the block raises, the
    temporary file is removed and what was at `path` stays.

    Args:
        path: the file; an existing file or link is replaced. Its folder must exist.
        work: folder for the temporary file, on the file system of `path`; the folder of `path` by default.

    Yields:
        The temporary file, open for writing. Its permissions follow the umask.

    Raises:
        OSError: the file cannot be written; the error names `path`.
    """
    with _errors_naming(path):
        handle, partial = _new(path, work, _create)
        try:
            # Not `os.fdopen`: tifffile wants a file whose name is a path.
            with open(partial, "wb", opener=lambda *_: handle) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                # Still locked: between a lock and a rename, it would look like one that was left.
                partial.replace(path)
        except BaseException:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def write_bytes(path: Path, data: bytes, *, work: Path | None = None) -> None:
    """Write a file as `atomic_file` does.

    Raises:
        OSError: the file cannot be written.
    """
    with atomic_file(path, work=work) as file:
        file.write(data)


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8, as `atomic_file` does.

    Raises:
        OSError: the file cannot be written.
    """
    write_bytes(path, text.encode())


def write_json(path: Path, data: object, *, work: Path | None = None, indent: int | None = None) -> None:
    """Write a spec, or dictionaries, lists and scalars, as JSON in ASCII, as `atomic_file` does.

    Raises:
        OSError: the file cannot be written.
    """
    write_bytes(path, json.dumps(to_json(data), indent=indent).encode("ascii"), work=work)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Fill a folder that appears complete or not at all, and survives a power cut.

    After the block all files in the folder are synced, so the block may write them in any way; then the folder is
    renamed to `path`.

    Args:
        path: the folder; an existing one is removed first. Its parent must exist.

    Yields:
        The temporary folder, empty.

    Raises:
        OSError: the folder cannot be written, or a file is at `path`.
    """
    with _errors_naming(path), partial_folder(path) as partial:
        yield partial
        _sync_tree(partial)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        partial.rename(path)
        sync_folder(path.parent)


@contextmanager
def partial_folder(path: Path) -> Iterator[Path]:
    """Make a temporary folder beside `path`, and remove it afterwards with everything that is still in it.

    Raises:
        OSError: the folder cannot be made.
    """
    handle, partial = _new(path, None, _create_folder)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(handle)


def commit_file(partial: Path, path: Path) -> None:
    """Sync a file that somebody else wrote, rename it over `path`, and sync the folder of `path`.

    Raises:
        OSError: the file cannot be synced or renamed.
    """
    _sync_file(partial)
    partial.replace(path)
    sync_folder(path.parent)


def partial_path(path: Path, work: Path | None = None) -> Path:
    """A new temporary name for `path`, in its folder or in `work`; the start of a long name stands for all of it."""
    random = f".{secrets.token_hex(_RANDOM_BYTES)}.partial"
    return (work or path.parent) / f".{_shortened(path.name)}{random}"


def is_partial_of(name: str, *targets: str) -> bool:
    """Whether a file name is a temporary name for one of the targets, or, without targets, for any file."""
    match = _PARTIAL.fullmatch(name)
    return match is not None and (not targets or match[1] in map(_shortened, targets))


def sweep_partials(folder: Path, *targets: str) -> None:
    """Remove temporary files and folders that killed processes left; those that are being written stay.

    On a file system without locks, what was written to within the last day stays too.

    Args:
        folder: where to look; its subfolders are not searched.
        targets: file names whose temporary files are removed; those of all files by default.
    """
    for entry in list(folder.iterdir()) if folder.is_dir() else []:
        if not is_partial_of(entry.name, *targets):
            continue
        with _abandoned(entry) as is_abandoned:
            if not is_abandoned:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make names in a folder survive a power cut.

    Nothing is done on a file system that cannot sync folders, or for a folder that may be written but not read.

    Raises:
        OSError: the disk failed.
    """
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
    finally:
        os.close(handle)


def _new(path: Path, work: Path | None, make: Callable[[Path], int]) -> tuple[int, Path]:
    """Something new under a temporary name, open and locked, and the name. Existing files are not opened."""
    for _ in range(_TRIES):
        partial = partial_path(path, work)
        with suppress(FileExistsError):
            handle = make(partial)
            # A sweep may have taken it before it was locked.
            if _lock(handle) is not False and _is_at(handle, partial):
                return handle, partial
            os.close(handle)
    raise FileExistsError(errno.EEXIST, "every temporary name is taken", str(path))


def _create(partial: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    return os.open(partial, flags, 0o666)


def _create_folder(partial: Path) -> int:
    partial.mkdir()
    return os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _lock(handle: int) -> bool | None:
    """Lock an open file or folder; False if another process has, None on a file system without locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.lstat())
    except FileNotFoundError:
        return False


@contextmanager
def _abandoned(path: Path) -> Iterator[bool]:
    """Whether nobody writes a temporary file or folder any more; while this lasts, it stays so."""
    try:
        is_folder = stat.S_ISDIR(path.lstat().st_mode)
        # A lock on a network file system wants a file that is open for writing.
        kind = os.O_RDONLY | os.O_DIRECTORY if is_folder else os.O_RDWR | os.O_NONBLOCK
        handle = os.open(path, kind | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        # What is a link was not made here and locks nothing; what may not be opened is somebody else's.
        yield error.errno == errno.ELOOP
        return
    try:
        found = _lock(handle)
        yield time.time() - os.fstat(handle).st_mtime > _ABANDONED_SECONDS if found is None else found
    finally:
        os.close(handle)


@contextmanager
def _errors_naming(path: Path) -> Iterator[None]:
    """Make errors name the requested file instead of its temporary name."""
    try:
        yield
    except OSError as error:
        if isinstance(error.filename, (str, bytes, Path)):
            name = Path(os.fsdecode(error.filename)).name
            if is_partial_of(name, path.name):
                error.filename, error.filename2 = str(path), None
        raise


def _shortened(name: str) -> str:
    """As much of a file name as leaves room for the rest of a temporary one."""
    added = len("..") + 2 * _RANDOM_BYTES + len(".partial")
    return os.fsdecode(os.fsencode(name)[: _NAME_BYTES_MAX - added])


def _sync_file(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_tree(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_symlink():
            continue
        if entry.is_dir():
            _sync_tree(entry)
        else:
            _sync_file(entry)
    sync_folder(folder)
