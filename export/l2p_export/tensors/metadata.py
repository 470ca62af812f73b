"""Reads a checkpoint's text metadata: sampling, licence, and whether it is trained (docs/design.md, "Profiles")."""

from __future__ import annotations

from collections.abc import Mapping

from l2p_runtime.contract import Sampling
from l2p_runtime.errors import ArtifactError, UsageError

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


def is_trained(metadata: Mapping[str, str]) -> bool:
    """False if `l2p.trained` says that the weights were never trained."""
    return metadata.get("l2p.trained", "true").strip().lower() not in ("false", "0", "no")


def licence(metadata: Mapping[str, str]) -> str:
    """The licence as stated, at most 200 characters; empty when none is."""
    return next((metadata[key][:200] for key in ("license", "licence", "modelspec.license") if key in metadata), "")
