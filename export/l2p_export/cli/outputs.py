"""Keeps what a command writes apart from what it reads, and clears what killed commands left of it."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from l2p_runtime.bundle import Bundle, open_bundle
from l2p_runtime.errors import HostError, UsageError
from l2p_runtime.files import partial_folder, sweep_partials

_ENTRIES_MAX = 1_000_000
"""Entries of an input folder that are looked at; more is no checkpoint, and a walk of a whole disk would not end."""

Identity = tuple[int, int]
"""Device and inode: links, hard links, mounts and spellings of one file have the same."""


def require_apart(
    outputs: Mapping[str, Path | None], inputs: Mapping[str, Path | Sequence[Path | str] | str | None]
) -> None:
    """Refuse an output that is, contains or lies within something that is read, or that is another output.

    Args:
        outputs: option to the file or folder that it names, which need not exist.
        inputs: argument or option to the files and folders that it names; a folder stands for everything in it.

    Raises:
        UsageError: an output overlaps an input; nothing was written yet.
    """
    written = {option: path for option, path in outputs.items() if path is not None}
    for (option, path), (other, second) in itertools.combinations(written.items(), 2):
        if set(_forms(path)) & set(_forms(second)):
            raise UsageError(f"{option} and {other} are both `{path}`", hint=f"choose another {other}")
    for name, paths in inputs.items():
        for read in (paths,) if isinstance(paths, str | Path) else paths or ():
            place = _place(Path(read))
            for option, path in written.items():
                if overlap := _overlap(path, place):
                    raise UsageError(
                        f"{option} `{path}` {overlap} `{read}` ({name}), which is read", hint=f"choose another {option}"
                    )


def require_file_name(out: Path, *, makes_folder: bool = False) -> None:
    """Refuse an `--out` that is a folder, or is in one that is not there and will not be made.

    Raises:
        UsageError: it is.
    """
    if out.is_dir():
        raise UsageError(f"--out `{out}` is a folder, expected a file name")
    if not out.parent.is_dir() and not makes_folder:
        raise UsageError(
            f"the folder `{out.parent}` does not exist", hint=f"mkdir -p {out.parent}, or generate --make-folder"
        )


def require_writable(outputs: Mapping[str, Path | None]) -> None:
    """Refuse outputs where nothing can be written; nothing stays there.

    Raises:
        HostError: the folder of an output, or the nearest one that exists, cannot be written.
    """
    for option, path in outputs.items():
        if path is None:
            continue
        folder = next(place for place in (path, *path.absolute().parents) if place.is_dir())
        try:
            with partial_folder(folder / "writable"):
                pass
        except OSError as error:
            raise HostError(
                f"cannot write `{path}`: {error.strerror or error}", hint=f"choose another {option}"
            ) from error


def open_bundle_apart(
    bundle: Path,
    store: Path | None,
    outputs: Mapping[str, Path | None],
    inputs: Mapping[str, Path | None] = MappingProxyType({}),
) -> Bundle:
    """Open a bundle that a command reads, after `require_apart` of it, of its store and of other inputs.

    Raises:
        UsageError: an output overlaps an input.
        ArtifactError: there is no bundle, or it is damaged.
        HostError: `store` is no store.
    """
    require_apart(outputs, {"BUNDLE": bundle, "--store": store} | dict(inputs))
    opened = open_bundle(bundle, store)
    require_apart(outputs, {"the bundle's store": opened.store})
    return opened


def clear_leftovers(*outputs: Path | None) -> None:
    """Remove temporary files that killed commands left beside outputs and within output folders."""
    for path in outputs:
        if path is None:
            continue
        for folder in (path.parent, *(Path(found) for found, _, _ in os.walk(path))):
            # What may not be read or removed here harms nobody.
            with suppress(OSError):
                sweep_partials(folder)


@dataclass(frozen=True, slots=True)
class _Place:
    """An input: itself, everything in it, and the folders that hold any of it."""

    itself: Identity | None
    own: frozenset[Identity]
    holders: frozenset[Identity]


def _overlap(path: Path, place: _Place) -> str:
    """How an output touches an input, in words; empty if it does not."""
    for form in _forms(path):
        found = _identity(form)
        if found is not None and found == place.itself:
            return "is"
        if found in place.own:
            return "is a part of"
        if found in place.holders:
            return "contains"
        if place.own.intersection(_parents(form)):
            return "lies within"
    return ""


def _place(path: Path) -> _Place:
    own: set[Identity] = set()
    holders: set[Identity] = set()
    for form in _forms(path):
        holders.update(_parents(form))
    for found, link in itertools.islice(_walk(path, set()), _ENTRIES_MAX):
        own.add(found)
        if link is not None:
            holders.update(_parents(os.path.realpath(link)))
    return _Place(_identity(path), frozenset(own), frozenset(holders - own))


def _walk(path: Path | str, seen: set[Identity]) -> Iterator[tuple[Identity, str | None]]:
    """A file, or a folder and all that is in it; each with its path if it is a link, which is followed."""
    found = _identity(path)
    if found is None or found in seen:
        return
    seen.add(found)
    yield found, None
    try:
        entries = list(os.scandir(path)) if Path(path).is_dir() else []
    except OSError:  # whoever reads the folder says so
        return
    for entry in entries:
        if entry.is_symlink():
            if (target := _identity(entry.path)) is not None:
                yield target, entry.path
        elif not entry.is_dir():
            yield (found[0], entry.inode()), None
            continue
        yield from _walk(entry.path, seen)


def _forms(path: Path) -> tuple[str, ...]:
    """A path with every link resolved, and with all but a last one: to write there replaces that link."""
    resolved = os.path.realpath(path)
    if path.name in ("", ".."):
        return (resolved,)
    return tuple({resolved, os.path.join(os.path.realpath(path.parent), path.name)})  # noqa: PTH118 - of strings


def _parents(path: str) -> Iterator[Identity]:
    return (found for parent in Path(path).parents if (found := _identity(parent)) is not None)


def _identity(path: Path | str) -> Identity | None:
    try:
        status = os.stat(path)  # noqa: PTH116 - of strings too
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino
