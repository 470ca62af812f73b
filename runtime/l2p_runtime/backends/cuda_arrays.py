"""Arrays in device memory: views by basic indexing as in NumPy, and copies between views."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from l2p_runtime.errors import InternalError


@dataclass(frozen=True, slots=True, eq=False)
class CudaArray:
    """Values in device memory; `CudaDevice` makes them, slicing makes views. Implements `Array`.

    Attributes:
        shape: sizes of the axes.
        dtype: of the values.
        strides: bytes from one index of an axis to the next, never negative.
        address: where the first value is, on the device.
        memory: keeps the allocation alive; it goes back when the last view of it does.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    strides: tuple[int, ...]
    address: int
    memory: object

    @property
    def ndim(self) -> int:
        """How many axes."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes the values take, without what lies between them."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def is_contiguous(self) -> bool:
        """Whether the values lie one behind the other in C order."""
        wanted = contiguous_strides(self.shape, self.dtype.itemsize)
        axes = zip(self.shape, self.strides, wanted, strict=True)
        return 0 in self.shape or all(size == 1 or found == stride for size, found, stride in axes)

    def __getitem__(self, index: Any, /) -> CudaArray:
        """A view by integers, slices of positive step and one Ellipsis; no copy. All integers give shape ().

        Raises:
            IndexError: an integer out of range, or more indices than axes.
            InternalError: any other index, which would need a copy.
        """
        shape, strides, address = [], [], self.address
        for axis, entry in enumerate(self._expanded(index)):
            size, stride = self.shape[axis], self.strides[axis]
            if isinstance(entry, slice):
                start, stop, step = entry.indices(size)
                if step < 1:
                    raise InternalError(f"a device array is sliced by step {step}, wanted 1 or more")
                length = len(range(start, stop, step))
                # An empty slice may start behind the end; its address stays inside.
                address += start * stride if length else 0
                shape.append(length)
                strides.append(stride * step)
            else:
                position = _integer(entry)
                if not -size <= position < size:
                    raise IndexError(f"index {position} is out of range for axis {axis} of size {size}")
                address += (position + size if position < 0 else position) * stride
        return CudaArray(tuple(shape), self.dtype, tuple(strides), address, self.memory)

    def reshape(self, shape: tuple[int, ...], /) -> CudaArray:
        """The same values under another shape; of contiguous arrays only.

        Raises:
            InternalError: not contiguous, or another number of values.
        """
        if not self.is_contiguous:
            raise InternalError(f"a view of shape {list(self.shape)} that is not contiguous cannot be reshaped")
        if min(shape, default=0) < 0 or math.prod(shape) != math.prod(self.shape):
            raise InternalError(f"an array of shape {list(self.shape)} cannot take the shape {list(shape)}")
        return contiguous_array(shape, self.dtype, self.address, self.memory)

    def _expanded(self, index: Any) -> list[Any]:
        """One entry per axis."""
        entries = list(index) if isinstance(index, tuple) else [index]
        dots = [place for place, entry in enumerate(entries) if entry is Ellipsis]
        missing = self.ndim - (len(entries) - len(dots))
        if missing < 0:
            raise IndexError(f"{len(entries) - len(dots)} indices for an array of {self.ndim} axes")
        if len(dots) > 1:
            raise InternalError("a device array is indexed with more than one Ellipsis")
        place = dots[0] if dots else len(entries)
        return entries[:place] + [slice(None)] * missing + entries[place + 1 :]


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """Equal runs of bytes at equal distances: what one two-dimensional copy of the driver does.

    Attributes:
        target: address of the first run.
        source: address of the first run.
        width_bytes: bytes of a run.
        height: how many runs.
        target_pitch: bytes from one run to the next; not less than the width, and 0 stands for one run.
        source_pitch: likewise.
    """

    target: int
    source: int
    width_bytes: int
    height: int
    target_pitch: int
    source_pitch: int


def contiguous_array(shape: tuple[int, ...], dtype: np.dtype[Any], address: int, memory: object) -> CudaArray:
    """Values one behind the other from an address on."""
    shape = tuple(map(operator.index, shape))
    return CudaArray(shape, dtype, contiguous_strides(shape, dtype.itemsize), address, memory)


def contiguous_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Bytes from one index to the next of each axis, in C order."""
    behind = itertools.accumulate((max(size, 1) for size in reversed(shape[1:])), operator.mul, initial=itemsize)
    return tuple(behind)[::-1] if shape else ()


def block_copies(target: CudaArray, source: CudaArray, max_pitch: int) -> Iterator[BlockCopy]:
    """Cut a copy between equally shaped views into as few block copies as their strides allow.

    Args:
        target: where values go; it must not overlap with `source`.
        source: where values are, of the same shape and dtype.
        max_pitch: the longest distance of runs that a block copy may have.
    """
    if 0 in target.shape:
        return
    width = target.dtype.itemsize
    axes = merged_axes(target.shape, (target.strides, source.strides))
    if axes and axes[-1][1] == (width, width):
        width *= axes.pop()[0]
    height: int = 1
    pitches: tuple[int, ...] = (0, 0)
    if axes and max(axes[-1][1]) <= max_pitch:
        height, pitches = axes.pop()
    for indices in itertools.product(*(range(size) for size, _ in axes)):
        to, from_ = (
            sum(index * strides[side] for index, (_, strides) in zip(indices, axes, strict=True)) for side in (0, 1)
        )
        yield BlockCopy(target.address + to, source.address + from_, width, height, pitches[0], pitches[1])


def merged_axes(shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...]) -> list[tuple[int, tuple[int, ...]]]:
    """Sizes and strides of the fewest axes that several views of one shape can be walked by, in C order.

    Args:
        shape: of all the views; no size is 0.
        strides: of each view.

    Returns:
        Size of each axis, none of them 1, and its stride in each of the views.
    """
    axes: list[tuple[int, tuple[int, ...]]] = []
    for size, steps in zip(shape, zip(*strides, strict=True), strict=True):
        if size == 1:
            continue
        if axes and all(outer == size * inner for outer, inner in zip(axes[-1][1], steps, strict=True)):
            axes[-1] = (axes[-1][0] * size, steps)
        else:
            axes.append((size, steps))
    return axes


def _integer(entry: Any) -> int:
    """An index as a Python int; a bool or an array would mean something else in NumPy."""
    try:
        if not isinstance(entry, bool | np.bool_ | np.ndarray):
            return operator.index(entry)
    except TypeError:
        pass
    raise InternalError(f"a device array is indexed with {entry!r}, wanted integers, slices or an Ellipsis")
