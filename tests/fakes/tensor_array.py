"""A tensor in memory, as the merge of LoRAs reads it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class TensorArray:
    """Float32 values; implements `l2p_export.tensors.TensorSource`."""

    values: NDArray[np.float32]
    dtype: str = "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def chunks(self, chunk_bytes: int = 0) -> Iterator[NDArray[np.float32]]:
        yield self.values.reshape(-1)
