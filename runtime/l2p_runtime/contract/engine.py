"""Targets and optimization profiles of engines, as bundles store them.

The terms are those of docs/design.md, "Words" and "Profiles".
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from l2p_runtime.errors import UsageError

EngineBackend = Literal["rtx", "tensorrt"]
"""The library that builds and runs an engine: TensorRT for RTX, or TensorRT."""
ENGINE_BACKENDS: tuple[EngineBackend, ...] = get_args(EngineBackend)

LIBRARY_TITLES: Mapping[EngineBackend, str] = {"rtx": "TensorRT for RTX", "tensorrt": "TensorRT"}
"""Product names of the libraries, for messages."""

CAPABILITIES: Mapping[EngineBackend, tuple[str, ...]] = {
    "rtx": ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121"),
    "tensorrt": ("sm75", "sm80", "sm86", "sm89", "sm90", "sm100", "sm103", "sm110", "sm120", "sm121"),
}
"""Compute capabilities that a library builds for. RTX 1.7 has only these six; sm90 is missing."""

PORTABLE = "portable"
"""In place of a compute capability: an engine of `rtx` that leaves it unset runs on every GPU that it supports."""

_SPELLING = re.compile(r"(rtx|tensorrt)([0-9]{1,4}\.[0-9]{1,4})-(sm[0-9]{2,3}|portable)")
_VERSION = re.compile(r"[0-9]{1,4}\.[0-9]{1,4}")


@dataclass(frozen=True, slots=True)
class Target:
    """What an engine runs on.

    Attributes:
        library_version: the first two numbers of the library's version: engines of one do not run on another.
        compute_capability: `sm89`, or `portable`: every GPU that the library supports.
    """

    backend: EngineBackend
    library_version: str
    compute_capability: str

    def __post_init__(self) -> None:
        if not _VERSION.fullmatch(self.library_version):
            raise UsageError(f"library version {self.library_version[:40]!r} is refused, expected two numbers, as 1.7")
        require_capability(self.backend, self.compute_capability)

    @property
    def spelling(self) -> str:
        """`rtx1.7-sm89`."""
        return f"{self.backend}{self.library_version}-{self.compute_capability}"


@dataclass(frozen=True, slots=True)
class InputShapes:
    """Minimum, preferred and maximum shape of one input."""

    name: str
    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]

    def __post_init__(self) -> None:
        if not len(self.min) == len(self.opt) == len(self.max):
            raise UsageError(f"input `{self.name}` has shapes of different ranks")
        if not all(1 <= low <= mid <= high for low, mid, high in zip(self.min, self.opt, self.max, strict=True)):
            raise UsageError(
                f"input `{self.name}`: min {list(self.min)}, opt {list(self.opt)}, max {list(self.max)}; "
                "expected 1 <= min <= opt <= max"
            )

    def covers(self, shape: Sequence[int]) -> bool:
        """Whether a concrete shape lies within the range."""
        return len(shape) == len(self.min) and all(
            low <= size <= high for low, size, high in zip(self.min, shape, self.max, strict=True)
        )


@dataclass(frozen=True, slots=True)
class EngineProfile:
    """One optimization profile of one network's engine."""

    inputs: tuple[InputShapes, ...]

    def covers(self, shapes: Mapping[str, Sequence[int]]) -> bool:
        """Whether an engine can run these input shapes under this profile."""
        ranges = {shapes.name: shapes for shapes in self.inputs}
        return shapes.keys() == ranges.keys() and all(ranges[name].covers(shape) for name, shape in shapes.items())

    def largest(self, name: str) -> tuple[int, ...]:
        """The largest shape of one input."""
        return next(shapes.max for shapes in self.inputs if shapes.name == name)


def target_from_spelling(text: str) -> Target:
    """Read a target as bundles spell it, `rtx1.7-sm89`.

    Raises:
        UsageError: no such target.
    """
    match = _SPELLING.fullmatch(text)
    if match is None:
        raise UsageError(f"{text[:80]!r} is no target", hint="targets are spelled as rtx1.7-sm89 or rtx1.7-portable")
    return Target(engine_backend(match[1]), match[2], match[3])


def engine_backend(text: str) -> EngineBackend:
    """The backend of a name that is known to be one."""
    return next(backend for backend in ENGINE_BACKENDS if backend == text)


def short_version(version: str) -> str:
    """`1.7` of `1.7.1.116`."""
    return ".".join(version.split(".")[:2])


def require_capability(backend: EngineBackend, capability: str, found: str = "") -> None:
    """Refuse a compute capability that a library does not build for.

    Args:
        backend: the library.
        capability: `sm89` or `portable`.
        found: beginning of the message, which names the GPU.

    Raises:
        UsageError: names the capabilities that the library builds for.
    """
    title = LIBRARY_TITLES[backend]
    if capability == PORTABLE and backend == "tensorrt":
        raise UsageError(
            "TensorRT builds no portable engine: it builds for the GPU of the machine",
            hint=f"portable engines are those of backend rtx: --target {PORTABLE}",
        )
    if capability not in (*CAPABILITIES[backend], PORTABLE):
        known = ", ".join(CAPABILITIES[backend])
        raise UsageError(
            f"{found}{title} does not build for compute capability {capability[:40]!r}",
            hint=f"it builds for {known}" + (f", and {PORTABLE}" if backend == "rtx" else ""),
        )
