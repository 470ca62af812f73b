"""Digest of the tools and code that decide a graph: other tools, other stages."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
from importlib import resources
from pathlib import Path

from l2p_runtime import __version__

# Code that no graph or digest depends on: a change in it makes nothing again.
_APART = ("cli", "training")


_TOOLS = ("torch", "onnx", "onnxscript", "onnx-ir", "numpy", "ml_dtypes")


def toolchain() -> dict[str, str]:
    """Versions of what makes graphs, and the digest of this package's own code: other tools, other stages."""
    versions = {name: _version(name) for name in _TOOLS}
    return {"l2p-export": f"{__version__}+{_code_digest()}", **versions}


@functools.cache
def _code_digest() -> str:
    digest = hashlib.sha256()
    for package in ("l2p_export", "l2p_calib"):
        root = Path(str(resources.files(package)))
        for path in sorted(root.rglob("*.py")):
            if path.relative_to(root).parts[0] in _APART:
                continue
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"
