"""A bundle that is only described, and a pipeline that draws numbers instead of images, for the frames of a shot."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from l2p_export.families.z_image_l2p.dimensions import published_dimensions
from l2p_export.families.z_image_l2p.specs import model_spec
from l2p_runtime.contract import Sampling

CALL = {"prompt": "a", "height": 16, "width": 16, "seed": 7, "dtype": "uint8", "rng": "philox"}
STEPS = 2


def bundle_of(guidance: float = 1.0) -> Any:
    """A bundle of the published 1k model with a text encoder."""
    model = model_spec(published_dimensions("1k"))
    manifest = SimpleNamespace(
        model=model, model_on=lambda grid: model, sampling=Sampling(STEPS, guidance), text=object()
    )
    return SimpleNamespace(manifest=manifest)


@dataclass
class NumberPipeline:
    """Pixels are a function of embeddings and seed; embeddings of a text are a function of its whole group.

    Attributes:
        before: called with the arguments of each drawing.
        encoded: groups of each loading of the text encoder.
    """

    before: Callable[[dict[str, Any]], None] = lambda call: None
    guidance: float = 1.0
    encoded: list[list[tuple[str, ...]]] = field(default_factory=list)
    drawn: list[int] = field(default_factory=list)

    @property
    def bundle(self) -> Any:
        return bundle_of(self.guidance)

    def encode_each(self, groups: Iterable[Sequence[str]], *, truncate_prompt: bool = False) -> list[list[Any]]:
        listed = [tuple(group) for group in groups]
        self.encoded.append(listed)
        width = self.bundle.manifest.model.caption_width
        return [[np.full((1, width), hash_of(*group, text), np.float32) for text in group] for group in listed]

    def generate(
        self,
        prompt: str | None = None,
        *,
        progress: Callable[[int, int], None],
        cancelled: Callable[[], bool],
        **call: Any,
    ) -> Any:
        self.before(call)
        for step in range(STEPS):
            assert not cancelled()
            progress(step + 1, STEPS)
        embeds = [call[name] for name in ("prompt_embeds", "negative_embeds") if call[name] is not None]
        assert all(isinstance(found, np.ndarray) for found in embeds)
        self.drawn.append(call["seed"])
        value = sum(float(found[0, 0]) for found in embeds) + call["seed"] + call.get("image_index", 0)
        return np.full((16, 16, 3), value % 251, np.uint8)


def hash_of(*texts: str) -> int:
    """The same number for the same texts in every process."""
    return sum(ord(letter) * (index + 1) for index, letter in enumerate("|".join(texts))) % 997
