"""The changes that methods make to a layer's weight, computed in float64 and some rows at a time.

A weight [out, in...] counts as a matrix of `out` rows, its kernel within the columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from l2p_export.tensors.sources import FileTensor, read_tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Rows = Callable[[int, int], NDArray[np.float64]]


class Change(Protocol):
    """The change of a whole layer, before its scale; q, k and v may be one layer."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""

    def load(self) -> Rows:
        """Read the factors; returns a function of a first row and a number of rows."""


@dataclass(frozen=True, slots=True)
class Full:
    """The values themselves, [out, in...]; a vector [out] has one column."""

    values: FileTensor
    shape: tuple[int, int]

    def load(self) -> Rows:
        """Read the values."""
        values = _matrix(self.values, *self.shape)
        return lambda first, count: values[first : first + count]


@dataclass(frozen=True, slots=True)
class Summed:
    """Two changes of one weight, each with its scale and its first row in the layer that states it."""

    one: Change
    one_scale: float
    one_row: int
    other: Change
    other_scale: float
    other_row: int
    shape: tuple[int, int]

    def load(self) -> Rows:
        """Read the factors of both."""
        one, other = self.one.load(), self.other.load()
        return lambda first, count: (
            self.one_scale * one(self.one_row + first, count) + self.other_scale * other(self.other_row + first, count)
        )


@dataclass(frozen=True, slots=True)
class Product:
    """`up @ down`: a LoRA, and half of a LoHa or LoKr.

    Attributes:
        up: [out, r, ...]; [r, out] where `turned`.
        down: [r, in...], or [r, in] beside a core.
        core: [r, r, kernel...] of a Tucker decomposition.
        turned: whether `up` is stored the other way round.
    """

    up: FileTensor
    down: FileTensor
    core: FileTensor | None = None
    turned: bool = False

    @property
    def rank(self) -> int:
        """r, the width between the matrices."""
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        kernel = 1 if self.core is None else math.prod(self.core.shape[2:])
        return self.up.shape[1 if self.turned else 0], math.prod(self.down.shape[1:]) * kernel

    def load(self) -> Rows:
        """Read the factors, and multiply a core into `down`."""
        import numpy as np

        down = _matrix(self.down, self.rank, -1)
        if self.core is not None:
            core = _matrix(self.core, self.rank, -1).reshape(self.rank, self.rank, -1)
            # [r, r, kernel] and [r, in] to [r, in, kernel].
            down = np.einsum("ijk,jn->ink", core, down).reshape(self.rank, -1)
        up = _matrix(self.up, self.up.shape[0], -1)
        if self.turned:
            up = up.T
        return lambda first, count: up[first : first + count] @ down


@dataclass(frozen=True, slots=True)
class Hadamard:
    """The product of two products, element by element: a LoHa."""

    left: Product
    right: Product

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.left.shape

    def load(self) -> Rows:
        """Read the factors."""
        left, right = self.left.load(), self.right.load()
        return lambda first, count: left(first, count) * right(first, count)


@dataclass(frozen=True, slots=True)
class Kronecker:
    """The Kronecker product of two matrices: a LoKr. A kernel belongs to the right one."""

    left: Full | Product
    right: Full | Product

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        (rows, columns), (more_rows, more_columns) = self.left.shape, self.right.shape
        return rows * more_rows, columns * more_columns

    def load(self) -> Rows:
        """Read the factors."""
        import numpy as np

        left = self.left.load()(0, self.left.shape[0])
        right = self.right.load()(0, self.right.shape[0])

        def rows(first: int, count: int) -> NDArray[np.float64]:
            which = np.arange(first, first + count)
            outer = left[which // len(right), :, None] * right[which % len(right), None, :]
            product: NDArray[np.float64] = outer.reshape(count, -1)
            return product

        return rows


def _matrix(tensor: FileTensor, rows: int, columns: int) -> NDArray[np.float64]:
    import numpy as np

    matrix: NDArray[np.float64] = read_tensor(tensor).astype(np.float64).reshape(rows, columns)
    return matrix
