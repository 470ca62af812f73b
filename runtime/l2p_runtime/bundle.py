"""A bundle on disk: opened with suspicion, verified in full on request.

Files carry their digest in their names, and replacing `bundle.json` is the only commit (design section 6).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from l2p_runtime.contract import MANIFEST_NAME, FileRecord, Manifest, bundle_digest, manifest_from_bytes
from l2p_runtime.errors import ArtifactError, L2PError

MANIFEST_BYTES_MAX = 64 << 20
FULL_HASH_BYTES = 64 << 20
"""Files up to this size are hashed in full on open; larger ones by size and stamp. 64 MiB takes about 50 ms."""

_STAMP_BYTES = 64 << 10
_READ_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened bundle: where it lies, what it says, and the digest that names its exact content."""

    root: Path
    manifest: Manifest
    digest: str

    def path(self, relative: str) -> Path:
        """Where one of its files lies."""
        return self.root / relative


def open_bundle(root: Path) -> Bundle:
    """Read the manifest and check that its files are the ones it was written with.

    Raises:
        ArtifactError: no bundle, a manifest that does not hold together, or a file that is absent or changed.
    """
    path = root / MANIFEST_NAME
    if not path.is_file():
        what = "has no bundle.json" if root.is_dir() else "does not exist"
        raise ArtifactError(f"`{root}` {what}", hint="give a folder that `l2p-export build` wrote")
    if path.stat().st_size > MANIFEST_BYTES_MAX:
        raise ArtifactError(f"`{path}` has {path.stat().st_size} bytes, expected at most {MANIFEST_BYTES_MAX}")
    data = path.read_bytes()
    try:
        manifest = manifest_from_bytes(data)
    except L2PError as error:
        raise ArtifactError(f"`{path}`: {error}", hint=error.hint) from error
    for record in manifest.files:
        check_file(root, record, full=record.size_bytes <= FULL_HASH_BYTES)
    return Bundle(root, manifest, bundle_digest(data))


def verify_files(bundle: Bundle, advance: Callable[[int], None]) -> None:
    """Hash every file in full.

    Raises:
        ArtifactError: a file is absent or changed.
    """
    for record in bundle.manifest.files:
        check_file(bundle.root, record, full=True, advance=advance)


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
            f"`{record.path}` has {size_bytes} bytes, the manifest says {record.size_bytes}", hint=_CHANGED
        )
    found = file_digest(path, advance) if full else file_stamp(path)
    if found != (record.sha256 if full else record.stamp):
        raise ArtifactError(f"`{record.path}` was changed after it was built: its digest differs", hint=_CHANGED)


def file_record(root: Path, path: Path, sha256: str) -> FileRecord:
    """Describe a file of a bundle whose digest is known from writing it."""
    return FileRecord(path.relative_to(root).as_posix(), path.stat().st_size, sha256, file_stamp(path))


def file_digest(path: Path, advance: Callable[[int], None] = lambda size: None) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()


def file_stamp(path: Path) -> str:
    """SHA-256 over the first and the last 64 KiB: sees another file at once, whatever its size."""
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(_STAMP_BYTES))
        file.seek(max(path.stat().st_size - _STAMP_BYTES, 0))
        digest.update(file.read(_STAMP_BYTES))
    return digest.hexdigest()


_CHANGED = "build the bundle again, or copy it again from where it was built"
