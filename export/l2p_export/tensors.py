"""Where the values of a tensor come from, without holding more than a piece of it.

A tensor may lie in a file as it is, be a part of a fused one, or be computed from several; whoever writes or hashes it
sees the same thing: float32 values in order, chunk by chunk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from l2p_runtime.tensorfile import TensorFile, TensorInfo

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CHUNK_BYTES = 16 << 20


class TensorSource(Protocol):
    """One tensor under its published name."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""

    @property
    def dtype(self) -> str:
        """How it is stored, as safetensors spells it: `F32`, `BF16`."""

    def chunks(self, chunk_bytes: int = CHUNK_BYTES) -> Iterator[NDArray[np.float32]]:
        """The values as float32, flat and in order, in pieces of about `chunk_bytes` as stored."""


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A whole tensor of a file, or some of its rows when the file fuses several into one."""

    file: TensorFile
    info: TensorInfo
    shape: tuple[int, ...]
    first_row: int = 0

    @property
    def dtype(self) -> str:
        """How it is stored."""
        return self.info.dtype

    def chunks(self, chunk_bytes: int = CHUNK_BYTES) -> Iterator[NDArray[np.float32]]:
        """The values as float32, flat and in order."""
        stored = self.file.read(self.info.name)
        flat = stored[self.first_row : self.first_row + self.shape[0]].reshape(-1) if self.shape else stored.reshape(-1)
        step = max(1, chunk_bytes // max(flat.itemsize, 1))
        for start in range(0, flat.size, step):
            yield _as_float32(flat[start : start + step], self.info.dtype)


def read_tensor(source: TensorSource) -> NDArray[np.float32]:
    """The whole tensor as float32."""
    import numpy as np

    values = np.empty(source.shape, np.float32)
    flat, start = values.reshape(-1), 0
    for chunk in source.chunks():
        flat[start : start + chunk.size] = chunk
        start += chunk.size
    return values


def weights_digest(tensors: Mapping[str, TensorSource], names: Iterable[str]) -> str:
    """SHA-256 over tensors in sorted order, values rounded to BF16, so that F32 and BF16 copies agree.

    Each tensor adds its name in UTF-8, a zero byte, and its values as little-endian BF16 (design section 5).
    """
    import ml_dtypes

    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(name.encode() + b"\0")
        for chunk in tensors[name].chunks():
            digest.update(chunk.astype(ml_dtypes.bfloat16).tobytes())
    return digest.hexdigest()


def _as_float32(values: NDArray[np.generic], dtype: str) -> NDArray[np.float32]:
    import numpy as np

    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    # What float32 cannot hold becomes Inf, which is refused by name where weights are written.
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(np.float32)
