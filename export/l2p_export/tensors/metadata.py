"""Reads a checkpoint's text metadata: sampling, trained grid, licence, and whether it is trained.

Source: docs/design.md, "Profiles".
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from l2p_runtime.contract import Grid, Sampling
from l2p_runtime.errors import ArtifactError, UsageError

BASE_GRID = "l2p.base_grid"
"""Key of the trained grid, token rows x columns."""
TRUNK_SHA256 = "l2p.trunk_sha256"
"""Key of the digest of the trunk that the adapters were trained with."""


def sampling_defaults(metadata: Mapping[str, str], fallback: Sampling) -> Sampling:
    """Steps, guidance and shift: from the checkpoint's `l2p.*` keys, else from `fallback`, the profile's.

    Raises:
        ArtifactError: a value is not a number, or is out of range.
    """
    try:
        return Sampling(
            steps=int(metadata.get("l2p.steps", fallback.steps)),
            guidance=float(metadata.get("l2p.guidance", fallback.guidance)),
            shift=float(metadata.get("l2p.shift", fallback.shift)),
        )
    except (ValueError, UsageError) as error:
        raise ArtifactError(f"the checkpoint's sampling metadata is wrong: {error}") from error


def trained_grid(metadata: Mapping[str, str]) -> Grid | None:
    """Token rows and columns of the grid that it was trained at, `16x16` under `l2p.base_grid`; None if not stated.

    Raises:
        ArtifactError: not two whole numbers of 1 or more.
    """
    if BASE_GRID not in metadata:
        return None
    text = metadata[BASE_GRID]
    found = re.fullmatch(r"\s*([1-9][0-9]{0,8})\s*[x,]\s*([1-9][0-9]{0,8})\s*", text)
    if found is None:
        raise ArtifactError(f"the checkpoint's {BASE_GRID} is {text[:40]!r}, expected ROWSxCOLUMNS in tokens, as 16x16")
    return int(found[1]), int(found[2])


def is_trained(metadata: Mapping[str, str]) -> bool:
    """False if `l2p.trained` says that the weights were never trained."""
    return metadata.get("l2p.trained", "true").strip().lower() not in ("false", "0", "no")


def licence(metadata: Mapping[str, str]) -> str:
    """The licence as stated, at most 200 characters; empty when none is."""
    return next((metadata[key][:200] for key in ("license", "licence", "modelspec.license") if key in metadata), "")
