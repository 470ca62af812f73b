"""Model families, one folder each; a checkpoint's family is found by the names of its tensors.

`qwen3` is the text encoder's family. It is not in `FAMILIES`, since users name the text encoder's folder.
"""

from __future__ import annotations

from collections.abc import Iterable

from l2p_export.families import qwen3
from l2p_export.families.base import Family, Model, Networks
from l2p_export.families.z_image_l2p import Z_IMAGE_L2P
from l2p_export.tensors.files import Weights
from l2p_runtime.errors import ArtifactError, UsageError

FAMILIES: tuple[Family, ...] = (Z_IMAGE_L2P,)

__all__ = [
    "FAMILIES",
    "Family",
    "Model",
    "Networks",
    "family_claiming",
    "family_named",
    "family_of",
    "known_as",
    "published_model",
]


def family_of(weights: Weights) -> Family:
    """The family that claims these tensors.

    Raises:
        ArtifactError: none does.
    """
    family = family_claiming(weights.tensors)
    if family is None:
        names = ", ".join(f"`{name}`" for name in sorted(weights.tensors)[:3])
        raise ArtifactError(
            f"`{weights.path}` is of no known family; its first tensors are {names}",
            hint=f"known families: {', '.join(family.name for family in FAMILIES)}",
        )
    return family


def family_claiming(names: Iterable[str]) -> Family | None:
    """The family that claims tensors of these names, as a file spells them; None when none does."""
    names = tuple(names)
    return next((family for family in FAMILIES if family.claims(names)), None)


def family_named(name: str) -> Family | None:
    """The family with this name in manifests; None if this version does not know it."""
    return next((family for family in FAMILIES if family.name == name), None)


def known_as(fingerprint: str) -> str:
    """The published checkpoint or text encoder with this fingerprint; empty when unknown."""
    names = (*(family.known_as(fingerprint) for family in FAMILIES), qwen3.known_as(fingerprint))
    return next((name for name in names if name), "")


def published_model(patch_px: int, wanted_by: str) -> Model:
    """The published model of a patch size.

    Args:
        patch_px: side of a patch.
        wanted_by: name of the profile with this patch size, for the message.

    Raises:
        UsageError: no published model has it.
    """
    published = {patch: model for family in FAMILIES[::-1] for patch, model in family.published.items()}
    if patch_px not in published:
        raise UsageError(
            f"profile `{wanted_by}` is for {patch_px} px patches, which no published model has",
            hint=f"published ones have {', '.join(map(str, published))} px; or give a CHECKPOINT",
        )
    return published[patch_px]
