"""Opens a bundle on disk: its content is not trusted, and is verified in full on request.

Files carry their digest in their names, and replacing `bundle.json` is the only commit (docs/design.md, "Bundle"). A
file may lie in a store that bundles share, under the same path there.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from l2p_runtime.contract import MANIFEST_NAME, FileRecord, Manifest, bundle_digest, manifest_from_bytes
from l2p_runtime.errors import ArtifactError, HostError, L2PError, UsageError, counted

MANIFEST_BYTES_MAX = 64 << 20
FULL_HASH_BYTES = 64 << 20
"""Files up to this size are hashed in full on open; larger ones by size and stamp. 64 MiB takes about 50 ms."""

STORE_MARKER = "l2p-store.json"
"""The file that makes a folder a store."""
STORE_POINTER = ".store"
BUILD_LOCK = ".build.lock"
BUILD_STAGES = "stages"
"""The file of a bundle that says where its store is. It is believed only if that store knows the bundle."""
STORE_BUNDLES = "bundles"
"""The folder of a store that holds `DIGEST.*.json` for every bundle that uses it."""

STORES_MAX = 4
"""Stores that a pointer may name, the latest first."""

_POINTER_BYTES_MAX = 16 << 10
_STAMP_BYTES = 64 << 10
_READ_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened bundle: its folder, its manifest, and the digest of its exact content."""

    root: Path
    manifest: Manifest
    digest: str
    store: Path | None = None

    def path(self, relative: str) -> Path:
        """The path of one of its files on disk."""
        record = next((record for record in self.manifest.files if record.path == relative), None)
        return self.home(record) / relative if record is not None else self.root / relative

    def home(self, record: FileRecord) -> Path:
        """The folder that a record's path is relative to."""
        return self.store if record.in_store and self.store is not None else self.root


def open_bundle(root: Path, store: Path | None = None) -> Bundle:
    """Read the manifest and check that its files are the ones it was written with.

    Args:
        root: the bundle's folder.
        store: where its shared files are; None for the store that it was built with.

    Raises:
        ArtifactError: no bundle, a manifest that does not hold together, or a file that is absent or changed.
        HostError: `store` is no store.
    """
    path = root / MANIFEST_NAME
    if not path.is_file():
        raise _no_bundle(root)
    if path.stat().st_size > MANIFEST_BYTES_MAX:
        raise ArtifactError(f"`{path}` has {path.stat().st_size} bytes, expected at most {MANIFEST_BYTES_MAX}")
    data = path.read_bytes()
    try:
        manifest = manifest_from_bytes(data)
    except L2PError as error:
        raise ArtifactError(f"`{path}`: {error}", hint=error.hint) from error
    digest = bundle_digest(data)
    shared = sum(record.in_store for record in manifest.files)
    bundle = Bundle(root, manifest, digest, _find_store(root, digest, store, shared) if shared else None)
    for record in manifest.files:
        check_file(bundle.home(record), record, full=record.size_bytes <= FULL_HASH_BYTES)
    return bundle


def verify_files(bundle: Bundle, advance: Callable[[int], None]) -> None:
    """Hash every file in full.

    Raises:
        ArtifactError: a file is absent or changed.
    """
    for record in bundle.manifest.files:
        check_file(bundle.home(record), record, full=True, advance=advance)


def check_file(
    root: Path, record: FileRecord, *, full: bool, advance: Callable[[int], None] = lambda size: None
) -> None:
    """Compare one file with its record: size, then the whole digest or the stamp.

    Raises:
        ArtifactError: absent, outside the bundle, or changed.
    """
    path = root / record.path
    # A symbolic link could lead anywhere; ONNX Runtime refuses linked weights for the same reason.
    if path.is_symlink() or path.parent.is_symlink():
        raise ArtifactError(f"`{record.path}` is a symbolic link, expected a file of the bundle")
    if not path.is_file():
        raise ArtifactError(f"the bundle lacks `{record.path}`", hint="build it again, or copy the whole folder")
    size_bytes = path.stat().st_size
    if size_bytes != record.size_bytes:
        raise ArtifactError(
            f"`{record.path}` has {counted(size_bytes, 'byte')}, the manifest says {record.size_bytes:,}",
            hint=_CHANGED,
        )
    found = file_digest(path, advance) if full else file_stamp(path)
    if found != (record.sha256 if full else record.stamp):
        raise ArtifactError(f"`{record.path}` was changed after it was built: its digest differs", hint=_CHANGED)


def require_store(root: Path) -> Path:
    """The folder itself when it is a store.

    Raises:
        UsageError: there is no such folder.
        HostError: it is no store.
    """
    if not root.exists():
        raise UsageError(f"there is no store `{root}`", hint="give the folder that `build --store` was given")
    if not (root / STORE_MARKER).is_file():
        raise HostError(
            f"`{root}` is no store: it has no {STORE_MARKER}", hint="give the folder that `build --store` was given"
        )
    return root


def file_record(root: Path, path: Path, sha256: str, *, in_store: bool = False) -> FileRecord:
    """Describe a file whose digest is known from writing it."""
    return FileRecord(path.relative_to(root).as_posix(), path.stat().st_size, sha256, file_stamp(path), in_store)


def file_digest(path: Path, advance: Callable[[int], None] = lambda size: None) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()


def file_stamp(path: Path) -> str:
    """SHA-256 over the first and the last 64 KiB: tells another file quickly, whatever its size."""
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(_STAMP_BYTES))
        file.seek(max(path.stat().st_size - _STAMP_BYTES, 0))
        digest.update(file.read(_STAMP_BYTES))
    return digest.hexdigest()


def _find_store(root: Path, digest: str, store: Path | None, shared: int) -> Path:
    """The store given, or the one that the bundle points to, if that one knows the bundle.

    A bundle comes from a stranger and may point anywhere; only a build writes into a store.
    """
    if store is not None:
        return require_store(store)
    pointed = []
    if (root / STORE_POINTER).is_file() and not (root / STORE_POINTER).is_symlink():
        with (root / STORE_POINTER).open("rb") as file:
            lines = file.read(_POINTER_BYTES_MAX).split(b"\n")[:STORES_MAX]
        pointed = [Path(os.fsdecode(line)) for line in lines if line and b"\0" not in line]
    for path in pointed:
        if path.is_absolute() and _knows(path, digest):
            return require_store(path)
    listed = ", ".join(f"`{ascii(str(path))[1:-1][:200]}`" for path in pointed)
    found = f"the one it points to does not know it ({listed})" if listed else "does not say which"
    raise ArtifactError(
        f"`{root}` keeps {counted(shared, 'file')} in a shared store and {found}",
        hint="give the store with --store DIR (store= in Python), or copy bundles with `l2p-export pack`",
    )


def _knows(store: Path, digest: str) -> bool:
    try:
        return any((store / STORE_BUNDLES).glob(f"{digest}.*.json"))
    except OSError:  # a name that is too long, a folder that may not be entered
        return False


def _no_bundle(root: Path) -> ArtifactError:
    if (root / STORE_MARKER).is_file():
        return ArtifactError(f"`{root}` is a store", hint="give a bundle; `l2p-export store ls` says what uses it")
    if (root / BUILD_STAGES).is_dir() or (root / BUILD_LOCK).is_file():
        return ArtifactError(f"`{root}` holds an unfinished build", hint="run the same build again to finish it")
    what = "has no bundle.json" if root.is_dir() else "does not exist"
    return ArtifactError(f"`{root}` {what}", hint="give a folder that `l2p-export build` wrote")


_CHANGED = "build the bundle again, or copy it again from where it was built"
