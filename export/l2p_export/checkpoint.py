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

if TYPE_CHECKING:
    from l2p_export.families import LoadedModel


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


def fingerprint(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """MD5 over tensor names and shapes, which identifies a published architecture (l2p.md 2.3).

    For every tensor the name and `name:d0_d1_...`; all sorted and joined by commas. Blind to values and dtypes.
    """
    texts = [text for name, shape in shapes.items() for text in (name, f"{name}:{'_'.join(map(str, shape))}")]
    return hashlib.md5(",".join(sorted(texts)).encode(), usedforsecurity=False).hexdigest()


def checkpoint_record(loaded: LoadedModel) -> CheckpointRecord:
    """Describe a checkpoint for the manifest; reads the trunk's values for their digest."""
    checkpoint, mark = loaded.checkpoint, fingerprint(loaded.checkpoint.shapes)
    return CheckpointRecord(
        name=_text(checkpoint.path.name),
        fingerprint=mark,
        known_as=loaded.family.known_as(mark),
        tensors=len(checkpoint.tensors),
        parameters=checkpoint.parameters,
        trunk_sha256=trunk_digest(loaded),
        trained=is_trained(checkpoint.metadata),
        licence=licence(checkpoint.metadata),
        source=_text(loaded.source.name) if loaded.source else "",
        loras=tuple(f"{_text(lora.path.name)}:{lora.strength:g}" for lora in loaded.loras),
    )


def trunk_digest(loaded: LoadedModel) -> str:
    """The digest that names a trunk (design section 5); reads the trunk's values.

    Raises:
        ArtifactError: the checkpoint says that it was trained on another trunk.
    """
    checkpoint = loaded.checkpoint
    trunk = tuple(f"layers.{index}." for index in range(*loaded.model.spec.trunk_layers))
    digest = weights_digest(checkpoint.tensors, (name for name in checkpoint.tensors if name.startswith(trunk)))
    stated = checkpoint.metadata.get("l2p.trunk_sha256", digest)
    # A LoRA may change the trunk, and a source may shorten it; then the statement is about another one.
    if stated != digest and not loaded.loras and loaded.model.spec == loaded.family.model(checkpoint.shapes).spec:
        raise ArtifactError(
            f"`{checkpoint.path}` belongs to trunk {stated[:16]}, the layers it was given make trunk {digest[:16]}",
            hint="give the source that the adapters were trained from",
        )
    return digest


def _text(name: str) -> str:
    """A file name is bytes; what is no UTF-8 in it cannot be written into the manifest."""
    return name.encode(errors="replace").decode()
