"""What a family offers the rest of the toolchain: it reads shapes, and builds and describes networks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import nn

    from l2p_export.checkpoint import Checkpoint
    from l2p_runtime.contract import ModelSpec, NetworkSpec
    from l2p_runtime.tensorfile import TensorFile

Shapes = Mapping[str, tuple[int, ...]]


class Model(Protocol):
    """One architecture with its dimensions; no weights."""

    @property
    def spec(self) -> ModelSpec:
        """What the runtime must know of it."""

    @property
    def networks(self) -> tuple[NetworkSpec, ...]:
        """Its networks in the order the data takes."""

    @property
    def shapes(self) -> Shapes:
        """Published name and shape of every tensor it has."""

    def faults(self, shapes: Shapes) -> list[str]:
        """What is missing, unknown or misshapen in `shapes`, one line each."""

    def module(
        self, network: str, dtype_of: Callable[[str], torch.dtype], blocks: Iterable[str] | None = None
    ) -> nn.Module:
        """Build one network on the current device, with uninitialised weights under published names."""

    def blocks(self, network: str) -> tuple[str, ...]:
        """Names of its transformer blocks, as `layers.5`."""


class Family(Protocol):
    """One architecture and all that is particular to it."""

    @property
    def name(self) -> str:
        """As manifests and messages spell it."""

    def claims(self, names: Iterable[str]) -> bool:
        """Whether tensors of these names can only be this family's."""

    def read(self, file: TensorFile) -> Checkpoint:
        """Put a file's tensors under their published names."""

    def model(self, shapes: Shapes) -> Model:
        """Read the dimensions from shapes; complains only of what leaves no model to speak of."""

    def known_as(self, fingerprint: str) -> str:
        """The published checkpoint with this fingerprint; empty when unknown."""
