"""Protocols of a model family, which reads shapes, and of its models, which build and describe networks."""

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
        """Inputs and outputs of each, in the order in which they run."""

    @property
    def shapes(self) -> Shapes:
        """Published name and shape of every tensor of all networks."""

    @property
    def settings(self) -> object:
        """Constants that decide an ONNX graph and show in no shape, such as an epsilon; None if there are none."""

    def faults(self, shapes: Shapes) -> list[str]:
        """Missing, unknown and misshapen tensors in `shapes`, one line each; empty if it fits."""

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
            exponent_of: layer name to the power of two that its weights are scaled by; None if none are scaled.
        """

    def blocks(self, network: str) -> tuple[str, ...]:
        """Names of its transformer blocks in the order they run, as `layers.5`: submodules of `module`.

        Each reads one stream [B,S,D] and returns one. Adjacent blocks whose names differ only in their number are
        traced once if their shapes, dtypes and exponents are equal.
        """

    def layout(self, network: str) -> QuantizationLayout:
        """The points to measure in one network, and what plans may do to which of its layers; needs no torch."""

    def operations(self, network: str) -> Operations:
        """The matrix products, convolutions and attention of one network, for forecasts; needs no torch."""

    def network_shapes(self, network: str) -> Shapes:
        """Published name and shape of the tensors of one network; needs no torch."""


class Model(Networks, Protocol):
    """One denoiser architecture with its dimensions and no weights."""

    @property
    def spec(self) -> ModelSpec:
        """The model's description for the runtime."""


class Family(Protocol):
    """One model architecture: its spelling, its dimensions and its networks."""

    @property
    def name(self) -> str:
        """Its name in manifests and messages."""

    @property
    def published(self) -> Mapping[int, Model]:
        """Patch size in pixels to the published model of that size; `plan` needs no checkpoint for these."""

    def claims(self, names: Iterable[str]) -> bool:
        """Whether tensors of these names can only be this family's."""

    def read(self, weights: Weights) -> Checkpoint:
        """Rename tensors to their published names, and join FP8 weights with their scales.

        Raises:
            ArtifactError: names that contradict each other, or weights in a quantized layout that is not read.
        """

    def model(self, shapes: Shapes, equal_layers: tuple[int, ...] | None = None) -> Model:
        """Read the dimensions from shapes. Raises only if there is no model to read; `faults` lists the rest.

        Args:
            shapes: published name to shape.
            equal_layers: main layers that equal the source's; the trunk is within them. None without a source.
        """

    def is_source(self, names: Iterable[str]) -> bool:
        """Whether published names are those of a latent source, and of no model in pixel space."""

    def is_shared(self, name: str) -> bool:
        """Whether a tensor of the latent source means the same in this family's models."""

    def main_layer(self, name: str) -> int | None:
        """The number of the main layer that a published tensor belongs to; the trunk is a run of main layers."""

    def aliases(self, shapes: Shapes) -> Mapping[str, tuple[str, ...]]:
        """Further names that tools give layers in LoRA files, to the published weights that each stands for.

        A fused layer has the rows of its weights in this order.
        """

    def replaced_layers(self, shapes: Shapes) -> Shapes:
        """Layers that only the latent source has, by every name that LoRA files give them, to their weights' shapes.

        A LoRA of the source may change them; a model in pixel space has others in their place.
        """

    def node_ui(self, tensors: Mapping[str, TensorSource]) -> dict[str, TensorSource]:
        """The tensors under the names that ComfyUI uses."""

    def known_as(self, fingerprint: str) -> str:
        """The published checkpoint with this fingerprint; empty when unknown."""
