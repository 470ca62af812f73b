"""Adds LoRAs to the weights that they change, while the weights are streamed.

A sum is formed in float64 and rounded to float32 once. In float32 its last bit would depend on the order in which the
BLAS adds. Of billions of weights some would then round to another BF16 value, and the same LoRA on the same checkpoint
would make another trunk on another machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from l2p_export.checkpoint.lora.model import Delta, Lora
from l2p_export.tensors.sources import CHUNK_BYTES, TensorSource, read_tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BLOCK_VALUES = 1 << 20
"""Weights summed at a time, in whole rows: 8 MiB of float64. Fixed, so that results do not depend on `chunk_bytes`."""


def merge_loras(tensors: Mapping[str, TensorSource], loras: Sequence[Lora]) -> dict[str, TensorSource]:
    """Add LoRAs to the weights that they change; every other tensor stays the same object.

    Args:
        tensors: published name to tensor, of the shapes that the LoRAs were opened for.
        loras: any number; all that change one weight are summed.

    Returns:
        Published name to tensor; changed ones are `MergedTensor`.
    """
    merged = dict(tensors)
    for name in dict.fromkeys(name for lora in loras for name in lora.deltas):
        parts = tuple((lora.weight(name), lora.deltas[name]) for lora in loras if lora.weight(name))
        if parts:
            merged[name] = MergedTensor(tensors[name], parts)
    return merged


def trunk_layers_touched(loras: Sequence[Lora], trunk: Iterable[str]) -> tuple[str, ...]:
    """Published names of the frozen layers that LoRAs change, as `layers.12.attention.to_q`, in the model's order.

    Args:
        loras: as for `merge_loras`; strength 0 touches nothing.
        trunk: names of the frozen tensors: the keys of `network_shapes("trunk")`.
    """
    found = {name for lora in loras for name in lora.deltas if lora.weight(name)}
    return tuple(name.removesuffix(".weight") for name in trunk if name in found)


@dataclass(frozen=True, slots=True)
class MergedTensor:
    """A weight [out, in...] with LoRAs added; implements `l2p_export.tensors.TensorSource`.

    Attributes:
        base: the weight in the checkpoint.
        parts: the changes that are added, each with its factor strength * alpha / r.
    """

    base: TensorSource
    parts: tuple[tuple[float, Delta], ...]

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

        Holds the LoRA's matrices of this one layer, a block of rows, and one chunk of the base.
        """
        import numpy as np

        row_values = int(np.prod(self.shape[1:]))
        rows = max(1, BLOCK_VALUES // max(row_values, 1))
        factors = [_factors(weight, delta) for weight, delta in self.parts]
        step = max(1, chunk_bytes // 4)
        pieces = _pieces(self.base.chunks(chunk_bytes), rows * row_values)
        for start, piece in zip(range(0, self.shape[0], rows), pieces, strict=True):
            total = piece.astype(np.float64).reshape(-1, row_values)
            for up, down in factors:
                total += up[start : start + rows] @ down
            # Values beyond float32 become Inf, which `write_weights` refuses with the tensor's name.
            with np.errstate(over="ignore"):
                merged = total.astype(np.float32).reshape(-1)
            for begin in range(0, merged.size, step):
                yield merged[begin : begin + step]


def _factors(weight: float, delta: Delta) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weight * up [out, r] and down [r, in], in float64."""
    import numpy as np

    up = read_tensor(delta.up).reshape(-1, delta.rank).astype(np.float64)
    return weight * up, read_tensor(delta.down).reshape(delta.rank, -1).astype(np.float64)


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
