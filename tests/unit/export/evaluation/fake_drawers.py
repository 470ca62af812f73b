"""Models that need no weights: they answer a caption with an image made by a function."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from l2p_export.evaluation.drawers import Drawer
from l2p_export.world.captions import describe
from l2p_export.world.render import render
from l2p_export.world.scenes import Description, place
from unit.export.world.worlds import Pixels

SIZE_PX = 64


@dataclass
class FakeModel:
    """Draws with `make`, remembers the seeds it was asked for, and is stopped before image `stop_at`."""

    make: Callable[[str, int], Pixels]
    stop_at: int | None = None
    settings: dict[str, object] = field(default_factory=lambda: {"model_sha256": "fake", "steps": 1})
    seeds: list[int] = field(default_factory=list)

    def drawer(self, height_px: int = SIZE_PX, width_px: int = SIZE_PX) -> Drawer:
        return Drawer(height_px, width_px, self.settings, lambda text: None, self._draw)

    def _draw(self, texts: Sequence[str], seeds: Sequence[int]) -> Iterator[Pixels]:
        for text, seed in zip(texts, seeds, strict=True):
            if len(self.seeds) == self.stop_at:
                raise KeyboardInterrupt
            self.seeds.append(seed)
            yield self.make(text, seed)


def rendered(
    change: Callable[[Description], Description] = lambda description: description,
) -> Callable[[str, int], Pixels]:
    """Renders of what a caption says, or of what `change` makes of it."""

    def make(text: str, seed: int) -> Pixels:
        scene = place(change(describe(text)), np.random.default_rng([seed, 9]))
        return render(scene, SIZE_PX, SIZE_PX)

    return make


def plain(text: str, seed: int) -> Pixels:
    """An image whose every pixel tells the seed."""
    return np.full((SIZE_PX, SIZE_PX, 3), seed, np.uint8)
