"""What a transfer learns from: files that are read once, and scenes that no disk holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fakes.sources import tiny_spec, write_tiny_corpus, write_tiny_source
from l2p_export.training.corpus import reader
from l2p_export.training.corpus.corpus import Corpus, Row, open_corpus, read_image, write_image
from l2p_export.training.corpus.reader import image_reader
from l2p_export.training.corpus.rendered import render_corpus, world_captions, world_scenes
from l2p_export.training.loop.loop import CPU
from l2p_export.training.transfer.train import transfer
from l2p_runtime.errors import UsageError
from l2p_runtime.progress import Silent

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read, in order."""
    names: list[str] = []

    def counted(corpus: Corpus, row: Row) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        names.append(row.file_name)
        return read_image(corpus, row)

    monkeypatch.setattr(reader, "read_image", counted)
    return names


def test_scenes_are_the_corpus_that_would_be_rendered(tmp_path: Path) -> None:
    scenes = world_scenes(5, 11)
    render_corpus(world_captions(5, 11), 1, 11, (96, 96), tmp_path, Silent())
    corpus = open_corpus(tmp_path)
    assert [row.text for row in scenes.rows] == [row.text for row in corpus.rows]
    rendered, read = (image_reader(images, CPU)([4, 0, 2], 96) for images in (scenes, corpus))
    assert rendered.shape == (3, 3, 96, 96)
    assert rendered.equal(read)


def test_files_are_read_once(tmp_path: Path, reads: list[str]) -> None:
    corpus = write_tiny_corpus(tmp_path)
    read = image_reader(corpus, CPU)
    first = read([0, 3, 0], 32)
    again = read([3, 0], 32)
    assert len(reads) == 2
    assert again[0].equal(first[1])
    assert again[1].equal(first[0])


def test_what_does_not_fit_is_read_again(tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = write_tiny_corpus(tmp_path)
    height, width, _ = read_image(corpus, corpus.rows[0]).shape
    monkeypatch.setattr(reader, "KEPT_BYTES", 3 * height * width)
    read = image_reader(corpus, CPU)
    first, again = read([0, 2, 4], 32), read([0, 2, 4], 32)
    assert again.equal(first)
    kept, *others = (corpus.rows[place].file_name for place in (0, 2, 4))
    assert reads == [kept, *others, *others]


def test_what_is_kept_is_bounded_for_images_of_any_size(
    tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small image after a large one: together they are more than what is kept."""
    large, small = np.zeros((90, 90, 3), np.uint8), np.zeros((30, 30, 3), np.uint8)
    rows = [write_image(tmp_path, index, pixels, "black", None) for index, pixels in enumerate((large, small))]
    read = image_reader(Corpus(tmp_path, tuple(rows)), CPU)
    monkeypatch.setattr(reader, "KEPT_BYTES", large.size + small.size - 1)
    for _ in range(2):
        read([0, 1], 32)
    assert reads == [rows[0].file_name, rows[1].file_name, rows[1].file_name]


def test_scenes_train_adapters(tmp_path: Path) -> None:
    source, scenes = write_tiny_source(tmp_path / "source"), world_scenes(40, 2)
    out = tmp_path / "a.safetensors"
    model = transfer(source, scenes, tiny_spec(noise="fresh"), out, tmp_path / "work", Silent())
    assert out.is_file()
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_scenes_do_not_go_on_from_a_corpus_of_as_many(tmp_path: Path) -> None:
    source, spec = write_tiny_source(tmp_path / "source"), tiny_spec(steps=1, noise="fresh")
    rest = (spec, tmp_path / "a.safetensors", tmp_path / "work", Silent())
    transfer(source, write_tiny_corpus(tmp_path / "corpus", 6), *rest)
    with pytest.raises(UsageError, match="scenes is True, it began with not set"):
        transfer(source, world_scenes(6, 2), *rest)


def test_scenes_have_no_stored_noise(tmp_path: Path) -> None:
    source, scenes = write_tiny_source(tmp_path / "source"), world_scenes(4, 2)
    with pytest.raises(UsageError, match="`scene 0` has no seed, which --noise stored needs"):
        transfer(source, scenes, tiny_spec(noise="stored"), tmp_path / "a.safetensors", tmp_path / "work", Silent())
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(("count", "seed"), [(0, 0), (-1, 0), (3, -1), (3, 1 << 64)])
def test_no_scenes(count: int, seed: int) -> None:
    with pytest.raises(UsageError):
        world_scenes(count, seed)
