"""Tensors that are read in chunks: from a file, from rows of a fused tensor, or computed from other tensors.

Whatever the origin, code that writes or hashes a tensor sees float32 values in order, one chunk at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from l2p_export.tensors.values import Scales, as_float32, scaled
from l2p_runtime.tensorfile import TensorFile, TensorInfo

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CHUNK_BYTES = 16 << 20

_TILE = 256


class TensorSource(Protocol):
    """One tensor under its published name."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""

    @property
    def dtype(self) -> str:
        """The stored dtype, as safetensors spells it: `F32`, `BF16`."""

    def chunks(self, chunk_bytes: int = CHUNK_BYTES) -> Iterator[NDArray[np.float32]]:
        """The values as float32, flat and in order, in pieces of about `chunk_bytes` as stored."""


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A whole tensor of a file, or some of its rows when the file fuses several into one.

    Attributes:
        scale: multiplies the stored values: per tensor, or per row or block of the whole tensor.
    """

    file: TensorFile
    info: TensorInfo
    shape: tuple[int, ...]
    first_row: int = 0
    scale: Scales | None = None

    @property
    def dtype(self) -> str:
        """The stored dtype, as safetensors spells it."""
        return self.info.dtype

    def rows(self, first: int, count: int) -> FileTensor:
        """The rows `first` to `first + count - 1`, as a tensor of their own."""
        return replace(self, shape=(count, *self.shape[1:]), first_row=self.first_row + first)

    def chunks(self, chunk_bytes: int = CHUNK_BYTES) -> Iterator[NDArray[np.float32]]:
        """The values as float32, flat and in order."""
        stored = self.file.read(self.info.name)
        flat = stored[self.first_row : self.first_row + self.shape[0]].reshape(-1) if self.shape else stored.reshape(-1)
        step = max(1, chunk_bytes // max(flat.itemsize, 1))
        scales = None if self.scale is None else self.scale.read()
        if self.scale is None or scales is None or scales.size == 1:
            for start in range(0, flat.size, step):
                values = as_float32(flat[start : start + step], self.info.dtype)
                yield values if scales is None else values * scales[0]
            return
        columns = math.prod(self.shape[1:])
        rows = max(1, step // max(columns, 1))
        for first in range(0, self.shape[0], rows):
            count = min(rows, self.shape[0] - first)
            values = as_float32(flat[first * columns : (first + count) * columns], self.info.dtype)
            yield scaled(values.reshape(count, columns), scales, self.scale.block, self.first_row + first).reshape(-1)


@dataclass(frozen=True, slots=True)
class JoinedTensor:
    """Several tensors concatenated along the first axis, as the fused q, k, v of other spellings."""

    parts: tuple[TensorSource, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The rows of all parts, and the other axes of the first."""
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    @property
    def dtype(self) -> str:
        """The dtype of the parts; F32 if they differ."""
        dtypes = {part.dtype for part in self.parts}
        return dtypes.pop() if len(dtypes) == 1 else "F32"

    def chunks(self, chunk_bytes: int = CHUNK_BYTES) -> Iterator[NDArray[np.float32]]:
        """The values of the parts, one after the other."""
        for part in self.parts:
            yield from part.chunks(chunk_bytes)


@dataclass(frozen=True, slots=True)
class ScaledTensor:
    """A tensor times two to the power of `exponent`: exact in float32, except for results below 1e-38."""

    source: TensorSource
    exponent: int

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the source."""
        return self.source.shape

    @property
    def dtype(self) -> str:
        """That of the source."""
        return self.source.dtype

    def chunks(self, chunk_bytes: int = CHUNK_BYTES) -> Iterator[NDArray[np.float32]]:
        """The scaled values."""
        import numpy as np

        for chunk in self.source.chunks(chunk_bytes):
            yield chunk * np.float32(2.0**self.exponent)


@dataclass(frozen=True, slots=True)
class TransposedTensor:
    """A matrix [out,in] as ONNX graphs store it, [in,out]; whole in memory while it is read.

    ONNX multiplies by [in,out]. Weights that are stored that way need no transposition, which would cost the engine
    library a copy of them.
    """

    source: TensorSource

    @property
    def shape(self) -> tuple[int, ...]:
        """Columns and rows of the source."""
        return self.source.shape[::-1]

    @property
    def dtype(self) -> str:
        """That of the source."""
        return self.source.dtype

    def chunks(self, chunk_bytes: int = CHUNK_BYTES) -> Iterator[NDArray[np.float32]]:
        """The values as float32, flat and in the order of the transposed matrix."""
        import numpy as np

        values = read_tensor(self.source)
        rows, columns = values.shape
        band = max(_TILE, chunk_bytes // (4 * max(rows, 1)) // _TILE * _TILE)
        for first in range(0, columns, band):
            turned = np.empty((min(band, columns - first), rows), np.float32)
            # By tiles, which stay in the cache: twice as fast as one strided copy.
            for column in range(0, len(turned), _TILE):
                for row in range(0, rows, _TILE):
                    tile = values[row : row + _TILE, first + column : first + column + _TILE]
                    turned[column : column + _TILE, row : row + _TILE] = tile.T
            yield turned.reshape(-1)


@dataclass(frozen=True, slots=True)
class ArrayTensor:
    """A small tensor in memory, such as scales."""

    values: NDArray[np.float32]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the array."""
        return self.values.shape

    @property
    def dtype(self) -> str:
        """Always `F32`."""
        return "F32"

    def chunks(self, chunk_bytes: int = CHUNK_BYTES) -> Iterator[NDArray[np.float32]]:
        """The values, flat and in order."""
        del chunk_bytes
        yield self.values.reshape(-1)


@dataclass(frozen=True, slots=True)
class DividedTensor:
    """A matrix [out,in] divided per row, ready to be quantized to FP8."""

    source: TensorSource
    divisors: NDArray[np.float32]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the source."""
        return self.source.shape

    @property
    def dtype(self) -> str:
        """That of the source."""
        return self.source.dtype

    def chunks(self, chunk_bytes: int = CHUNK_BYTES) -> Iterator[NDArray[np.float32]]:
        """The divided values."""
        import numpy as np

        columns, start = math.prod(self.shape[1:]), 0
        for chunk in self.source.chunks(chunk_bytes):
            rows = np.arange(start, start + chunk.size) // columns
            yield chunk / self.divisors[rows]
            start += chunk.size


def read_tensor(source: TensorSource) -> NDArray[np.float32]:
    """The whole tensor as float32, in its own shape."""
    import numpy as np

    values = np.empty(source.shape, np.float32)
    flat, start = values.reshape(-1), 0
    for chunk in source.chunks():
        flat[start : start + chunk.size] = chunk
        start += chunk.size
    return values
