"""Corpora that a source draws: here a stand-in draws renders, right at even numbers and wrong at odd ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import numpy as np
import pytest

from l2p_export.training.corpus.corpus import METADATA_NAME, Row, next_image, open_corpus, read_image
from l2p_export.training.corpus.rendered import world_captions
from l2p_export.training.source import draw
from l2p_export.training.source.draw import Artist, DrawSpec, draw_corpus
from l2p_export.world.captions import describe
from l2p_export.world.judge import judge
from l2p_export.world.render import render
from l2p_export.world.scenes import place
from l2p_runtime.errors import ArtifactError, UsageError
from l2p_runtime.progress import Silent

if TYPE_CHECKING:
    from numpy.typing import NDArray

PROMPTS = world_captions(9, 4)
SILENT = Silent()
SPEC = DrawSpec(64, 64, 2, 1.0, 2.0, batch=2)
SOURCE = SimpleNamespace(folder=Path("nowhere"), transformer=SimpleNamespace(tensors={}))
ARTIST = cast("Artist", SimpleNamespace(source=SOURCE))


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def images(artist: Artist, texts: Sequence[str], seeds: Sequence[int], spec: DrawSpec) -> NDArray[np.uint8]:
        right = [render(place(describe(text), np.random.default_rng(seed)), 64, 64)
                 for text, seed in zip(texts, seeds, strict=True)]  # fmt: skip
        return np.stack([np.zeros_like(image) if seed % 2 else image for image, seed in zip(right, seeds, strict=True)])

    monkeypatch.setattr(draw, "draw_images", images)


def rows_of(folder: Path) -> tuple[Row, ...]:
    return open_corpus(folder).rows


def test_a_judged_corpus_holds_what_shows_its_caption(tmp_path: Path) -> None:
    assert draw_corpus(ARTIST, PROMPTS, 1, 0, SPEC, tmp_path, SILENT, judged=True) == 5
    corpus = open_corpus(tmp_path)
    assert [row.seed for row in corpus.rows] == [0, 2, 4, 6, 8]
    assert [row.text for row in corpus.rows] == list(PROMPTS[::2])
    assert all(judge(read_image(corpus, row), describe(row.text)).passed for row in corpus.rows)
    assert draw_corpus(ARTIST, PROMPTS, 1, 0, SPEC, tmp_path, SILENT, judged=True) == 0


@pytest.mark.parametrize("judged", [True, False])
@pytest.mark.parametrize("kept", [1, 2, 3])
def test_a_stopped_corpus_goes_on_after_its_last_image(tmp_path: Path, kept: int, *, judged: bool) -> None:
    draw_corpus(ARTIST, PROMPTS, 1, 0, SPEC, tmp_path / "whole", SILENT, judged=judged)
    draw_corpus(ARTIST, PROMPTS, 1, 0, SPEC, tmp_path / "stopped", SILENT, judged=judged)
    metadata = tmp_path / "stopped" / METADATA_NAME
    lines = metadata.read_text().splitlines(keepends=True)
    metadata.write_text("".join(lines[:kept]) + lines[kept][:20])
    assert next_image(tmp_path / "stopped") == (2 * kept - 1 if judged else kept)
    draw_corpus(ARTIST, PROMPTS, 1, 0, SPEC, tmp_path / "stopped", SILENT, judged=judged)
    assert rows_of(tmp_path / "stopped") == rows_of(tmp_path / "whole")


def test_a_judged_corpus_is_another_than_an_unjudged_one(tmp_path: Path) -> None:
    draw_corpus(ARTIST, PROMPTS, 1, 0, SPEC, tmp_path, SILENT)
    with pytest.raises(UsageError, match="judged is True, it began with not set"):
        draw_corpus(ARTIST, PROMPTS, 1, 0, SPEC, tmp_path, SILENT, judged=True)


def test_the_judge_refuses_other_captions_before_anything_is_drawn(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a purple elephant"):
        draw_corpus(ARTIST, ["a purple elephant"], 1, 0, SPEC, tmp_path / "out", SILENT, judged=True)
    assert not (tmp_path / "out").exists()


def test_a_last_line_without_a_number_is_named(tmp_path: Path) -> None:
    (tmp_path / METADATA_NAME).write_text('{"file_name": "images/cat.png", "text": "a red circle"}\n')
    with pytest.raises(ArtifactError, match="the last line is damaged"):
        next_image(tmp_path)
