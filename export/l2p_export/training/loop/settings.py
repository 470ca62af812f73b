"""Settings file of a working folder, so that a run resumes only with equal settings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from l2p_runtime.errors import ArtifactError, HostError, UsageError
from l2p_runtime.files import write_json


def require_settings(folder: Path, settings: Mapping[str, object], name: str = "settings.json") -> None:
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
    return "not set" if value is None else repr(value)
