"""What a family offers the rest of the toolchain: it reads shapes, and builds and describes networks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import nn

    from l2p_calib.layout import NetworkLayout
    from l2p_export.tensors.checkpoint import Checkpoint
    from l2p_export.tensors.files import Weights
    from l2p_export.tensors.sources import TensorSource
    from l2p_runtime.contract import ModelSpec, NetworkSpec

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
        self,
        network: str,
        dtype_of: Callable[[str], torch.dtype],
        blocks: Iterable[str] | None = None,
        exponent_of: Callable[[str], int] | None = None,
    ) -> nn.Module:
        """Build one network on the current device, with uninitialised weights under published names.

        Args:
            network: its name.
            dtype_of: layer name to the dtype of its weights.
            blocks: transformer blocks to build; all when None.
            exponent_of: layer name to the power of two that its weights come scaled by; None where none are.
        """

    def blocks(self, network: str) -> tuple[str, ...]:
        """Names of its transformer blocks, as `layers.5`."""

    def layout(self, network: str) -> NetworkLayout:
        """What can be measured in one network and which of its layers can be scaled; no torch needed."""

    def network_shapes(self, network: str) -> Shapes:
        """Published name and shape of the tensors of one network; no torch needed."""


class Family(Protocol):
    """One architecture and all that is particular to it."""

    @property
    def name(self) -> str:
        """As manifests and messages spell it."""

    def claims(self, names: Iterable[str]) -> bool:
        """Whether tensors of these names can only be this family's."""

    def read(self, weights: Weights) -> Checkpoint:
        """Put tensors under their published names."""

    def model(self, shapes: Shapes, equal_layers: tuple[int, ...] | None = None) -> Model:
        """Read the dimensions from shapes; complains only of what leaves no model to speak of.

        Args:
            shapes: published name to shape.
            equal_layers: main layers that equal the source's, which the trunk must keep to; None without a source.
        """

    def is_shared(self, name: str) -> bool:
        """Whether a tensor of the latent source means the same in this family's models."""

    def node_ui(self, tensors: Mapping[str, TensorSource]) -> dict[str, TensorSource]:
        """The tensors under the names that node-based user interfaces use."""

    def known_as(self, fingerprint: str) -> str:
        """The published checkpoint with this fingerprint; empty when unknown."""
