"""Model families: one folder each, found by what a checkpoint's tensors are called."""

from __future__ import annotations

from l2p_export.families.base import Family, Model
from l2p_export.families.z_image_l2p import Z_IMAGE_L2P
from l2p_export.tensors.files import Weights
from l2p_runtime.errors import ArtifactError

FAMILIES: tuple[Family, ...] = (Z_IMAGE_L2P,)

__all__ = ["FAMILIES", "Family", "Model", "family_of"]


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
