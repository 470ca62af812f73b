"""Checks a model repository without a server, for what a server would refuse, hang on or ignore silently.

The protobuf parser finds unknown fields and wrong types. It does not find dims of 0, names that differ from folders,
missing files (a Python model without `model.py` makes the server hang for ever), warm-ups that are skipped, or tensors
that are not the bundle's. `tests/contract/test_triton_lint.py` holds every rule against a server.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from l2p_export.serving.configs import TENSOR_TYPES, require_client
from l2p_export.serving.lint_l2p import check_image_model, check_network
from l2p_export.serving.lint_model import Fault, Model, backend_of, check_files, check_versions
from l2p_export.serving.lint_settings import (
    check_backend,
    check_batching,
    check_instances,
    check_parameters,
    check_tensors,
    check_warm_up,
)
from l2p_export.serving.repository import CONFIG
from l2p_runtime.errors import UsageError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_CONFIG_BYTES_MAX = 4 << 20


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault: the model, the place in it, and what is wrong."""

    model: str
    place: str
    text: str


def lint_repository(root: Path) -> list[Finding]:
    """Everything wrong with a model repository; empty if a server can start on it.

    Raises:
        UsageError: no folder, or one without models.
        HostError: tritonclient is not installed.
    """
    require_client()
    if not root.is_dir():
        raise UsageError(f"`{root}` is not a folder")
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir())
    if not folders:
        raise UsageError(f"`{root}` holds no model", hint="write one with `l2p-export triton BUNDLE --out REPO`")
    return [Finding(folder.name, place, text) for folder in folders for place, text in _lint_model(folder)]


def _lint_model(folder: Path) -> Iterator[Fault]:
    path = folder / CONFIG
    if not path.is_file():
        yield CONFIG, "is missing; the server cannot load the model with --disable-auto-complete-config"
        return
    from google.protobuf import text_format

    try:
        if path.stat().st_size > _CONFIG_BYTES_MAX:
            yield CONFIG, f"has {path.stat().st_size:,} bytes, expected up to {_CONFIG_BYTES_MAX:,}"
            return
        # Servers take any bytes in comments and strings.
        text = path.read_text(encoding="utf-8", errors="replace")
        config = text_format.Parse(text, require_client().ModelConfig())
    except text_format.ParseError as error:
        yield CONFIG, f"line {error}"
        return
    except (OSError, ValueError, RecursionError) as error:
        yield CONFIG, f"cannot be read: {error}"
        return
    model = Model(folder, config, backend_of(folder, config))
    for check in _CHECKS:
        yield from check(model)


def _check_names(model: Model) -> Iterator[Fault]:
    name = model.folder.name
    if model.config.name not in ("", name):
        yield "name", f"is `{model.config.name}`, the folder is `{name}`: the server will not find the model"
    if not _NAME.fullmatch(name):
        yield "name", "has characters that do not go into a URL"


_CHECKS: tuple[Callable[[Model], Iterator[Fault]], ...] = (
    _check_names,
    check_backend,
    check_tensors,
    check_versions,
    check_files,
    check_instances,
    check_batching,
    check_parameters,
    check_warm_up,
    check_image_model,
    check_network,
)

__all__ = ["TENSOR_TYPES", "Finding", "lint_repository"]
