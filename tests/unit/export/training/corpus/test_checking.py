"""Images are checked before a run: all faults at once, what is done to each, and a digest that tells corpora apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from l2p_export.training.corpus.checking import check_images, images_digest
from l2p_export.training.corpus.corpus import Corpus, open_corpus, read_image
from l2p_export.training.corpus.rendered import world_scenes
from l2p_runtime.errors import ArtifactError
from l2p_runtime.progress import Silent

SIZES = ((64, 64), (80, 64), (40, 50), (64, 200))
"""Width and height."""


def write(folder: Path, **keys: object) -> Corpus:
    """A user's own images, `keys` in each line."""
    folder.mkdir(exist_ok=True)
    random, rows = np.random.default_rng(0), []
    for index, (width, height) in enumerate(SIZES):
        image = Image.fromarray(random.integers(0, 256, (height, width, 3)).astype(np.uint8))
        exif = Image.Exif()
        if index == 1:
            exif[0x0112] = 6
        if index == 2:
            image.putalpha(100)
        image.save(folder / f"{index}.png", exif=exif)
        rows.append({"file_name": f"{index}.png", "text": f"picture {index}", **keys})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_corpus(folder)


def test_what_is_done_to_images_is_counted(tmp_path: Path) -> None:
    checked = check_images(write(tmp_path), 64, Silent())
    wanted = {"upscaled": 1, "cropped to squares": 3, "turned upright": 1, "put on white": 1}
    assert checked.counts == wanted | {"converted to sRGB": 0, "reduced to 8 bits": 0}
    assert checked.text == "4 images: 1 upscaled, 3 cropped to squares, 1 turned upright, 1 put on white"


def test_images_that_stay_as_they_are(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "black"}')
    assert check_images(open_corpus(tmp_path), 32, Silent()).text == "1 images: none upscaled, cropped or converted"


def test_every_fault_is_said_before_the_first_step(tmp_path: Path) -> None:
    corpus = write(tmp_path)
    (tmp_path / "0.png").write_bytes(b"")
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:200])
    with pytest.raises(ArtifactError, match=r"2 of 4 images cannot be trained on: .*0\.png.*; .*3\.png"):
        check_images(corpus, 64, Silent())


def test_a_picture_too_narrow_to_resize_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (1, 5000)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a line"}')
    corpus = open_corpus(tmp_path)
    assert check_images(corpus, 32, Silent()).counts["upscaled"] == 1
    with pytest.raises(ArtifactError, match="has 1x5000 pixels, too narrow to be resized to 1024 px"):
        check_images(corpus, 1024, Silent())


def test_a_file_that_changes_after_the_check_is_refused(tmp_path: Path) -> None:
    images = check_images(write(tmp_path), 64, Silent()).images
    assert isinstance(images, Corpus)
    Image.new("RGB", (64, 64)).save(tmp_path / "0.png")
    with pytest.raises(ArtifactError, match="is not the file that its row was written for"):
        read_image(images, images.rows[0])


def other_content(folder: Path) -> None:
    Image.new("RGB", (64, 64)).save(folder / "0.png")


def swapped_files(folder: Path) -> None:
    (folder / "0.png").rename(folder / "x")
    (folder / "1.png").rename(folder / "0.png")
    (folder / "x").rename(folder / "1.png")


def swapped_lines(folder: Path) -> None:
    first, second, *rest = (folder / "metadata.jsonl").read_text().splitlines(keepends=True)
    (folder / "metadata.jsonl").write_text("".join([second, first, *rest]))


def other_text(old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "metadata.jsonl"
        path.write_text(path.read_text().replace(old, new))

    return change


@pytest.mark.parametrize(
    "change",
    [
        other_content,
        swapped_files,
        swapped_lines,
        other_text("picture 2", "picture 5"),
        other_text('"text": "picture 2"', '"text": "picture 2", "seed": 4'),
    ],
)
def test_other_rows_or_files_have_another_digest(tmp_path: Path, change: Callable[[Path], None]) -> None:
    before = images_digest(write(tmp_path))
    change(tmp_path)
    assert images_digest(open_corpus(tmp_path)) != before


def test_what_trains_the_same_has_the_same_digest(tmp_path: Path) -> None:
    corpus = write(tmp_path / "a")
    before = images_digest(corpus)
    assert images_digest(check_images(corpus, 64, Silent()).images) == before
    assert images_digest(write(tmp_path / "b", license="CC0", width=7)) == before
    (tmp_path / "b" / "0.png").rename(tmp_path / "b" / "renamed.png")
    other_text("0.png", "renamed.png")(tmp_path / "b")
    assert images_digest(open_corpus(tmp_path / "b")) == before


def test_scenes_have_a_digest() -> None:
    scenes = world_scenes(6, 2)
    assert check_images(scenes, 64, Silent()).counts == {}
    assert images_digest(scenes) == images_digest(world_scenes(6, 2))
    moved = replace(scenes, scenes=(*scenes.scenes[:-1], replace(scenes.scenes[-1], background="grey")))
    digests = {images_digest(found) for found in (scenes, moved, world_scenes(6, 3), world_scenes(7, 2))}
    assert len(digests) == 4
