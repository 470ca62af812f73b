"""Inputs and outputs of networks: the specs that export, profiles, bundle and runtime share."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from l2p_runtime.errors import InternalError, UsageError

Dim: TypeAlias = int | str
"""A size: a number, a symbol `B`, or a multiple of a symbol `64*h`."""

DType = Literal["float32", "float16", "uint8", "uint16", "int64", "bool"]

_SYMBOLIC = re.compile(r"(?:([1-9][0-9]*)\*)?([A-Za-z][A-Za-z0-9_]*)")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, dtype and symbolic shape of one tensor."""

    name: str
    dtype: DType
    shape: tuple[Dim, ...]

    def __post_init__(self) -> None:
        for dim in self.shape:
            split_dim(dim)

    def resolve(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The concrete shape once every symbol has a value."""
        return tuple(factor * (sizes[symbol] if symbol else 1) for factor, symbol in map(split_dim, self.shape))

    def bind(self, shape: tuple[int, ...], sizes: dict[str, int]) -> None:
        """Check a concrete shape and add the values of its symbols to `sizes`.

        Raises:
            UsageError: wrong rank, a fixed size that differs, a size that does not divide, or two values for a symbol.
        """
        if len(shape) != len(self.shape):
            raise UsageError(f"`{self.name}` has shape {list(shape)}, expected {self.describe()}")
        for found, dim in zip(shape, self.shape, strict=True):
            factor, symbol = split_dim(dim)
            value = found // factor
            if found % factor or (not symbol and value != 1) or (symbol and sizes.setdefault(symbol, value) != value):
                known = ", ".join(f"{name}={size}" for name, size in sizes.items())
                raise UsageError(f"`{self.name}` has shape {list(shape)}, expected {self.describe()} with {known}")

    def describe(self) -> str:
        """The shape as people write it: `[B, 3, 64*h, 64*w]`."""
        return f"[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True)
class NetworkSpec:
    """One exportable part with its inputs and outputs (docs/design.md, "Networks")."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def sizes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """The value of every symbol, from the shapes of all inputs.

        Raises:
            UsageError: a shape does not fit its spec or the other shapes.
            InternalError: an input is absent or unknown.
        """
        names = {spec.name for spec in self.inputs}
        if shapes.keys() != names:
            raise InternalError(f"network `{self.name}` takes {sorted(names)}, was given {sorted(shapes)}")
        sizes: dict[str, int] = {}
        for spec in self.inputs:
            spec.bind(shapes[spec.name], sizes)
        return sizes

    def symbols(self) -> tuple[str, ...]:
        """Every symbol of the inputs, in order of appearance."""
        found = (split_dim(dim)[1] for spec in self.inputs for dim in spec.shape)
        return tuple(dict.fromkeys(symbol for symbol in found if symbol))


def split_dim(dim: Dim) -> tuple[int, str]:
    """Factor and symbol of a dimension: 3 is (3, ""), "B" is (1, "B"), "64*h" is (64, "h")."""
    if isinstance(dim, int):
        return dim, ""
    match = _SYMBOLIC.fullmatch(dim)
    if match is None:
        raise InternalError(f"dimension {dim!r} is neither a number, a symbol nor `number*symbol`")
    return int(match[1] or 1), match[2]
