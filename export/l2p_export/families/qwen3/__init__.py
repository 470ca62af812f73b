"""Family `qwen3`: text encoders, opened from a Hugging Face folder with their tokenizer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from l2p_export.families.qwen3.folder import TextEncoder, open_text_encoder
from l2p_export.families.qwen3.model import Qwen3Model

__all__ = ["Qwen3Model", "TextEncoder", "claims", "known_as", "open_text_encoder"]

PUBLISHED: Mapping[str, str] = {"0f050f62a88876fea6eae0a18dac5a2e": "Qwen3-4B text encoder"}
"""Fingerprint of a published text encoder to its name (docs/model.md, "Fingerprints")."""

_TELLING = re.compile(r"(?:model\.)?layers\.\d+\.self_attn\.q_proj\.weight")


def claims(names: Iterable[str]) -> bool:
    """Whether any of these names, as a file spells them, is a text encoder's."""
    return any(map(_TELLING.fullmatch, names))


def known_as(fingerprint: str) -> str:
    """The published text encoder with this fingerprint; empty when unknown."""
    return PUBLISHED.get(fingerprint, "")
