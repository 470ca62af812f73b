"""An opened LoRA: the published tensors that it changes, and the change of each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from l2p_export.checkpoint.lora.changes import Change
from l2p_export.tensors.sources import FileTensor
from l2p_runtime.errors import UsageError

_FORM = "write FILE:STRENGTH, as style.safetensors:0.8; FILE alone is strength 1"

_BLOCK_ROWS = 256

# Factors in BF16 are off by 2^-9 each, and a tool that made one statement from the other rounded once more.
_TOLERANCE = 2.0**-7


@dataclass(frozen=True, slots=True)
class LoraRequest:
    """A LoRA as the command line names it.

    Attributes:
        path: file or folder.
        skip_text_encoder: whether to leave out what it changes in a text encoder, which otherwise is refused.
    """

    path: Path
    strength: float = 1.0
    skip_text_encoder: bool = False


@dataclass(frozen=True, slots=True)
class Decomposition:
    """The magnitudes of a DoRA: the changed weight is rescaled to them, row by row or input by input.

    Attributes:
        magnitudes: one for each row of the layer; one for each of its inputs where `by_input`.
        is_peft: strength acts as in PEFT, inside the norm; else as in LyCORIS, on the rescaling.
    """

    magnitudes: FileTensor
    by_input: bool
    is_peft: bool


@dataclass(frozen=True, slots=True)
class Delta:
    """The change that one LoRA makes to one tensor at strength 1.

    Attributes:
        change: of the whole layer.
        scale: multiplies the change: alpha / r; 1 when the file states no alpha.
        first_row: where this tensor begins in the layer, which q, k and v may share.
        layer: published names of the layer's tensors, in order.
        decomposition: present in a DoRA.
    """

    change: Change
    scale: float
    first_row: int = 0
    layer: tuple[str, ...] = ()
    decomposition: Decomposition | None = None

    def agrees(self, other: Delta, rows: int) -> bool:
        """Whether it makes the same change to a tensor of so many rows, to the rounding of BF16 factors.

        No two DoRAs agree.
        """
        import numpy as np

        if self.decomposition is not None or other.decomposition is not None:
            return False
        mine, others = self.change.load(), other.change.load()
        largest = difference = 0.0
        for first in range(0, rows, _BLOCK_ROWS):
            count = min(_BLOCK_ROWS, rows - first)
            left = self.scale * mine(self.first_row + first, count)
            right = other.scale * others(other.first_row + first, count)
            largest = max(largest, float(np.abs(left).max()), float(np.abs(right).max()))
            difference = max(difference, float(np.abs(left - right).max()))
        return difference <= _TOLERANCE * largest


@dataclass(frozen=True, slots=True)
class Lora:
    """An opened LoRA.

    Attributes:
        deltas: published name, as `layers.12.attention.to_q.weight`, to its change.
        notes: what a user should know of it, as sentences without a full stop.
    """

    path: Path
    strength: float
    deltas: Mapping[str, Delta]
    notes: tuple[str, ...] = ()

    def changes(self, name: str) -> bool:
        """Whether it changes a published tensor at all."""
        delta = self.deltas.get(name)
        # A DoRA rescales the weight even where its alpha is 0.
        return delta is not None and self.strength != 0 and (delta.scale != 0 or delta.decomposition is not None)


def parse_lora(text: str, *, skip_text_encoder: bool = False) -> LoraRequest:
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
    return LoraRequest(Path(path), strength, skip_text_encoder)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
