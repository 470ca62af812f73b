"""A source that learns at several sizes: what a step takes of each, and that a resume is the same run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from l2p_engines.store.locks import locked
from l2p_export.training.loop.loop import Schedule
from l2p_export.training.loop.settings import LOCK_NAME
from l2p_export.training.source.latents import LatentData
from l2p_export.training.source.model import SourceModel, initial_source, source_dimensions
from l2p_export.training.source.tokens import caption_ids, world_tokenizer
from l2p_export.training.source.train import SourceSpec, train_source, train_transformer
from l2p_export.world.render import LABELS
from l2p_runtime.errors import HostError, UsageError
from l2p_runtime.progress import Silent

pytestmark = pytest.mark.usefixtures("one_thread")


def scenes(side: int, count: int) -> LatentData:
    draws = torch.Generator().manual_seed(side)
    shares = torch.rand((count, side * side // 4, len(LABELS)), generator=draws)
    tokenizer = world_tokenizer()
    return LatentData(
        torch.randn((count, 16, side, side), generator=draws),
        caption_ids(tokenizer, ["a red circle"] * count),
        caption_ids(tokenizer, [""])[0],
        shares / shares.sum(-1, keepdim=True),
    )


def test_steps_take_equal_tokens_of_every_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shapes: list[tuple[int, ...]] = []
    probed = SourceModel.probed

    def seen(self: SourceModel, latents: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        shapes.append(tuple(latents.shape))
        return probed(self, latents, *rest)

    monkeypatch.setattr(SourceModel, "probed", seen)
    schedule = Schedule(steps=6, batch=8, learning_rate=1e-3, save_every=3)
    data = [scenes(4, 10), scenes(8, 5)]
    first = initial_source(source_dimensions(), 0)
    train_transformer(first, data, tmp_path / "whole", schedule, Silent())
    assert set(shapes) == {(8, 16, 4, 4), (2, 16, 8, 8)}
    taken = list(shapes)

    shapes.clear()
    short = Schedule(steps=3, batch=8, learning_rate=1e-3, save_every=3)
    second = initial_source(source_dimensions(), 0)
    train_transformer(second, data, tmp_path / "parts", short, Silent())
    again = initial_source(source_dimensions(), 0)
    train_transformer(again, data, tmp_path / "parts", schedule, Silent())
    assert shapes == taken
    expected = first.state_dict()
    assert all(value.equal(expected[name]) for name, value in again.state_dict().items())


def test_other_latents_are_another_run(tmp_path: Path) -> None:
    """As many scenes through another autoencoder, which another number of its steps makes."""
    schedule = Schedule(steps=1, batch=2, learning_rate=1e-3)
    data = replace(scenes(4, 10), made_from="one autoencoder")
    train_transformer(initial_source(source_dimensions(), 0), [data], tmp_path, schedule, Silent())
    longer, other = replace(schedule, steps=2), replace(data, made_from="another autoencoder")
    with pytest.raises(UsageError, match=r"data is digest [0-9a-f]{16}, it began with digest"):
        train_transformer(initial_source(source_dimensions(), 0), [other], tmp_path, longer, Silent())


@pytest.mark.parametrize("name", ["source", "work"])
def test_one_run_writes_a_source(tmp_path: Path, name: str) -> None:
    schedule = Schedule(steps=1, batch=1, learning_rate=1.0)
    (tmp_path / name).mkdir()
    with (
        locked(tmp_path / name / LOCK_NAME),
        pytest.raises(HostError, match=rf"another .* is (writing|training in) `.*{name}`"),
    ):
        train_source(tmp_path / "source", tmp_path / "work", SourceSpec(1, schedule, schedule), Silent(), samples=None)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("sizes_px", [(), (128, 72), (48,), (0,), (-128,)])
def test_wrong_sizes(sizes_px: tuple[int, ...]) -> None:
    schedule = Schedule(steps=1, batch=1, learning_rate=1.0)
    with pytest.raises(UsageError, match="expected a multiple of 16 px from 64 px on"):
        SourceSpec(1, schedule, schedule, sizes_px)
