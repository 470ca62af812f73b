"""The folder a build writes: locked while it works, committed by one rename, swept of what nobody refers to."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from l2p_runtime.bundle import Bundle
from l2p_runtime.contract import MANIFEST_NAME, Manifest, bundle_digest, manifest_from_bytes, manifest_to_bytes
from l2p_runtime.errors import HostError, L2PError, UsageError

_FOLDERS = ("graphs", "reference", "text")
_LOCK = ".build.lock"
# Room beside the weights for graphs, reference tensors and the file system's own bookkeeping.
_SPARE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class OutputFolder:
    """A folder that this build holds the lock of."""

    root: Path

    def folder(self, name: str) -> Path:
        """One of the bundle's subfolders, made if need be."""
        path = self.root / name
        path.mkdir(exist_ok=True)
        return path

    def commit(self, manifest: Manifest) -> Bundle:
        """Replace `bundle.json`: from here on the new bundle is the bundle."""
        data = manifest_to_bytes(manifest)
        partial = self.root / f".{MANIFEST_NAME}.partial"
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.root / MANIFEST_NAME)
        _sync_folder(self.root)
        return Bundle(self.root, manifest, bundle_digest(data))


@contextmanager
def open_output(root: Path) -> Iterator[OutputFolder]:
    """Make and lock the folder; on the way out, remove every file that `bundle.json` does not name.

    Raises:
        UsageError: the path is a file, or a folder that holds something else than a bundle.
        HostError: another build holds it, or it cannot be written.
    """
    require_bundle_or_nothing(root)
    created = [folder for folder in (root, *root.parents) if not folder.exists()]
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = _lock(root)
    except OSError as error:
        _remove_empty(created)
        raise HostError(f"cannot write `{root}`: {error.strerror or error}", hint="choose another --out") from error
    try:
        yield OutputFolder(root)
    finally:
        _sweep(root)
        (root / _LOCK).unlink(missing_ok=True)
        os.close(lock)
        _remove_empty(created)


def require_bundle_or_nothing(root: Path) -> None:
    """Refuse to write where something else lies.

    Raises:
        UsageError: a file, a link, or a folder that holds other things than a bundle.
    """
    if root.is_symlink() or (root.exists() and not root.is_dir()):
        raise UsageError(f"`{root}` is not a folder", hint="choose another --out")
    if root.is_dir():
        foreign = sorted(entry.name for entry in root.iterdir() if entry.name not in (*_FOLDERS, MANIFEST_NAME))
        foreign = [name for name in foreign if name not in (_LOCK, f".{MANIFEST_NAME}.partial")]
        if foreign:
            raise UsageError(
                f"`{root}` holds other files ({', '.join(foreign[:3])}), expected a bundle or nothing",
                hint="choose another --out",
            )


def require_disk(folder: Path, weight_bytes: int) -> None:
    """Refuse a build that the disk has no room for.

    Raises:
        HostError: says how much is needed and how much is free.
    """
    needed, free = weight_bytes + _SPARE_BYTES, shutil.disk_usage(folder).free
    if needed > free:
        raise HostError(
            f"`{folder}` has {free:,} bytes free, the build needs about {needed:,}",
            hint="choose another --out, or fewer --precision",
        )


def _lock(root: Path) -> int:
    """Take the folder's lock; the kernel drops it with the process, however that ends.

    Raises:
        HostError: another build holds it.
    """
    while True:
        lock = os.open(root / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A build that ended in between has unlinked the file that was opened here; then the lock locks nothing.
            if os.path.samestat(os.fstat(lock), (root / _LOCK).stat()):
                return lock
        except FileNotFoundError:
            pass
        except OSError as error:
            os.close(lock)
            raise HostError(
                f"another build is writing `{root}`", hint="wait for it, or choose another --out"
            ) from error
        os.close(lock)


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders that this build made and left empty, innermost first."""
    for folder in folders:
        if not folder.is_dir() or any(folder.iterdir()):
            return
        folder.rmdir()


def _sweep(root: Path) -> None:
    """Remove what an earlier or failed build left: files that the manifest does not name."""
    named = _named_files(root)
    if named is None:
        return
    for folder in _FOLDERS:
        if not (root / folder).is_dir() or (root / folder).is_symlink():
            continue
        for file in (root / folder).iterdir():
            if f"{folder}/{file.name}" not in named and not file.is_dir():
                file.unlink()
        if not any((root / folder).iterdir()):
            (root / folder).rmdir()
    (root / f".{MANIFEST_NAME}.partial").unlink(missing_ok=True)


def _named_files(root: Path) -> set[str] | None:
    """Files of the bundle; empty without one; None when its manifest cannot be read, which is no licence to delete."""
    path = root / MANIFEST_NAME
    if not path.is_file():
        return set()
    try:
        return {record.path for record in manifest_from_bytes(path.read_bytes()).files}
    except (L2PError, OSError):
        return None


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
