"""Stores: folders whose stages and files many bundles share, so that a trunk is written only once.

Its files (docs/design.md, "Bundle"):

l2p-store.json             makes the folder a store
bundles/DIGEST.PLACE.json  path of a bundle that uses it; files that no bundle uses can be pruned
graphs/, stages/, ...      as in any home of stages
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from l2p_engines.store.locks import locked
from l2p_engines.store.stages import FOLDERS, STAGES, WORK, Home, Stage, leftover_work, stages, sweep_work
from l2p_runtime.bundle import (
    STORE_BUNDLES,
    STORE_MARKER,
    STORE_POINTER,
    STORES_MAX,
    check_file,
    require_store,
)
from l2p_runtime.contract import MANIFEST_NAME, FileRecord, Manifest, bundle_digest, manifest_from_bytes
from l2p_runtime.errors import ArtifactError, HostError, L2PError, UsageError
from l2p_runtime.files import write_bytes, write_json

_LOCK = ".lock"
_OWN = {_LOCK, STORE_BUNDLES, STORE_MARKER, STAGES, WORK, *FOLDERS}
_SCHEMA = {"schema": 1}
_PLACE_DIGITS = 16


@dataclass(frozen=True, slots=True)
class StoreEntry:
    """One stage of a store, with the folders of the bundles that use it."""

    stage: Stage
    size_bytes: int
    age_seconds: float
    used_by: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StoreFindings:
    """Result of a check: damaged paths with the reason, and leftovers that it removed."""

    files: int
    size_bytes: int
    damaged: tuple[tuple[str, str], ...]
    removed: tuple[str, ...]


@contextmanager
def open_store(root: Path) -> Iterator[Home]:
    """Make a store if there is none, and keep it from being pruned while it is used.

    Raises:
        UsageError: the folder holds something else.
        HostError: it cannot be written, or is being pruned.
    """
    require_store_or_nothing(root)
    marker = root / STORE_MARKER
    try:
        root.mkdir(parents=True, exist_ok=True)
        (root / STORE_BUNDLES).mkdir(exist_ok=True)
        (root / WORK).mkdir(exist_ok=True)
        if not marker.is_file():
            write_json(marker, _SCHEMA, work=root / WORK)
    except OSError as error:
        raise HostError(
            f"cannot write the store `{root}`: {error.strerror or error}", hint="choose another --store"
        ) from error
    with locked(root / _LOCK, is_shared=True, busy=f"the store `{root}` is being checked or pruned"):
        yield Home(root.resolve(), is_shared=True)


def require_store_or_nothing(root: Path) -> None:
    """Refuse a folder that cannot become a store.

    Raises:
        UsageError: the folder holds something else.
    """
    is_store = (root / STORE_MARKER).is_file()
    # A store whose making was killed has folders of its own and no marker yet.
    if root.exists() and not is_store and (not root.is_dir() or {e.name for e in root.iterdir()} - _OWN):
        raise UsageError(f"`{root}` is no store and not empty", hint="give --store an empty or a new folder")


def register_bundle(store: Home, bundle: Path, digest: str) -> None:
    """Record a bundle in a store, and the store in the bundle. Nothing is written if both are recorded already.

    Call it before the bundle's manifest is replaced. Until then the old bundle needs its own store, so earlier stores
    stay on its list.
    """
    work, folder = store.root / WORK, str(bundle.resolve())
    work.mkdir(exist_ok=True)
    place = hashlib.sha256(os.fsencode(folder)).hexdigest()[:_PLACE_DIGITS]
    record = store.root / STORE_BUNDLES / f"{digest}.{place}.json"
    if _registered(record) != Path(folder):
        record.parent.mkdir(exist_ok=True)
        write_json(record, {"path": folder}, work=work)
    pointer = bundle / STORE_POINTER
    old = pointer.read_bytes() if pointer.is_file() and not pointer.is_symlink() else b""
    lines = dict.fromkeys([os.fsencode(store.root), *old.split(b"\n")])
    new = b"\n".join([line for line in lines if line][:STORES_MAX]) + b"\n"
    if new != old:
        write_bytes(pointer, new)


def list_store(root: Path) -> list[StoreEntry]:
    """Every stage of a store, largest first.

    Raises:
        HostError: no store.
    """
    users = _users(require_store(root))
    entries = []
    for stage in stages(root):
        used_by = sorted({user for record in stage.files for user in users.get(record.path, ())})
        written = (root / STAGES / f"{stage.key}.json").stat().st_mtime
        entries.append(StoreEntry(stage, _size(stage), max(time.time() - written, 0.0), tuple(used_by)))
    return sorted(entries, key=lambda entry: (-entry.size_bytes, entry.stage.label))


def prune_store(root: Path, *, older_than_seconds: float = 0.0, dry_run: bool = False) -> list[StoreEntry]:
    """Remove every stage and file that no bundle uses; returns the stages.

    A bundle counts while the folder that it was built in holds it.

    Raises:
        HostError: no store, or a build is using it.
    """
    with _alone(require_store(root)):
        entries = [entry for entry in list_store(root) if not entry.used_by and entry.age_seconds >= older_than_seconds]
        if dry_run:
            return entries
        for entry in entries:
            (root / STAGES / f"{entry.stage.key}.json").unlink(missing_ok=True)
        kept = _users(root).keys() | {record.path for stage in stages(root) for record in stage.files}
        for path in _files(root):
            if path.relative_to(root).as_posix() not in kept:
                path.unlink(missing_ok=True)
        for path in _dead_registrations(root):
            path.unlink(missing_ok=True)
        sweep_work(root)
        return entries


def check_store(root: Path, *, remove: bool, advance: Callable[[int], None], dry_run: bool = False) -> StoreFindings:
    """Hash every file, and remove leftovers of killed builds.

    Args:
        root: the store.
        remove: also remove damaged files, with the stages that made them, so that the next build makes them again.
        advance: receives the bytes hashed since the last call.
        dry_run: find everything and remove nothing.

    Raises:
        HostError: no store, or a build is using it.
    """
    with _alone(require_store(root)):
        leftovers = leftover_work(root) if dry_run else sweep_work(root)
        removed = [path.relative_to(root).as_posix() for path in leftovers]
        damaged: dict[str, str] = {}
        known = _records(root)
        for record in known.values():
            try:
                check_file(root, record, full=True, advance=advance)
            except ArtifactError as error:
                damaged[record.path] = str(error)
        damaged |= {
            path.relative_to(root).as_posix(): "cannot be read as the record of a stage" for path in _unreadable(root)
        }
        for path in _files(root):
            if (name := path.relative_to(root).as_posix()) not in known:
                if not dry_run:
                    path.unlink(missing_ok=True)
                removed.append(name)
        for path in _dead_registrations(root):
            if not dry_run:
                path.unlink(missing_ok=True)
            removed.append(path.relative_to(root).as_posix())
        if remove and not dry_run:
            _remove_damaged(root, set(damaged))
        sizes = [path.stat().st_size for path in _files(root)]
        return StoreFindings(len(sizes), sum(sizes), tuple(sorted(damaged.items())), tuple(sorted(removed)))


def store_bytes(root: Path) -> int:
    """Bytes of all files that stages and bundles of a store name: what `check_store` hashes."""
    return sum(record.size_bytes for record in _records(require_store(root)).values())


def _alone(root: Path) -> AbstractContextManager[None]:
    return locked(root / _LOCK, busy=f"a build is using the store `{root}`")


def _remove_damaged(root: Path, names: set[str]) -> None:
    for stage in stages(root):
        if names & {record.path for record in stage.files}:
            (root / STAGES / f"{stage.key}.json").unlink(missing_ok=True)
    for name in names:
        if not (root / name).is_dir():
            (root / name).unlink(missing_ok=True)


def _records(root: Path) -> dict[str, FileRecord]:
    """Path to record of every file that a stage names, or that a bundle names and that is there.

    A bundle's files count even if their stage is lost. A missing file is found when the bundle is opened.
    """
    of_bundles = (
        record
        for _, manifest in _bundles(root)
        for record in manifest.files
        if record.in_store and (root / record.path).exists()
    )
    of_stages = (record for stage in stages(root) for record in stage.files)
    return {record.path: record for record in (*of_bundles, *of_stages)}


def _users(root: Path) -> dict[str, list[str]]:
    """Path of a file in the store to the bundles that use it."""
    users: dict[str, list[str]] = {}
    for folder, manifest in _bundles(root):
        for record in manifest.files:
            if record.in_store:
                users.setdefault(record.path, []).append(str(folder))
    return users


def _bundles(root: Path) -> list[tuple[Path, Manifest]]:
    """Folder and manifest of each registered bundle that is where it was built."""
    return [found for path in sorted((root / STORE_BUNDLES).glob("*.json")) if (found := _bundle(path)) is not None]


def _bundle(registration: Path) -> tuple[Path, Manifest] | None:
    folder = _registered(registration)
    if folder is None:
        return None
    try:
        data = (folder / MANIFEST_NAME).read_bytes()
        is_this = bundle_digest(data) == registration.name.partition(".")[0]
        return (folder, manifest_from_bytes(data)) if is_this else None
    except (OSError, ValueError, L2PError):
        return None


def _registered(registration: Path) -> Path | None:
    """The folder that a registration names; None when it cannot be read."""
    try:
        return Path(json.loads(registration.read_bytes())["path"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _dead_registrations(root: Path) -> list[Path]:
    return [path for path in (root / STORE_BUNDLES).glob("*") if not path.is_dir() and _bundle(path) is None]


def _unreadable(root: Path) -> list[Path]:
    readable = {f"{stage.key}.json" for stage in stages(root)}
    return [path for path in (root / STAGES).glob("*") if path.name not in readable and not path.is_dir()]


def _files(root: Path) -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (root / folder).glob("*") if not path.is_dir())


def _size(stage: Stage) -> int:
    return sum(record.size_bytes for record in stage.files)
