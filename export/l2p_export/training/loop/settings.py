"""Lock and settings file of a folder that a run writes: one run at a time, resumed only with equal settings."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from l2p_engines.store.locks import locked
from l2p_runtime.errors import ArtifactError, HostError, UsageError
from l2p_runtime.files import sweep_partials, write_json

LOCK_NAME, SETTINGS_NAME = ".writing.lock", "settings.json"

_DIGEST = re.compile(r"[0-9a-f]{64}")


@contextmanager
def locked_folder(folder: Path, busy: str = "") -> Iterator[None]:
    """Make a folder, hold its lock, and remove what a killed writer left in it.

    If it is used wrongly (UsageError), a folder that is made here and stays empty is removed.

    Args:
        folder: the folder.
        busy: what the error says if another process holds the lock.

    Raises:
        HostError: another process writes there, or the folder cannot be written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with ExitStack() as stack:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(folder / LOCK_NAME, busy=busy or f"another command is writing `{folder}`"))
                sweep_partials(folder)
            except OSError as error:
                raise HostError(
                    f"cannot write `{folder}`: {error.strerror or error}", hint="choose another folder"
                ) from error
            yield
    except UsageError:
        # The first that is not empty ends it.
        with suppress(OSError):
            for path in made:
                path.rmdir()
        raise


def digest(values: object) -> str:
    """Hex SHA-256 of JSON values, for settings that are too long to be written."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def require_settings(folder: Path, settings: Mapping[str, object], name: str = SETTINGS_NAME) -> None:
    """Write the settings of a new folder, or check that an existing folder has the same.

    Raises:
        UsageError: settings differ; names them.
        ArtifactError: the settings file is damaged.
        HostError: the folder cannot be written.
    """
    path = folder / name
    if not path.is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(path, settings, indent=1)
        except OSError as error:
            raise HostError(
                f"cannot write `{path}`: {error.strerror or error}", hint="choose another folder"
            ) from error
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"`{path}` is damaged: {error}", hint="choose another folder") from error
    wanted = json.loads(json.dumps(dict(settings)))
    differing = differing_settings(before, wanted)
    if differing:
        raise UsageError(
            f"`{folder}` was started with other settings: {'; '.join(differing)}",
            hint="give the settings that it began with, or another folder",
        )


def differing_settings(before: Mapping[str, object], wanted: Mapping[str, object]) -> Sequence[str]:
    """One line per setting that differs; nested settings are compared one by one."""
    before, wanted = _flat(before), _flat(wanted)
    return [
        f"{key} is {_shown(wanted.get(key))}, it began with {_shown(before.get(key))}"
        for key in sorted(before.keys() | wanted.keys())
        if before.get(key) != wanted.get(key)
    ]


def _flat(settings: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def _shown(value: object) -> str:
    if isinstance(value, str) and _DIGEST.fullmatch(value):
        return f"digest {value[:16]}"
    return "not set" if value is None else repr(value)
