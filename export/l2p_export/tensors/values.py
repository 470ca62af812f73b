"""Stored values as float32: dtypes that NumPy lacks, and scales of quantized weights.

A scale multiplies the stored values of the whole weight, of a row, or of a block of rows and columns. The last block of
an axis may be partial. Sources: OCP Microscaling Formats v1.0 (E8M0; blocks of 32), cuBLAS documentation, "1D Block
Scaling Factors Layout" (the swizzled order).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from l2p_runtime.errors import ArtifactError
from l2p_runtime.tensorfile import TensorFile, TensorInfo

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FLOAT8 = {
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}
"""FP8 dtypes as safetensors and `ml_dtypes` spell them."""

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
"""Dtypes of weights that are read."""

MX_BLOCK = 32
"""Columns of a block in the MX formats."""

_BLOCK_MAX = 256
# cuBLAS stores the scales of 128 rows and 4 blocks together.
_TILE_ROWS, _TILE_BLOCKS = 128, 4


@dataclass(frozen=True, slots=True)
class Scales:
    """Scales of a weight, seen as a matrix [rows, columns], and where they are stored.

    Attributes:
        dtype: of the stored values; U8 holds the exponents of E8M0.
        grid: number of blocks along rows and columns.
        block: rows and columns of a block.
        swizzled: whether they are stored in the order of cuBLAS, padded to 128 rows and 4 blocks.
    """

    file: TensorFile
    info: TensorInfo
    grid: tuple[int, int]
    block: tuple[int, int]
    swizzled: bool = False

    @property
    def kind(self) -> str:
        """What has a scale of its own, as `tensor`, `row` or `128 x 128 block`."""
        if self.grid == (1, 1):
            return "tensor"
        if self.grid[1] == 1 and self.block[0] == 1:
            return "row"
        return f"{self.block[0]} x {self.block[1]} block"

    def read(self) -> NDArray[np.float32]:
        """The scales, [blocks of rows, blocks of columns].

        Raises:
            ArtifactError: a scale is zero, negative, NaN or infinite.
        """
        import numpy as np

        dtype = "F8_E8M0" if self.info.dtype == "U8" else self.info.dtype
        values = as_float32(self.file.read(self.info.name).reshape(-1), dtype)
        values = _unswizzled(values, self.grid) if self.swizzled else values.reshape(self.grid)
        wrong = ~(np.isfinite(values) & (values > 0))
        if wrong.any():
            raise ArtifactError(
                f"`{self.file.path}`: scale `{self.info.name}` holds {values[wrong][0]} ({int(wrong.sum())} of "
                f"{values.size} values are zero, negative, NaN or infinite), expected positive numbers",
                hint="the file is damaged, or the tool that quantized it failed: fetch it again, or another one",
            )
        return values


def scales_of(
    file: TensorFile, info: TensorInfo, weight: TensorInfo, *, swizzled: bool = False, parts: int = 1
) -> Scales | None:
    """Find out from shapes what each scale of a weight multiplies.

    Args:
        file: file of the scales.
        info: the scales.
        weight: the weight that they belong to.
        swizzled: whether E8M0 scales of a padded shape are in the order of cuBLAS, even if padding adds nothing.
        parts: number of weights that were joined along the rows; each may have one scale.

    Returns:
        None if the shape of the scales fits no block of a power of two up to 256 rows and columns.
    """
    rows, columns = weight.shape[0] if weight.shape else 1, math.prod(weight.shape[1:])
    grid = _grid(info.shape)
    if grid is None:
        return None
    blocks = -(-columns // MX_BLOCK)
    padded = (-(-rows // _TILE_ROWS) * _TILE_ROWS, -(-blocks // _TILE_BLOCKS) * _TILE_BLOCKS)
    if info.dtype in ("U8", "F8_E8M0") and grid == padded and (swizzled or grid != (rows, blocks)):
        return Scales(file, info, (rows, blocks), (1, MX_BLOCK), swizzled=True)
    if len(info.shape) == 1 and grid[0] not in (1, rows, parts):
        return None
    block = (_block(rows, grid[0], parts), _block(columns, grid[1]))
    return Scales(file, info, grid, block) if all(block) else None


def scaled(
    values: NDArray[np.float32], scales: NDArray[np.float32], block: tuple[int, int], first_row: int
) -> NDArray[np.float32]:
    """Values [rows, columns] times their scales; `first_row` is the row of the whole weight that they begin with."""
    import numpy as np

    factors = scales[np.arange(first_row, first_row + len(values)) // block[0]]
    if factors.shape[1] > 1:
        factors = np.repeat(factors, block[1], axis=1)[:, : values.shape[1]]
    # Values beyond float32 become Inf, which `write_weights` refuses with the tensor's name.
    with np.errstate(over="ignore"):
        return values * factors


def as_float32(values: NDArray[np.generic], dtype: str) -> NDArray[np.float32]:
    """Values as `TensorFile.read` returns them, as float32.

    Args:
        values: of any shape; BF16 and FP8 as bits.
        dtype: as safetensors spells it.
    """
    import numpy as np

    if dtype in FLOAT8:
        import ml_dtypes

        widened: NDArray[np.float32] = values.view(getattr(ml_dtypes, FLOAT8[dtype])).astype(np.float32)
        return widened
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    # Values beyond float32 become Inf, which `write_weights` refuses with the tensor's name.
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(np.float32)


def _grid(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Blocks of rows and columns; tools keep axes of size 1 to broadcast: [rows, blocks, 1], [rows, 1, blocks, 1]."""
    if len(shape) == 4 and shape[1] == shape[3] == 1:
        return shape[0], shape[2]
    if len(shape) == 3 and shape[2] == 1:
        return shape[0], shape[1]
    if len(shape) <= 2:
        rows, columns = (*shape, 1, 1)[:2]
        return rows, columns
    return None


def _block(size: int, count: int, parts: int = 1) -> int:
    """The block that cuts an axis into `count` blocks, or 0. For more than one block, at most one power of two does."""
    if count == 1:
        return max(size, 1)
    if count == parts and size % parts == 0:
        return size // parts
    powers = (1 << exponent for exponent in range(_BLOCK_MAX.bit_length()))
    return next((power for power in powers if -(-size // power) == count), 0)


def _unswizzled(values: NDArray[np.float32], grid: tuple[int, int]) -> NDArray[np.float32]:
    """Put scales in order of rows. A tile of 128 rows and 4 blocks is stored as [row % 32, row // 32, block]."""
    rows, blocks = grid
    tiles = (-(-rows // _TILE_ROWS), -(-blocks // _TILE_BLOCKS))
    stored = values.reshape(*tiles, 32, 4, _TILE_BLOCKS)
    ordered = stored.transpose(0, 3, 2, 1, 4).reshape(tiles[0] * _TILE_ROWS, tiles[1] * _TILE_BLOCKS)
    return ordered[:rows, :blocks]
