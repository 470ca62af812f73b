"""What a family offers the rest of the toolchain: it reads shapes, and builds and describes networks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import nn

    from l2p_calib.layout import QuantizationLayout
    from l2p_engines.forecast.calls import Operations
    from l2p_export.tensors.checkpoint import Checkpoint
    from l2p_export.tensors.files import Weights
    from l2p_export.tensors.sources import TensorSource
    from l2p_runtime.contract import ModelSpec, NetworkSpec

Shapes = Mapping[str, tuple[int, ...]]


class Networks(Protocol):
    """Networks that can be exported, with their dimensions and no weights: a family's model, or a text encoder."""

    @property
    def networks(self) -> tuple[NetworkSpec, ...]:
        """What goes in and out of each, in the order the data takes."""

    @property
    def shapes(self) -> Shapes:
        """Published name and shape of every tensor of all networks."""

    @property
    def settings(self) -> object:
        """What else decides an ONNX graph and shows in no shape, as an epsilon; None without any."""

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
        """Names of its transformer blocks in the order they run, as `layers.5`: submodules of `module`.

        Each reads one stream [B,S,D] and returns it. Neighbours whose names end in a number and are otherwise equal are
        traced once where shapes, dtypes and exponents agree.
        """

    def layout(self, network: str) -> QuantizationLayout:
        """What can be measured in one network, and what plans may do to which of its layers; no torch needed."""

    def operations(self, network: str) -> Operations:
        """What one network multiplies by which weights, for forecasts; no torch needed."""

    def network_shapes(self, network: str) -> Shapes:
        """Published name and shape of the tensors of one network; no torch needed."""


class Model(Networks, Protocol):
    """One architecture that denoises, with its dimensions; no weights."""

    @property
    def spec(self) -> ModelSpec:
        """What the runtime must know of it."""


class Family(Protocol):
    """One architecture and all that is particular to it."""

    @property
    def name(self) -> str:
        """As manifests and messages spell it."""

    @property
    def published(self) -> Mapping[int, Model]:
        """Patch size in pixels to the published model of that size; what can be planned without a checkpoint."""

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

    def is_source(self, names: Iterable[str]) -> bool:
        """Whether published names are those of a latent source, and of no model in pixel space."""

    def is_shared(self, name: str) -> bool:
        """Whether a tensor of the latent source means the same in this family's models."""

    def main_layer(self, name: str) -> int | None:
        """The number of the main layer that a published tensor belongs to; the trunk is a run of main layers."""

    def aliases(self, shapes: Shapes) -> Mapping[str, tuple[str, ...]]:
        """Further names that tools give layers in LoRA files, to the published weights that each stands for.

        What stands for several weights has their rows in this order.
        """

    def node_ui(self, tensors: Mapping[str, TensorSource]) -> dict[str, TensorSource]:
        """The tensors under the names that node-based user interfaces use."""

    def known_as(self, fingerprint: str) -> str:
        """The published checkpoint with this fingerprint; empty when unknown."""
