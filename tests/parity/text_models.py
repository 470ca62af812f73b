"""Small random Qwen3 folders with a tokenizer of their own, as transformers writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model
from transformers.utils import logging

# What is printable of the published template for a single user message, thinking allowed or not.
PUBLISHED_TEMPLATE = (
    "{%- for message in messages %}"
    "{%- if message.role == 'user' %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}"
    "{%- endif %}"
    "{%- endif %}"
)

# The published pre-tokenizer's pattern.
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_CORPUS = ["user assistant a red circle on a blue square, the quick brown fox jumps over the lazy dog"] * 4

WIDTH = 40
"""Caption width of the tiny checkpoints."""

SMALL: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 72,
    "rope_theta": 1e6,
}


def train_tokenizer(*, special: tuple[str, ...] = _SPECIAL) -> tokenizers.Tokenizer:
    """A byte-level tokenizer with Qwen's special tokens, normalizer and pattern."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(tokenizers.Regex(_PATTERN), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def published_tokenizer(tokenizer: tokenizers.Tokenizer) -> PreTrainedTokenizerFast:
    """The same tokenizer as transformers drives it."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=PUBLISHED_TEMPLATE,
        pad_token="<|endoftext|>",  # noqa: S106 - no password
        eos_token="<|im_end|>",  # noqa: S106
        padding_side="right",
        truncation_side="right",
    )


def published_tokens(tokenizer: PreTrainedTokenizerFast, prompt: str) -> list[int]:
    """Token numbers as the published pipeline makes them, padding stripped."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=True
    )
    made = tokenizer(text, padding="max_length", max_length=512, truncation=True)
    return [token for token, real in zip(made["input_ids"], made["attention_mask"], strict=True) if real]


def random_qwen3(vocabulary: int, seed: int = 0, **changes: Any) -> Qwen3Model:
    """A small random Qwen3 whose gains and weights differ enough to tell its parts apart."""
    sizes = SMALL | changes
    theta = sizes.pop("rope_theta")
    config = Qwen3Config(
        vocab_size=vocabulary,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        attn_implementation="eager",
        **sizes,
    )
    model = Qwen3Model(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * values if values.ndim == 1 else values * (1.5 / values.shape[1]) ** 0.5)
    return model


def write_qwen3(folder: Path, *, max_shard_size: str = "5GB", seed: int = 0, **changes: Any) -> Qwen3Model:
    """Write a folder as transformers does: config, weights, tokenizer.json."""
    tokenizer = train_tokenizer()
    model = random_qwen3(tokenizer.get_vocab_size() + 8, seed, **changes)
    logging.disable_progress_bar()
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save(str(folder / "tokenizer.json"))
    return model
