"""Checkpoints as published or trained: opened, and described under their published names."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from l2p_export.metadata import is_trained, licence
from l2p_export.tensors import TensorSource, weights_digest
from l2p_runtime.contract import CheckpointRecord
from l2p_runtime.errors import ArtifactError
from l2p_runtime.tensorfile import TensorFile, open_tensorfile

if TYPE_CHECKING:
    from l2p_export.families import LoadedModel

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")

_PICKLE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")


@dataclass(frozen=True, slots=True)
class Spelling:
    """How a file names its tensors: key prefix, and whether q, k and v are one matrix."""

    prefix: str
    fused: bool


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint under published names."""

    path: Path
    spelling: Spelling
    tensors: Mapping[str, TensorSource]
    metadata: Mapping[str, str]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Published name to shape."""
        return {name: source.shape for name, source in self.tensors.items()}

    @property
    def parameters(self) -> int:
        """Number of values in all tensors."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def open_weights(path: Path) -> TensorFile:
    """Open the one safetensors file that `path` names, or the only one in the folder that it names.

    Raises:
        ArtifactError: absent, a pickle, a folder without exactly one file, or a header that fails the checks.
    """
    if path.suffix.lower() in _PICKLE_SUFFIXES:
        raise ArtifactError(
            f"`{path}` is a pickle by its name ({path.suffix}), which can run code when opened and is refused",
            hint="convert it to .safetensors where you trust it: torch.load(..., weights_only=True), "
            "then safetensors.torch.save_file",
        )
    if not _exists(path):
        raise ArtifactError(f"there is no checkpoint `{path}`", hint="give a .safetensors file")
    if path.is_dir():
        found = sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            names = ", ".join(file.name for file in found[:4]) or "none"
            raise ArtifactError(
                f"the folder `{path}` holds {len(found)} .safetensors files ({names}), expected one",
                hint="give the .safetensors file itself",
            )
        path = found[0]
    return open_tensorfile(path)


def require_float(file: TensorFile) -> None:
    """Refuse integer and quantized weights.

    Raises:
        ArtifactError: names every tensor that is not a float.
    """
    wrong = [f"`{info.name}` ({info.dtype})" for info in file.tensors.values() if info.dtype not in FLOAT_DTYPES]
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise ArtifactError(
            f"`{file.path}` stores weights that are not floats: {', '.join(wrong[:8])}{more}",
            hint=f"expected {', '.join(FLOAT_DTYPES)}; quantized repacks are not read, fetch the original file",
        )


def fingerprint(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """MD5 over tensor names and shapes, which identifies a published architecture (l2p.md 2.3).

    For every tensor the name and `name:d0_d1_...`; all sorted and joined by commas. Blind to values and dtypes.
    """
    texts = [text for name, shape in shapes.items() for text in (name, f"{name}:{'_'.join(map(str, shape))}")]
    return hashlib.md5(",".join(sorted(texts)).encode(), usedforsecurity=False).hexdigest()


def checkpoint_record(loaded: LoadedModel) -> CheckpointRecord:
    """Describe a checkpoint for the manifest; reads the trunk's values for their digest."""
    checkpoint, mark = loaded.checkpoint, fingerprint(loaded.checkpoint.shapes)
    first, stop = loaded.model.spec.trunk_layers
    trunk = tuple(f"layers.{index}." for index in range(first, stop))
    return CheckpointRecord(
        # A file name is bytes; what is no UTF-8 in it cannot be written into the manifest.
        name=checkpoint.path.name.encode(errors="replace").decode(),
        fingerprint=mark,
        known_as=loaded.family.known_as(mark),
        tensors=len(checkpoint.tensors),
        parameters=checkpoint.parameters,
        trunk_sha256=weights_digest(
            checkpoint.tensors, (name for name in checkpoint.tensors if name.startswith(trunk))
        ),
        trained=is_trained(checkpoint.metadata),
        licence=licence(checkpoint.metadata),
    )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long, a folder that may not be entered
        return False
