"""A store: one folder whose stages and files many bundles share, so that a trunk is written once (design section 6).

l2p-store.json          makes the folder a store
bundles/DIGEST.json     where a bundle lies that uses it; what no bundle uses can be pruned
graphs/, stages/, ...   as in any home of stages
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from l2p_engines.stages import FOLDERS, STAGES, WORK, Home, Stage, locked, stages, sweep_work, write_json
from l2p_runtime.bundle import (
    STORE_BUNDLES,
    STORE_MARKER,
    STORE_POINTER,
    STORES_MAX,
    check_file,
    require_store,
)
from l2p_runtime.contract import MANIFEST_NAME, Manifest, bundle_digest, manifest_from_bytes
from l2p_runtime.errors import ArtifactError, HostError, L2PError, UsageError

_LOCK = ".lock"
_SCHEMA = {"schema": 1}


@dataclass(frozen=True, slots=True)
class StoreEntry:
    """One stage of a store, with the folders of the bundles that use it."""

    stage: Stage
    size_bytes: int
    age_seconds: float
    used_by: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StoreFindings:
    """What a check found: damaged paths with what is wrong, and leftovers that it removed."""

    files: int
    size_bytes: int
    damaged: tuple[tuple[str, str], ...]
    removed: tuple[str, ...]


@contextmanager
def open_store(root: Path) -> Iterator[Home]:
    """Make a store if need be, and keep it from being pruned while it is used.

    Raises:
        UsageError: the folder holds something else.
        HostError: it cannot be written, or is being pruned.
    """
    marker = root / STORE_MARKER
    if root.exists() and not marker.is_file() and (not root.is_dir() or any(root.iterdir())):
        raise UsageError(f"`{root}` is no store and not empty", hint="give --store an empty or a new folder")
    try:
        root.mkdir(parents=True, exist_ok=True)
        (root / STORE_BUNDLES).mkdir(exist_ok=True)
        (root / WORK).mkdir(exist_ok=True)
        if not marker.is_file():
            write_json(marker, _SCHEMA, root / WORK)
    except OSError as error:
        raise HostError(
            f"cannot write the store `{root}`: {error.strerror or error}", hint="choose another --store"
        ) from error
    with locked(root / _LOCK, is_shared=True, busy=f"the store `{root}` is being checked or pruned"):
        yield Home(root.resolve(), is_shared=True)


def register_bundle(store: Home, bundle: Path, digest: str) -> None:
    """Let a store know a bundle, and the bundle its store; before the bundle's manifest is replaced."""
    work = store.root / WORK
    work.mkdir(exist_ok=True)
    write_json(store.root / STORE_BUNDLES / f"{digest}.json", {"path": str(bundle.resolve())}, work)
    pointer = bundle / STORE_POINTER
    # Earlier stores stay on the list: until its manifest is replaced, the bundle that is there needs its own.
    lines = dict.fromkeys([os.fsencode(store.root), *(pointer.read_bytes().split(b"\n") if pointer.is_file() else [])])
    partial = bundle / f"{STORE_POINTER}.partial"
    partial.write_bytes(b"\n".join([line for line in lines if line][:STORES_MAX]) + b"\n")
    partial.replace(pointer)


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


def check_store(root: Path, *, remove: bool, advance: Callable[[int], None]) -> StoreFindings:
    """Hash every file, and clear what killed builds left.

    Args:
        root: the store.
        remove: also remove what is damaged, with the stages that made it, so that the next build makes it again.
        advance: told the bytes hashed since the last call.

    Raises:
        HostError: no store, or a build is using it.
    """
    with _alone(require_store(root)):
        removed = [path.relative_to(root).as_posix() for path in sweep_work(root)]
        damaged: dict[str, str] = {}
        known: set[str] = set()
        for stage in stages(root):
            known |= {record.path for record in stage.files}
            for record in stage.files:
                try:
                    check_file(root, record, full=True, advance=advance)
                except ArtifactError as error:
                    damaged[record.path] = str(error)
        damaged |= {
            path.relative_to(root).as_posix(): "cannot be read as the record of a stage" for path in _unreadable(root)
        }
        for path in _files(root):
            if (name := path.relative_to(root).as_posix()) not in known:
                path.unlink(missing_ok=True)
                removed.append(name)
        for path in _dead_registrations(root):
            path.unlink(missing_ok=True)
            removed.append(path.relative_to(root).as_posix())
        if remove:
            _remove_damaged(root, set(damaged))
        sizes = [path.stat().st_size for path in _files(root)]
        return StoreFindings(len(sizes), sum(sizes), tuple(sorted(damaged.items())), tuple(sorted(removed)))


def store_bytes(root: Path) -> int:
    """Bytes of all files that stages of a store name: what `check_store` hashes."""
    return sum(_size(stage) for stage in stages(require_store(root)))


def _alone(root: Path) -> AbstractContextManager[None]:
    return locked(root / _LOCK, busy=f"a build is using the store `{root}`")


def _remove_damaged(root: Path, names: set[str]) -> None:
    for stage in stages(root):
        if names & {record.path for record in stage.files}:
            (root / STAGES / f"{stage.key}.json").unlink(missing_ok=True)
    for name in names:
        (root / name).unlink(missing_ok=True)


def _users(root: Path) -> dict[str, list[str]]:
    """Path of a file in the store to the bundles that use it."""
    users: dict[str, list[str]] = {}
    for folder, manifest in _bundles(root).values():
        for record in manifest.files:
            if record.in_store:
                users.setdefault(record.path, []).append(str(folder))
    return users


def _bundles(root: Path) -> dict[str, tuple[Path, Manifest]]:
    """Digest of each registered bundle that is where it was built, to its folder and manifest."""
    found = {}
    for path in sorted((root / STORE_BUNDLES).glob("*.json")):
        try:
            folder = Path(json.loads(path.read_bytes())["path"])
            data = (folder / MANIFEST_NAME).read_bytes()
            if bundle_digest(data) == path.stem:
                found[path.stem] = (folder, manifest_from_bytes(data))
        except (OSError, ValueError, KeyError, TypeError, L2PError):
            continue
    return found


def _dead_registrations(root: Path) -> list[Path]:
    alive = _bundles(root).keys()
    return [path for path in (root / STORE_BUNDLES).glob("*.json") if path.stem not in alive]


def _unreadable(root: Path) -> list[Path]:
    readable = {f"{stage.key}.json" for stage in stages(root)}
    return [path for path in (root / STAGES).glob("*") if path.name not in readable]


def _files(root: Path) -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (root / folder).glob("*"))


def _size(stage: Stage) -> int:
    return sum(record.size_bytes for record in stage.files)
