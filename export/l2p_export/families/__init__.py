"""Model families: one folder each, found by what a checkpoint's tensors are called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from l2p_export.checkpoint import Checkpoint
from l2p_export.families.base import Family, Model
from l2p_export.families.z_image_l2p import Z_IMAGE_L2P
from l2p_export.folders import Weights, open_weights
from l2p_export.overlay import overlay
from l2p_export.quantized import with_scales
from l2p_runtime.errors import ArtifactError

if TYPE_CHECKING:
    from l2p_export.lora import Lora, LoraRequest

FAMILIES: tuple[Family, ...] = (Z_IMAGE_L2P,)

__all__ = ["FAMILIES", "Family", "LoadedModel", "Model", "family_of", "load_model"]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A checkpoint that is complete and well-shaped, with its family and dimensions; weights are still in their files.

    Attributes:
        source: the latent checkpoint that it was overlaid on and compared with, if any.
        equal_layers: main layers that equal the source's.
        loras: what was merged into it.
    """

    family: Family
    checkpoint: Checkpoint
    model: Model
    source: Path | None = None
    equal_layers: tuple[int, ...] = ()
    loras: tuple[Lora, ...] = ()


def load_model(path: Path, source: Path | None = None, loras: Sequence[LoraRequest] = ()) -> LoadedModel:
    """Open a checkpoint, complete it from its source, merge LoRAs, and check every name and shape.

    Reads headers alone, but for layers that are compared with a source's.

    Args:
        path: file or folder; may hold adapters alone when there is a source.
        source: latent checkpoint, as file, model folder or diffusers pipeline folder.
        loras: to merge, in FP32.

    Raises:
        ArtifactError: no file, a damaged one, no family claims it, tensors are missing, unknown or misshapen, the
            source is another one, or a LoRA does not fit.
    """
    weights = open_weights(path)
    family = family_of(weights)
    checkpoint = family.read(with_scales(weights))
    equal: tuple[int, ...] | None = None
    if source is not None:
        completed = overlay(checkpoint, family.read(with_scales(open_weights(source))), family)
        checkpoint, equal = completed.checkpoint, completed.equal_layers
    model = family.model(checkpoint.shapes, equal)
    faults = model.faults(checkpoint.shapes)
    if faults:
        lacks_layers = source is None and any(" `layers." in fault for fault in faults)
        raise ArtifactError(
            f"`{checkpoint.path}` does not fit a {model.spec.variant} model of {model.spec.layers} layers: "
            + "; ".join(faults),
            hint="if the file holds adapters alone, give what they were trained from: --source DIR"
            if lacks_layers or "l2p.trunk_sha256" in checkpoint.metadata
            else "download it again, or check which tool wrote it",
        )
    merged = _merge(checkpoint, loras)
    loaded = LoadedModel(family, checkpoint, model, source, equal or (), merged)
    if not merged:
        return loaded
    from l2p_export.lora import merge_loras

    return replace(loaded, checkpoint=replace(checkpoint, tensors=merge_loras(checkpoint.tensors, merged)))


def family_of(weights: Weights) -> Family:
    """The family that claims these tensors.

    Raises:
        ArtifactError: none does.
    """
    family = next((family for family in FAMILIES if family.claims(weights.tensors)), None)
    if family is None:
        names = ", ".join(f"`{name}`" for name in sorted(weights.tensors)[:3])
        raise ArtifactError(
            f"`{weights.path}` is of no known family; its first tensors are {names}",
            hint=f"known families: {', '.join(family.name for family in FAMILIES)}",
        )
    return family


def _merge(checkpoint: Checkpoint, loras: Sequence[LoraRequest]) -> tuple[Lora, ...]:
    if not loras:
        return ()
    from l2p_export.lora import open_lora

    return tuple(open_lora(request, checkpoint.shapes) for request in loras)
