"""Tokenizer of the small world, and token ids of captions in the published chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from l2p_export.world.captions import caption
from l2p_export.world.scenes import draw_description
from l2p_runtime.text import CHAT_TEMPLATE

if TYPE_CHECKING:
    import tokenizers

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCABULARY = 384
CAPTION_TOKENS = 32
"""Padded length of captions; the longest of the small world has 22 tokens with its template."""

# Words as Qwen's tokenizer splits them: a word takes the space before it, each digit stands alone.
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def world_tokenizer() -> tokenizers.Tokenizer:
    """Train a byte-level BPE tokenizer on the small world's captions; other text falls apart into letters."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(tokenizers.Regex(_WORDS), "isolated")
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_of])
    tokenizer.decoder = decoders.ByteLevel()
    random = np.random.default_rng(0)
    captions = [caption(draw_description(random), random) for _ in range(4000)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*captions, *["user\n", "assistant\n"] * 500], trainer)
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


def caption_ids(tokenizer: tokenizers.Tokenizer, captions: Sequence[str], tokens: int = CAPTION_TOKENS) -> Tensor:
    """Token ids [N,T] int16 of captions in the chat template, padded with -1 on the right.

    Raises:
        ValueError: a caption has more than T tokens.
    """
    rows = np.full((len(captions), tokens), -1, np.int16)
    for index, text in enumerate(captions):
        ids = tokenizer.encode(CHAT_TEMPLATE.replace("{prompt}", text)).ids
        if len(ids) > tokens:
            raise ValueError(f"the caption {text!r} has {len(ids)} tokens, expected up to {tokens}")
        rows[index, : len(ids)] = ids
    return torch.from_numpy(rows)
