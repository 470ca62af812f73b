"""Model families: one folder each, found by what a checkpoint's tensors are called."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from l2p_export.checkpoint import Checkpoint, open_weights, require_float
from l2p_export.families.base import Family, Model
from l2p_export.families.z_image_l2p import Z_IMAGE_L2P
from l2p_runtime.errors import ArtifactError

FAMILIES: tuple[Family, ...] = (Z_IMAGE_L2P,)

__all__ = ["FAMILIES", "Family", "LoadedModel", "Model", "load_model"]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A checkpoint that is complete and well-shaped, with its family and dimensions; weights are still in the file."""

    family: Family
    checkpoint: Checkpoint
    model: Model


def load_model(path: Path) -> LoadedModel:
    """Open a checkpoint, recognise it and check every name and shape. Reads the header alone.

    Raises:
        ArtifactError: no file, a damaged one, no family claims it, or tensors are missing, unknown or misshapen.
    """
    file = open_weights(path)
    family = next((family for family in FAMILIES if family.claims(file.tensors)), None)
    if family is None:
        names = ", ".join(f"`{name}`" for name in sorted(file.tensors)[:3])
        raise ArtifactError(
            f"`{file.path}` is of no known family; its first tensors are {names}",
            hint=f"known families: {', '.join(family.name for family in FAMILIES)}",
        )
    require_float(file)
    checkpoint = family.read(file)
    model = family.model(checkpoint.shapes)
    faults = model.faults(checkpoint.shapes)
    if faults:
        raise ArtifactError(
            f"`{file.path}` does not fit a {model.spec.variant} model of {model.spec.layers} layers: "
            + "; ".join(faults),
            hint="download it again, or check which tool wrote it",
        )
    return LoadedModel(family, checkpoint, model)
