"""Held-out images: which they are, that no step sees them, and that their loss is the same however it is computed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from fakes.sources import tiny_spec, write_tiny_corpus
from l2p_engines.store.locks import locked
from l2p_export.training.corpus import reader
from l2p_export.training.corpus.corpus import Corpus, Row, open_corpus, read_image
from l2p_export.training.corpus.rendered import RenderedScenes, world_scenes
from l2p_export.training.loop.distributed import ALONE
from l2p_export.training.source.folder import Source, open_source
from l2p_export.training.transfer.batches import embed_captions
from l2p_export.training.transfer.holdout import (
    DRAWS_PER_IMAGE,
    LOSSES_NAME,
    append_loss,
    held_out_batches,
    holdout_count,
    mean_loss,
    read_losses,
    split_images,
)
from l2p_export.training.transfer.spec import transfer_dimensions
from l2p_export.training.transfer.train import transfer
from l2p_runtime.errors import HostError, UsageError
from l2p_runtime.progress import Silent

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_tiny_corpus(tmp_path_factory.mktemp("corpus"), 9)


@pytest.mark.parametrize(("holdout", "count"), [(0, 0), (1, 1), (3, 3), (0.25, 2), (0.01, 1), (0.89, 8)])
def test_a_number_or_a_share(holdout: float, count: int) -> None:
    assert holdout_count(holdout, 9) == count


@pytest.mark.parametrize("holdout", [9, 10, 0.99])
def test_some_images_must_be_left(holdout: float) -> None:
    with pytest.raises(UsageError, match=r"of 9 images held out leave none to train on"):
        holdout_count(holdout, 9)


@pytest.mark.parametrize("holdout", [-1, 1.5, float("nan"), float("inf")])
def test_what_is_neither_is_refused(holdout: float) -> None:
    with pytest.raises(UsageError, match="expected a share below 1, or a number of images"):
        tiny_spec(holdout=holdout)


@given(st.integers(1, 40), st.data())
def test_a_split_is_of_all_images_and_in_their_order(count: int, data: st.DataObject) -> None:
    held_count, seed = data.draw(st.integers(0, count - 1)), data.draw(st.integers(0, 2**64 - 1))
    rows = tuple(Row(f"{index:04}.png", "a", None) for index in range(count))
    training, held = split_images(Corpus(Path("nowhere"), rows), held_count, seed)
    parts = (training.rows, () if held is None else held.rows)
    assert [len(part) for part in parts] == [count - held_count, held_count]
    assert sorted([*parts[0], *parts[1]], key=lambda row: row.file_name) == list(rows)
    assert all(list(part) == sorted(part, key=lambda row: row.file_name) for part in parts)
    assert split_images(Corpus(Path("nowhere"), rows), held_count, seed) == (training, held)


def test_scenes_stay_with_their_captions() -> None:
    scenes = world_scenes(12, 4)
    pairs = set(zip((row.text for row in scenes.rows), scenes.scenes, strict=True))
    for part in split_images(scenes, 5, 0):
        assert isinstance(part, RenderedScenes)
        assert set(zip((row.text for row in part.rows), part.scenes, strict=True)) <= pairs


def test_no_step_sees_a_held_out_image(
    source: Source, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, held = split_images(corpus, 3, 5)
    assert held is not None
    folders = {id(training): "training", id(held): "held out"}
    read: dict[str, set[str]] = {"training": set(), "held out": set()}

    def seen(images: Corpus, row: Row) -> object:
        read[folders[id(images)]].add(row.file_name)
        return read_image(images, row)

    monkeypatch.setattr(reader, "read_image", seen)
    run(source, training, tmp_path, 20, held)
    assert read == {
        "training": {row.file_name for row in training.rows},
        "held out": {row.file_name for row in held.rows},
    }
    assert not read["training"] & read["held out"]


def test_the_loss_is_in_the_files(source: Source, corpus: Corpus, tmp_path: Path) -> None:
    training, held = split_images(corpus, 3, 5)
    plain = run(source, training, tmp_path / "plain", 4, None)
    scored = run(source, training, tmp_path / "scored", 4, held)
    # Scoring changes nothing that is trained.
    assert all(value.equal(load_file(plain)[name]) for name, value in load_file(scored).items())
    losses = read_losses(tmp_path / "scored" / "work")
    assert [step for step, _ in losses] == [2, 4]
    with safe_open(scored, "pt") as file:
        stated = file.metadata()
    assert stated["l2p.holdout_images"] == "3"
    assert float(stated["l2p.holdout_loss"]) == losses[-1][1]
    with safe_open(plain, "pt") as file:
        assert "l2p.holdout_loss" not in file.metadata()

    # A run that was stopped ends with the same loss, and a finished one whose loss is gone computes it again.
    run(source, training, tmp_path / "parts", 2, held)
    run(source, training, tmp_path / "parts", 4, held)
    assert read_losses(tmp_path / "parts" / "work") == losses
    (tmp_path / "parts" / "work" / LOSSES_NAME).unlink()
    run(source, training, tmp_path / "parts", 4, held)
    assert read_losses(tmp_path / "parts" / "work") == losses[-1:]


@pytest.mark.parametrize("changes", [{"window_tokens": 2}, {"noise": "fresh"}, {"sizes_px": (64, 32)}])
def test_the_loss_does_not_depend_on_the_batch(source: Source, corpus: Corpus, changes: dict[str, object]) -> None:
    found = []
    for batch in (1, 2, 5, 64):
        spec = tiny_spec(batch=batch, **changes)
        d = transfer_dimensions(source, spec)
        batches = held_out_batches(corpus, embed_captions(source, corpus), d, spec, ALONE)
        # Twice the same.
        first, second = (mean_loss(batches(), lambda batch: (batch.mixed - batch.wanted[..., :1, :1]).square().mean())
                         for _ in range(2))  # fmt: skip
        assert first == second
        samples = sum(len(part.mixed) for part in batches())
        assert samples == len(corpus) * DRAWS_PER_IMAGE * len(spec.sizes_px)
        found.append(first)
    assert found == pytest.approx(found[:1] * 4, rel=1e-6)


def test_rows_of_later_steps_are_dropped(tmp_path: Path) -> None:
    for step, loss in ((2, 0.5), (4, 0.25), (2, 0.75)):
        append_loss(tmp_path, step, loss)
    assert read_losses(tmp_path) == [(2, 0.75)]
    (tmp_path / LOSSES_NAME).write_text("step,loss\n2,0.5\n4\nx,1\n6,nan\n8,0.125\n")
    assert read_losses(tmp_path) == [(2, 0.5), (8, 0.125)]


def test_sharded_weights_are_not_scored(source: Source, corpus: Corpus, tmp_path: Path) -> None:
    training, held = split_images(corpus, 3, 5)
    with pytest.raises(UsageError, match="cannot draw samples or be scored"):
        run(source, training, tmp_path, 2, held, is_sharded=True)


# A run goes on only with what it began with.


def test_other_held_out_images_are_another_run(source: Source, corpus: Corpus, tmp_path: Path) -> None:
    training, held = split_images(corpus, 3, 5)
    run(source, training, tmp_path, 2, held)
    assert isinstance(held, Corpus)
    with pytest.raises(UsageError, match=r"held_out is digest [0-9a-f]{16}, it began with digest"):
        run(source, training, tmp_path, 4, replace(held, rows=held.rows[::-1]))


def other_captions(folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().split("\n") if line]
    for row in rows:
        row["text"] = "a blue square"
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def other_pictures(folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().split("\n") if line]
    first, second = (folder / row["file_name"] for row in rows[:2])
    first.write_bytes(second.read_bytes())
    del rows[0]["sha256"]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("change", [other_captions, other_pictures])
def test_as_many_other_images_are_another_run(source: Source, tmp_path: Path, change: Callable[[Path], None]) -> None:
    run(source, write_tiny_corpus(tmp_path / "corpus"), tmp_path, 2, None)
    change(tmp_path / "corpus")
    with pytest.raises(UsageError, match=r"corpus is digest [0-9a-f]{16}, it began with digest"):
        run(source, open_corpus(tmp_path / "corpus"), tmp_path, 4, None)


def test_other_scenes_are_another_run(source: Source, tmp_path: Path) -> None:
    scenes = partial(run, source, folder=tmp_path, held=None)
    scenes(images=world_scenes(6, 2), steps=2)
    with pytest.raises(UsageError, match="corpus is digest"):
        scenes(images=world_scenes(6, 3), steps=4)


def test_another_text_encoder_is_another_run(source: Source, corpus: Corpus, tmp_path: Path) -> None:
    run(source, corpus, tmp_path, 2, None)
    folder = tmp_path / "copy"
    shutil.copytree(source.folder, folder)
    run(open_source(folder), corpus, tmp_path, 2, None)
    weights = next((folder / "text_encoder").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-2] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UsageError, match=r"text_encoder is digest [0-9a-f]{16}, it began with digest"):
        run(open_source(folder), corpus, tmp_path, 4, None)


def test_one_run_writes_a_file_of_adapters(source: Source, corpus: Corpus, tmp_path: Path) -> None:
    with (
        locked(tmp_path / ".a.safetensors.lock"),
        pytest.raises(HostError, match=r"another run is writing `.*a\.safetensors`"),
    ):
        run(source, corpus, tmp_path, 2, None)
    assert not (tmp_path / "work").exists()


def run(
    source: Source,
    images: Corpus | RenderedScenes,
    folder: Path,
    steps: int,
    held: Corpus | RenderedScenes | None,
    *,
    is_sharded: bool = False,
) -> Path:
    spec = tiny_spec(steps, save_every=2, noise="fresh")
    ranks = replace(ALONE, is_sharded=is_sharded)
    out = folder / "a.safetensors"
    model = transfer(source, images, spec, out, folder / "work", Silent(), held_out=held, ranks=ranks)
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    return out
