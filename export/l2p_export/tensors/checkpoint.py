"""Opened checkpoints, their tensors under published names, and the fingerprint of an architecture."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from l2p_export.tensors.sources import TensorSource


@dataclass(frozen=True, slots=True)
class Spelling:
    """How a file names its tensors: key prefix, and whether q, k and v are one matrix."""

    prefix: str
    fused: bool


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint under published names.

    Attributes:
        company: stored names of tensors that lie in its file and are no part of the model.
    """

    path: Path
    spelling: Spelling
    tensors: Mapping[str, TensorSource]
    metadata: Mapping[str, str]
    company: tuple[str, ...] = ()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Published name to shape."""
        return {name: source.shape for name, source in self.tensors.items()}

    @property
    def parameters(self) -> int:
        """Number of values in all tensors."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def fingerprint(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """MD5 over tensor names and shapes, which identifies a published architecture (docs/model.md, "Fingerprints").

    Each tensor adds its name and `name:d0_d1_...`; all texts are sorted and joined by commas. Values and dtypes do not
    count.

    Returns:
        32 hexadecimal digits.
    """
    texts = [text for name, shape in shapes.items() for text in (name, f"{name}:{'_'.join(map(str, shape))}")]
    return hashlib.md5(",".join(sorted(texts)).encode(), usedforsecurity=False).hexdigest()
