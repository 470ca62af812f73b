"""Family `z_image_l2p`: Z-Image transferred to pixel space, in the variants 1k, 4k, 8k and 10k."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from l2p_export.families.faults import shape_faults
from l2p_export.families.z_image_l2p import spelling
from l2p_export.families.z_image_l2p.dimensions import (
    VARIANTS,
    Dimensions,
    dimensions_from_shapes,
    expected_shapes,
    is_latent,
    main_layer,
    network_blocks,
    network_shapes,
    published_dimensions,
    shared_trunk,
)
from l2p_export.families.z_image_l2p.layout import network_layout
from l2p_export.families.z_image_l2p.operations import network_operations
from l2p_export.families.z_image_l2p.specs import FAMILY, model_spec, network_specs

if TYPE_CHECKING:
    import torch
    from torch import nn

    from l2p_calib.layout import QuantizationLayout
    from l2p_engines.forecast.calls import Operations
    from l2p_export.families.base import Shapes
    from l2p_export.tensors.checkpoint import Checkpoint
    from l2p_export.tensors.files import Weights
    from l2p_export.tensors.sources import TensorSource
    from l2p_runtime.contract import ModelSpec, NetworkSpec

PUBLISHED: Mapping[str, str] = {
    "577b2d3e0acea1fb784ca600f966805e": "L2P 1K",
    "69e8fd5b562ea858b9f864508c1263b3": "L2P 4K",
    "df0e4e865d39501e2fe96c7ea8aa40f6": "L2P 8K",
    "e6094ba663b7c10011eb47db072ead0b": "L2P 10K",
    "fc3a8a1247fe185ce116ccbe0e426c28": "Z-Image (latent)",
}
"""Fingerprint of a published checkpoint to its name (docs/model.md, "Fingerprints")."""


@dataclass(frozen=True, slots=True)
class ZImageModel:
    """One `z_image_l2p` architecture; implements `families.base.Model`."""

    dimensions: Dimensions

    @property
    def spec(self) -> ModelSpec:
        """The model's description for the runtime."""
        return model_spec(self.dimensions)

    @property
    def networks(self) -> tuple[NetworkSpec, ...]:
        """Its networks in the order in which they run."""
        return network_specs(self.dimensions)

    @property
    def shapes(self) -> Shapes:
        """Published name and shape of every tensor it has."""
        return expected_shapes(self.dimensions)

    @property
    def settings(self) -> None:
        """None: shapes decide everything that the code does not fix."""
        return None

    def faults(self, shapes: Shapes) -> list[str]:
        """Missing, unknown and misshapen tensors in `shapes`, one line each."""
        blocks = (block for network in self.networks for block in self.blocks(network.name))
        return shape_faults(shapes, self.shapes, blocks)

    def module(
        self,
        network: str,
        dtype_of: Callable[[str], torch.dtype],
        blocks: Iterable[str] | None = None,
        exponent_of: Callable[[str], int] | None = None,
    ) -> nn.Module:
        """Build one network on the current device, with uninitialised weights under published names."""
        from l2p_export.families.z_image_l2p.networks import network_module, unscaled

        chosen = self.blocks(network) if blocks is None else blocks
        return network_module(network, self.dimensions, dtype_of, chosen, exponent_of or unscaled)

    def blocks(self, network: str) -> tuple[str, ...]:
        """Names of its transformer blocks, as `layers.5`."""
        return network_blocks(network, self.dimensions)

    def layout(self, network: str) -> QuantizationLayout:
        """The points to measure in one network, and what plans may do to which of its layers."""
        return network_layout(network, self.dimensions)

    def operations(self, network: str) -> Operations:
        """The matrix products, convolutions and attention of one network, for forecasts."""
        return network_operations(network, self.dimensions)

    def network_shapes(self, network: str) -> Shapes:
        """Published name and shape of the tensors of one network."""
        return network_shapes(network, self.dimensions)


@dataclass(frozen=True, slots=True)
class ZImageL2P:
    """Implements `families.base.Family`."""

    name: str = FAMILY

    @property
    def published(self) -> Mapping[int, ZImageModel]:
        """Patch size in pixels to the published model of that size."""
        return {patch: ZImageModel(published_dimensions(variant)) for patch, variant in VARIANTS.items()}

    def claims(self, names: Iterable[str]) -> bool:
        """Whether tensors of these names can only be this family's."""
        return spelling.claims(names)

    def read(self, weights: Weights) -> Checkpoint:
        """Rename tensors to their published names."""
        return spelling.read_checkpoint(weights)

    def model(self, shapes: Shapes, equal_layers: tuple[int, ...] | None = None) -> ZImageModel:
        """Read the dimensions from shapes; the trunk has only layers that equal the source's."""
        dimensions = dimensions_from_shapes(shapes)
        if equal_layers is not None:
            dimensions = replace(dimensions, cut=shared_trunk(dimensions.trunk, equal_layers))
        return ZImageModel(dimensions)

    def is_source(self, names: Iterable[str]) -> bool:
        """Whether these are the tensors of Z-Image, which draws latents."""
        return any(map(is_latent, names))

    def is_shared(self, name: str) -> bool:
        """Whether a tensor of the latent source means the same here: all but its own embedder and final layer."""
        return not name.startswith(("all_x_embedder.", "all_final_layer.", "local_decoder."))

    def main_layer(self, name: str) -> int | None:
        """The number of the main layer that a published tensor belongs to."""
        return main_layer(name)

    def aliases(self, shapes: Shapes) -> Mapping[str, tuple[str, ...]]:
        """Further names that tools give layers in LoRA files, to the published weights that each stands for."""
        return spelling.layer_aliases(shapes)

    def replaced_layers(self, shapes: Shapes) -> Shapes:
        """The latent embedder and final layer, to the shapes of their weights."""
        return spelling.replaced_layers(shapes)

    def node_ui(self, tensors: Mapping[str, TensorSource]) -> dict[str, TensorSource]:
        """The tensors under the names that ComfyUI uses."""
        return spelling.node_ui_tensors(tensors)

    def known_as(self, fingerprint: str) -> str:
        """The published checkpoint with this fingerprint; empty when unknown."""
        return PUBLISHED.get(fingerprint, "")


Z_IMAGE_L2P = ZImageL2P()
