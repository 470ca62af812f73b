"""Texts of a bundle as embeddings: its tokenizer and text encoder, and the embeddings of the last call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from l2p_runtime.arguments import text
from l2p_runtime.errors import InternalError, UsageError
from l2p_runtime.text import Tokenizer, bundle_tokenizer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from l2p_runtime.loaded import LoadedNetworks


class PromptEncoder:
    """Counts the tokens of texts and encodes them; the text encoder is loaded only while it runs."""

    def __init__(self, networks: LoadedNetworks) -> None:
        self._networks = networks
        self._tokenizer: Tokenizer | None = None
        # Of only the last call: frames of one prompt load the text encoder once.
        self._encoded: dict[tuple[str, bool], NDArray[np.float32]] = {}

    def count_tokens(self, caption: NDArray[np.float32] | str, truncate: bool) -> int:
        """Tokens of a caption, unpadded; refuses a text that is too long before anything is loaded for it.

        Raises:
            UsageError: the bundle has no text encoder, or the text is too long.
            HostError: `tokenizers` is not installed.
        """
        if not isinstance(caption, str):
            return len(caption)
        if self._tokenizer is None:
            self._tokenizer = bundle_tokenizer(self._networks.opened.bundle)
        return len(self._tokenizer.tokens(caption, truncate=truncate))

    def embed(self, captions: Sequence[NDArray[np.float32] | str], truncate: bool) -> list[NDArray[np.float32]]:
        """Embeddings [L,C] of captions whose tokens were counted: texts are encoded together, embeddings stay."""
        texts = list(dict.fromkeys(caption for caption in captions if isinstance(caption, str)))
        if texts and any((text, truncate) not in self._encoded for text in texts):
            (embeds,) = self._encode([texts], truncate)
            self._encoded = dict(zip(((text, truncate) for text in texts), embeds, strict=True))
        return [self._encoded[caption, truncate] if isinstance(caption, str) else caption for caption in captions]

    def embed_each(self, groups: Iterable[object], truncate: bool) -> list[list[NDArray[np.float32]]]:
        """Embeddings [L,C] of the texts of each group, padded to one length a group.

        Raises:
            UsageError: a group is no sequence of texts, the bundle has no text encoder, or a text is too long.
            HostError: the text encoder does not fit the memory, or `tokenizers` is not installed.
        """
        checked = [self._checked(group, truncate) for group in groups]
        return self._encode(checked, truncate) if any(checked) else [[] for _ in checked]

    def close(self) -> None:
        """Drop the tokenizer and the embeddings."""
        self._encoded, self._tokenizer = {}, None

    def _checked(self, prompts: object, truncate: bool) -> list[str]:
        """Prompts that the text encoder takes."""
        if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Iterable):
            raise UsageError(f"prompts are a {type(prompts).__name__}, expected a sequence of texts")
        # An iterator has its texts only once.
        texts = [text("a prompt", prompt) for prompt in prompts]
        for prompt in texts:
            self.count_tokens(prompt, truncate)
        return texts

    def _encode(self, groups: Sequence[Sequence[str]], truncate: bool) -> list[list[NDArray[np.float32]]]:
        if self._tokenizer is None:
            raise InternalError("texts reached the encoder without a tokenizer")
        return self._networks.encode(self._tokenizer, groups, truncate=truncate)
