"""The output folder of a build: locked while it works, committed by one rename, swept of unused files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from l2p_engines.store.claims import is_claim_on
from l2p_engines.store.locks import locked
from l2p_engines.store.stages import FOLDERS, STAGES, WORK, stages, sweep_work
from l2p_runtime.bundle import BUILD_LOCK, STORE_POINTER, Bundle
from l2p_runtime.contract import MANIFEST_NAME, Manifest, bundle_digest, manifest_from_bytes, manifest_to_bytes
from l2p_runtime.errors import ArtifactError, HostError, L2PError, ParityError, UsageError
from l2p_runtime.files import is_partial_of, sweep_partials, write_bytes

_FOLDERS = (*FOLDERS, STAGES, WORK)
_REPLACED = (MANIFEST_NAME, STORE_POINTER)
_OWN = (*_FOLDERS, *_REPLACED, BUILD_LOCK)


@dataclass(frozen=True, slots=True)
class OutputFolder:
    """A folder that this build holds the lock of."""

    root: Path

    def committed(self) -> bytes:
        """Bytes of the current manifest; empty without one."""
        path = self.root / MANIFEST_NAME
        return path.read_bytes() if path.is_file() else b""

    def commit(self, manifest: Manifest, store: Path | None, stage_keys: Collection[str]) -> Bundle:
        """Replace `bundle.json`: from here on the new bundle is the bundle.

        Args:
            manifest: the new manifest.
            store: where its shared files are.
            stage_keys: stages whose records stay, so that the next build finds them.
        """
        data = manifest_to_bytes(manifest)
        write_bytes(self.root / MANIFEST_NAME, data)
        self.tidy(stage_keys)
        return Bundle(self.root, manifest, bundle_digest(data), store)

    def tidy(self, stage_keys: Collection[str]) -> None:
        """Remove files that the manifest does not name, and records of other stages than these."""
        _sweep(self.root, stage_keys)


@contextmanager
def open_output(root: Path) -> Iterator[OutputFolder]:
    """Make and lock the folder.

    A build that was stopped keeps its finished stages, and the next one resumes after them. A build that cannot succeed
    leaves the folder as it was before, with the stages of one that was stopped.

    Raises:
        UsageError: the path is a file, or a folder that holds anything but a bundle.
        HostError: another build holds it, or it cannot be written.
    """
    require_bundle_or_nothing(root)
    created = [folder for folder in (root, *root.parents) if not folder.exists()]
    try:
        root.mkdir(parents=True, exist_ok=True)
        with locked(root / BUILD_LOCK, busy=f"another build is writing `{root}`"):
            before = {path.stem for path in (root / STAGES).glob("*")}
            try:
                yield OutputFolder(root)
            except (ArtifactError, ParityError, UsageError):
                _sweep_made(root, before)
                raise
            finally:
                _sweep_leftovers(root)
    except OSError as error:
        if error.filename is None or Path(os.fsdecode(error.filename)) not in (root, root / BUILD_LOCK, *created):
            raise
        raise HostError(f"cannot write `{root}`: {error.strerror or error}", hint="choose another --out") from error
    finally:
        _remove_empty(created)


def require_bundle_or_nothing(root: Path) -> None:
    """Refuse to write where something else lies.

    Raises:
        UsageError: a file, a link, or a folder that holds other things than a bundle.
    """
    if root.is_symlink() or (root.exists() and not root.is_dir()):
        raise UsageError(f"`{root}` is not a folder", hint="choose another --out")
    if root.is_dir():
        foreign = sorted(
            e.name for e in root.iterdir() if not _is_own(e.name) or (e.name in _FOLDERS and e.is_symlink())
        )
        if foreign:
            raise UsageError(
                f"`{root}` holds other files ({', '.join(foreign[:3])}), expected a bundle or nothing",
                hint="choose another --out",
            )


def _is_own(name: str) -> bool:
    return name in _OWN or is_partial_of(name, *_REPLACED) or is_claim_on(name, BUILD_LOCK)


def require_disk(folder: Path, needed_bytes: int) -> None:
    """Refuse work that the disk has no room for.

    Raises:
        HostError: says how much is needed and how much is free.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed_bytes > free:
        raise HostError(
            f"`{folder}` has {free:,} bytes free, the build needs about {needed_bytes:,}",
            hint="choose another --out, or fewer --precision",
        )


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders that this build made and left empty, innermost first."""
    for folder in folders:
        if not folder.is_dir() or any(folder.iterdir()):
            return
        folder.rmdir()


def _sweep(root: Path, stage_keys: Collection[str]) -> None:
    """Remove files that the manifest does not name, and records; those of `stage_keys` with all files named stay."""
    named = _named_files(root)
    if named is None:
        return
    own, shared = named
    kept = {
        stage.key
        for stage in stages(root)
        if stage.key in stage_keys and own.issuperset(record.path for record in stage.files)
    }
    for record in (root / STAGES).glob("*"):
        if record.stem not in kept:
            record.unlink()
    _sweep_files(root, own)
    if not shared:
        (root / STORE_POINTER).unlink(missing_ok=True)


def _sweep_made(root: Path, before: Collection[str]) -> None:
    """Remove the records of stages that were not there before; `_sweep_leftovers` removes their files."""
    if _named_files(root) is None:
        return
    for record in (root / STAGES).glob("*"):
        if record.stem not in before:
            record.unlink()


def _sweep_leftovers(root: Path) -> None:
    """Remove files that no finished stage and no manifest names: leftovers of a build that was stopped."""
    sweep_work(root)
    sweep_partials(root, *_REPLACED)
    named = _named_files(root)
    if named is None:
        return
    finished = stages(root)
    own = named[0] | {record.path for stage in finished for record in stage.files}
    if not own:
        # Only digests: not worth keeping a folder for.
        for record in (root / STAGES).glob("*"):
            record.unlink()
    _sweep_files(root, own)
    for folder in (*FOLDERS, STAGES):
        if (root / folder).is_dir() and not (root / folder).is_symlink() and not any((root / folder).iterdir()):
            (root / folder).rmdir()


def _sweep_files(root: Path, kept: Collection[str]) -> None:
    for folder in FOLDERS:
        if not (root / folder).is_dir() or (root / folder).is_symlink():
            continue
        for file in (root / folder).iterdir():
            if f"{folder}/{file.name}" not in kept and not file.is_dir():
                file.unlink()


def _named_files(root: Path) -> tuple[set[str], bool] | None:
    """The bundle's own files, and whether it has shared ones; none without a bundle.

    None when its manifest cannot be read, which is no licence to delete.
    """
    path = root / MANIFEST_NAME
    if not path.is_file():
        return set(), False
    try:
        files = manifest_from_bytes(path.read_bytes()).files
    except (L2PError, OSError):
        return None
    return {record.path for record in files if not record.in_store}, any(record.in_store for record in files)
