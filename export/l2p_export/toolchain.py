"""Digest of the code and library versions that decide the result of a build; it is part of every stage's key."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path

from l2p_runtime import __version__

ROOMS = {
    "l2p_export": ("build", "checkpoint", "families", "graphs", "precision", "proof", "tensors"),
    "l2p_calib": ("fp8.py", "layout.py", "ledger.py", "plans", "prompts.py", "statistics"),
    "l2p_runtime": (
        *("arguments.py", "captions.py", "contract", "foreign.py", "noise.py", "onnx_library.py"),
        *("policies.py", "positions.py", "tensorfile.py", "text.py", "textfile.py"),
    ),
}
"""Package to the folders and files whose code decides a stage: ONNX graphs, plans, and the proof's inputs and results.

Other code changes no stage: command line, training, evaluation and serving only read what is built. The keys of stages
have the identities of backends and engine builders separately.
"""

TOOLS = ("torch", "onnx", "onnxscript", "onnx-ir", "numpy", "ml_dtypes")


def toolchain() -> dict[str, str]:
    """Library to version, of those that make ONNX graphs, and of l2p-export with the digest of the code of `ROOMS`."""
    versions = {name: _version(name) for name in TOOLS}
    return {"l2p-export": f"{__version__}+{_code_digest()}", **versions}


def code_files() -> Iterator[tuple[str, Path]]:
    """Every source file of `ROOMS`: its name, as `l2p_export/graphs/trace.py`, and its path."""
    for package, rooms in ROOMS.items():
        # Not `importlib.resources`: for an editable install it returns a multiplexed path, whose text is not a path.
        root = Path(str(importlib.import_module(package).__file__)).parent
        for room in rooms:
            place = root / room
            for path in sorted(place.rglob("*.py")) if place.is_dir() else (place,):
                yield f"{package}/{path.relative_to(root).as_posix()}", path


@functools.cache
def _code_digest() -> str:
    digest = hashlib.sha256()
    for name, path in code_files():
        digest.update(name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"
