"""Turns prompts into embeddings, without torch: chat template, token numbers, text encoder.

Token numbers are those of transformers' `apply_chat_template` followed by its tokenizer
(docs/model.md, "Text encoder"): the template is filled in as text and tokenized whole, so special tokens that a prompt
spells out count as such, as they do there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2p_runtime.errors import ArtifactError, HostError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from l2p_runtime.backends import Device, Engine
    from l2p_runtime.bundle import Bundle

CHAT_TEMPLATE = "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
"""One user message with the generation prompt, as the published models were trained with it."""

MAX_TOKENS = 512
"""Longest prompt with its template, in tokens."""

TOKENIZER_BYTES_MAX = 64 << 20
"""The published tokenizer.json takes 11 MB."""

PROMPT_CHARACTERS_MAX = 1 << 20

_TEMPLATE_BYTES_MAX = 64 << 10
_PLACE = "{prompt}"
PROMPTS_AT_ONCE = 4
"""Maximum of prompts that go through the text encoder in one call."""


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A tokenizer with its chat template.

    Attributes:
        library: the `tokenizers.Tokenizer`.
        template: text with `{prompt}` in one place.
        vocabulary: one more than the largest token number.
    """

    library: Any
    template: str
    max_tokens: int
    vocabulary: int

    def tokens(self, prompt: str, *, truncate: bool = False) -> list[int]:
        """Token numbers of a prompt in its template.

        Args:
            prompt: text; an empty one gives only the template.
            truncate: cut too long prompts on the right, the template's end first, as published.

        Raises:
            UsageError: the prompt is too long and `truncate` is false, or it is no text.
        """
        if not isinstance(prompt, str):
            raise UsageError(f"a prompt is a {type(prompt).__name__}, expected text")
        if len(prompt) > PROMPT_CHARACTERS_MAX:
            raise UsageError(f"a prompt has {len(prompt):,} characters, expected up to {PROMPT_CHARACTERS_MAX:,}")
        before, _, after = self.template.partition(_PLACE)
        try:
            (before + prompt + after).encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"a prompt holds what is no character at position {error.start - len(before)}") from error
        ids: list[int] = self.library.encode(before + prompt + after).ids
        if len(ids) > self.max_tokens:
            if not truncate:
                raise UsageError(
                    f"the prompt has {len(ids)} tokens with its template, expected up to {self.max_tokens}",
                    hint="shorten it, or cut it with --truncate-prompt (truncate_prompt=True in Python)",
                )
            ids = ids[: self.max_tokens]
        return ids


def load_tokenizer(path: Path, template: str, max_tokens: int = MAX_TOKENS) -> Tokenizer:
    """Load a `tokenizer.json`.

    Raises:
        ArtifactError: absent, too large or damaged; or the template's special tokens are not in it.
        HostError: `tokenizers` is not installed.
    """
    if template.count(_PLACE) != 1:
        raise ArtifactError(f"the chat template has `{_PLACE}` {template.count(_PLACE)} times, expected once")
    text = _read_text(path, TOKENIZER_BYTES_MAX)
    try:
        import tokenizers
    except ImportError as error:
        raise HostError(
            f"prompts need `tokenizers`, which cannot be imported: {error}", hint="pip install 'l2p-export[text]'"
        ) from error
    try:
        library = tokenizers.Tokenizer.from_str(text)
    # The library raises bare `Exception`; its panics derive only from BaseException.
    except Exception as error:
        raise ArtifactError(f"`{path}` is no tokenizer: {str(error)[:200]}", hint="download it again") from error
    library.no_truncation()
    library.no_padding()
    added = {token.content: number for number, token in library.get_added_tokens_decoder().items()}
    for special in dict.fromkeys(re.findall(r"<\|[^|<>]*\|>", template)):
        if special not in added or library.encode(special, add_special_tokens=False).ids != [added[special]]:
            raise ArtifactError(
                f"`{path}` has no special token `{special}`, which the chat template needs",
                hint="use the tokenizer that belongs to the text encoder",
            )
    return Tokenizer(library, template, max_tokens, max(library.get_vocab().values(), default=-1) + 1)


def bundle_tokenizer(bundle: Bundle) -> Tokenizer:
    """The tokenizer of a bundle with a text encoder.

    Raises:
        UsageError: the bundle has no text encoder.
        ArtifactError: tokenizer or template are damaged.
        HostError: `tokenizers` is not installed.
    """
    text = bundle.manifest.text
    if text is None:
        raise UsageError("the bundle has no text encoder", hint="build it with --text-encoder, or pass embeddings")
    template = _read_text(bundle.path(text.chat_template), _TEMPLATE_BYTES_MAX)
    tokenizer = load_tokenizer(bundle.path(text.tokenizer), template, text.max_tokens)
    if tokenizer.vocabulary > text.vocabulary:
        raise ArtifactError(
            f"`{text.tokenizer}` has token numbers up to {tokenizer.vocabulary - 1}, the encoder takes "
            f"{text.vocabulary}",
            hint="build the bundle again",
        )
    return tokenizer


def encode_prompts(
    engine: Engine, tokenizer: Tokenizer, prompts: Sequence[str], device: Device, *, truncate: bool = False
) -> list[NDArray[np.float32]]:
    """Run the text encoder on prompts, `PROMPTS_AT_ONCE` at a time, and strip the padding.

    Args:
        engine: the loaded `text_encoder`.
        tokenizer: the tokenizer that it was trained with.
        prompts: texts; all are tokenized before any is encoded.
        device: where the engine runs.
        truncate: cut prompts that are too long.

    Returns:
        Embeddings [L,C] float32 of each prompt, L its own number of tokens.

    Raises:
        UsageError: a prompt is too long.
        ArtifactError: the encoder makes NaN or Inf.
    """
    rows = [tokenizer.tokens(prompt, truncate=truncate) for prompt in prompts]
    embeds: list[NDArray[np.float32]] = []
    for start in range(0, len(rows), PROMPTS_AT_ONCE):
        embeds += _encode_batch(engine, rows[start : start + PROMPTS_AT_ONCE], device)
    return embeds


def _encode_batch(engine: Engine, rows: Sequence[list[int]], device: Device) -> list[NDArray[np.float32]]:
    import numpy as np

    # Any number may pad: attention is causal and masked, and padding is on the right.
    ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
    mask = np.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
        mask[index, : len(row)] = 1
    (output,) = engine.spec.outputs
    made = device.alloc(output.resolve({"B": ids.shape[0], "L": ids.shape[1]}), "float32")
    engine.run({"input_ids": device.upload(ids), "attention_mask": device.upload(mask)}, {output.name: made})
    device.synchronize()
    values = device.download(made)
    embeds = [values[index, : len(row)].copy() for index, row in enumerate(rows)]
    if not all(np.isfinite(found).all() for found in embeds):
        raise ArtifactError("the text encoder makes NaN or Inf", hint="use a plan of higher precision, as fp32")
    return embeds


def _read_text(path: Path, most_bytes: int) -> str:
    try:
        size_bytes = path.stat().st_size
        if size_bytes > most_bytes:
            raise ArtifactError(f"`{path}` has {size_bytes:,} bytes, expected up to {most_bytes:,}")
        # Bytes, because reading as text would turn \r\n into \n. A template would put a byte order mark into prompts.
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ArtifactError(f"cannot read `{path}`: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ArtifactError(f"`{path}` is not UTF-8: {error}") from error
