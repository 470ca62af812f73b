"""Built-in profiles, one TOML file each, and the reader for a user's own."""

from __future__ import annotations

import tomllib
from importlib import resources
from pathlib import Path

from l2p_runtime.contract import Profile
from l2p_runtime.contract.codec import from_json
from l2p_runtime.errors import L2PError, UsageError
from l2p_runtime.textfile import read_text

PROFILE_BYTES_MAX = 1 << 20


def load_profile(name_or_path: str) -> Profile:
    """Read a built-in profile by name, or a profile file by path.

    Raises:
        UsageError: no such profile, not TOML, or values that make no profile.
    """
    if name_or_path in profile_names():
        text = resources.files(__name__).joinpath(f"{name_or_path}.toml").read_text(encoding="utf-8")
        return _parse(text, name_or_path)
    path = Path(name_or_path)
    if not _is_file(path):
        raise UsageError(
            f"there is no profile `{name_or_path}`",
            hint=f"built-in profiles: {', '.join(profile_names())}; or give the path of a .toml file",
        )
    try:
        text = read_text(path, PROFILE_BYTES_MAX)
    except OSError as error:
        raise UsageError(f"cannot read profile `{path}`: {error}") from error
    return _parse(text, str(path), default_name=path.stem)


def profile_names() -> tuple[str, ...]:
    """Names of the built-in profiles."""
    files = resources.files(__name__).iterdir()
    return tuple(sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml")))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long, a folder that may not be entered
        return False


def _parse(text: str, where: str, default_name: str = "") -> Profile:
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a number of 5000 digits, brackets 1000 deep
        raise UsageError(f"profile `{where}` is not TOML: {error}") from error
    if default_name:
        data = {"name": default_name, **data}
    try:
        return from_json(Profile, data)
    except L2PError as error:
        raise UsageError(f"profile `{where}`: {error}", hint=error.hint) from error
