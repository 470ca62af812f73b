"""Pads prompt embeddings to the sequence multiple, with a mask of real tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from l2p_runtime.contract import ModelSpec


def pad_captions(
    model: ModelSpec, prompt_embeds: Sequence[NDArray[np.float32]]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Pad embeddings with zeros.

    Args:
        model: caption width C and sequence multiple.
        prompt_embeds: one [L,C] per image of the batch, all of equal padded length T.

    Returns:
        `prompt_embeds` [B,T,C] float32, and `caption_mask` [B,T] bool, true for a real token.
    """
    import numpy as np

    tokens = model.padded(len(prompt_embeds[0]))
    padded = np.zeros((len(prompt_embeds), tokens, model.caption_width), np.float32)
    mask = np.zeros((len(prompt_embeds), tokens), np.bool_)
    for index, embeds in enumerate(prompt_embeds):
        padded[index, : len(embeds)] = embeds
        mask[index, : len(embeds)] = True
    return padded, mask
