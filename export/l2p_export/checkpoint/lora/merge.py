"""Adds LoRAs to the weights that they change, while the weights are streamed.

A sum is formed in float64 and rounded to float32 once. In float32 its last bit would depend on the order in which the
BLAS adds. Of billions of weights some would then round to another BF16 value, and the same LoRA on the same checkpoint
would make another trunk on another machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from l2p_export.checkpoint.lora.decomposed import input_norms, rescaled
from l2p_export.checkpoint.lora.model import Delta, Lora
from l2p_export.tensors.sources import CHUNK_BYTES, TensorSource

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Block = NDArray[np.float64]

BLOCK_VALUES = 1 << 20
"""Weights summed at a time, in whole rows: 8 MiB of float64. Fixed, so that results do not depend on `chunk_bytes`."""


def merge_loras(tensors: Mapping[str, TensorSource], loras: Sequence[Lora]) -> dict[str, TensorSource]:
    """Add LoRAs to the tensors that they change; every other tensor stays the same object.

    Args:
        tensors: published name to tensor, of the shapes that the LoRAs were opened for.
        loras: any number; all that change one weight are summed. Each starts from the weight as `tensors` has it.

    Returns:
        Published name to tensor; changed ones are `MergedTensor`.
    """
    merged = dict(tensors)
    for name in dict.fromkeys(name for lora in loras for name in lora.deltas):
        changing = [lora for lora in loras if lora.changes(name)]
        if changing:
            parts = tuple(_part(lora.deltas[name], lora.strength, tensors) for lora in changing)
            merged[name] = MergedTensor(tensors[name], parts)
    return merged


def trunk_layers_touched(loras: Sequence[Lora], trunk: Iterable[str]) -> tuple[str, ...]:
    """Published names of the frozen layers that LoRAs change, as `layers.12.attention.to_q`, in the model's order.

    Args:
        loras: as for `merge_loras`; strength 0 touches nothing.
        trunk: names of the frozen tensors: the keys of `network_shapes("trunk")`.
    """
    touched = (name.rpartition(".")[0] for name in trunk if any(lora.changes(name) for lora in loras))
    return tuple(dict.fromkeys(touched))


@dataclass(frozen=True, slots=True)
class Part:
    """What one LoRA adds to one tensor.

    Attributes:
        layer: the tensors of the whole layer in the checkpoint.
    """

    delta: Delta
    strength: float
    layer: tuple[TensorSource, ...]


@dataclass(frozen=True, slots=True)
class MergedTensor:
    """A tensor [out, in...] with LoRAs added; implements `l2p_export.tensors.TensorSource`.

    Attributes:
        base: the tensor in the checkpoint.
        parts: the changes that are added.
    """

    base: TensorSource
    parts: tuple[Part, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        return self.base.shape

    @property
    def dtype(self) -> str:
        """Sums are float32, whatever the base is stored in."""
        return "F32"

    def chunks(self, chunk_bytes: int = CHUNK_BYTES) -> Iterator[NDArray[np.float32]]:
        """The values as float32, flat and in order, in pieces of `chunk_bytes` at most.

        Holds the factors of this one layer, a few blocks of rows, and one chunk of the base.
        """
        import numpy as np

        step = max(1, chunk_bytes // 4)
        changes = [_change(part) for part in self.parts]
        for first, rows in _blocks(self.base, chunk_bytes):
            total = rows + sum(change(first, rows) for change in changes)
            # Values beyond float32 become Inf, which `write_weights` refuses with the tensor's name.
            with np.errstate(over="ignore"):
                merged = total.astype(np.float32).reshape(-1)
            for begin in range(0, merged.size, step):
                yield merged[begin : begin + step]


def _part(delta: Delta, strength: float, tensors: Mapping[str, TensorSource]) -> Part:
    return Part(delta, strength, tuple(tensors[name] for name in delta.layer))


def _change(part: Part) -> Callable[[int, Block], Block]:
    """What to add to some rows of a tensor, given the first row's number and the rows of the checkpoint."""
    delta = part.delta
    rows = delta.change.load()
    if delta.decomposition is None:
        weight = part.strength * delta.scale
        return lambda first, base: weight * rows(delta.first_row + first, len(base))

    def moved(first: int, base: Block, strength: float = 1.0) -> Block:
        return base + strength * delta.scale * rows(first, len(base))

    decomposition = delta.decomposition
    norms = None
    if decomposition.by_input:
        norms = input_norms(_layer_blocks(part.layer), moved, part.layer[0].shape)
    return rescaled(decomposition, moved, part.strength, delta.first_row, norms)


def _layer_blocks(layer: Sequence[TensorSource]) -> Iterator[tuple[int, Block]]:
    start = 0
    for tensor in layer:
        for first, rows in _blocks(tensor, CHUNK_BYTES):
            yield start + first, rows
        start += tensor.shape[0]


def _blocks(tensor: TensorSource, chunk_bytes: int) -> Iterator[tuple[int, Block]]:
    """A tensor in blocks of whole rows, as float64, each with the number of its first row."""
    import numpy as np

    columns = math.prod(tensor.shape[1:])
    rows = max(1, BLOCK_VALUES // max(columns, 1))
    pieces = _pieces(tensor.chunks(chunk_bytes), rows * columns)
    for first, piece in zip(range(0, tensor.shape[0], rows), pieces, strict=True):
        yield first, piece.astype(np.float64).reshape(-1, columns)


def _pieces(chunks: Iterator[NDArray[np.float32]], size: int) -> Iterator[NDArray[np.float32]]:
    """Cut a stream into pieces of `size` values; the last may be shorter."""
    import numpy as np

    piece = np.empty(size, np.float32)
    filled = 0
    for chunk in chunks:
        start = 0
        while start < chunk.size:
            count = min(size - filled, chunk.size - start)
            piece[filled : filled + count] = chunk[start : start + count]
            filled, start = filled + count, start + count
            if filled == size:
                yield piece
                piece, filled = np.empty(size, np.float32), 0
    if filled:
        yield piece[:filled]
