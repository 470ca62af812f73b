"""An opened LoRA: the published weights that it changes, and the change of each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from l2p_export.tensors.sources import FileTensor
from l2p_runtime.errors import UsageError

_FORM = "write FILE:STRENGTH, as style.safetensors:0.8; FILE alone is strength 1"


@dataclass(frozen=True, slots=True)
class LoraRequest:
    """A LoRA as the command line names it: file or folder, and strength."""

    path: Path
    strength: float = 1.0


@dataclass(frozen=True, slots=True)
class Delta:
    """The change that one LoRA adds to one weight [out, in...] at strength 1: scale * up @ down.

    Attributes:
        down: [r, in...], of any float dtype.
        up: [out, r, ...]; rows of a larger matrix when the LoRA holds q, k and v as one.
        scale: alpha / r; 1 when the file states no alpha.
    """

    down: FileTensor
    up: FileTensor
    scale: float

    @property
    def rank(self) -> int:
        """r, the width between the two matrices."""
        return self.down.shape[0]


@dataclass(frozen=True, slots=True)
class Lora:
    """An opened LoRA: published weight name, as `layers.12.attention.to_q.weight`, to its change."""

    path: Path
    strength: float
    deltas: Mapping[str, Delta]

    def weight(self, name: str) -> float:
        """The factor of `up @ down` for a published weight; 0 where this LoRA changes nothing."""
        delta = self.deltas.get(name)
        return 0.0 if delta is None else self.strength * delta.scale


def parse_lora(text: str) -> LoraRequest:
    """Parse `FILE:STRENGTH`. Text after the last colon is the strength if it is a number, else part of the file name.

    Raises:
        UsageError: no file, nothing after the colon, or a strength that is NaN or Inf.
    """
    path, colon, tail = text.rpartition(":")
    strength = _number(tail) if colon else None
    if strength is None:
        path, strength = text, 1.0
    if not path or path.endswith(":"):
        raise UsageError(f"the LoRA `{text}` lacks its file or its strength", hint=_FORM)
    if not math.isfinite(strength):
        raise UsageError(f"the LoRA `{path}` has strength {tail}, expected a finite number", hint=_FORM)
    return LoraRequest(Path(path), strength)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
