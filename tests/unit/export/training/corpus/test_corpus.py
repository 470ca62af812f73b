"""A corpus on disk: what is written is read back, and what is damaged is named."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from l2p_export.training.corpus.corpus import (
    append_rows,
    open_corpus,
    read_image,
    write_image,
    written_rows,
)
from l2p_export.training.corpus.rendered import render_corpus, world_captions
from l2p_export.training.loop.settings import differing_settings
from l2p_export.world.captions import describe
from l2p_export.world.judge import judge
from l2p_runtime.errors import ArtifactError, HostError, UsageError
from l2p_runtime.progress import Silent

PROMPTS = world_captions(3, 7)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "corpus"
    assert render_corpus(PROMPTS, 2, 0, (96, 128), made, Silent()) == 6
    return made


def test_renders_show_what_their_captions_say(folder: Path) -> None:
    corpus = open_corpus(folder)
    assert [row.text for row in corpus.rows] == [text for text in PROMPTS for _ in range(2)]
    for row in corpus.rows:
        image = read_image(corpus, row)
        assert image.shape == (96, 128, 3)
        assert judge(image, describe(row.text)).passed
    assert len({row.sha256 for row in corpus.rows}) == 6


def test_a_stopped_run_goes_on(folder: Path) -> None:
    whole = (folder / "metadata.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    # A kill in the middle of a line, and of an image.
    (folder / "metadata.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:20])
    (folder / json.loads(lines[3])["file_name"]).write_bytes(b"half")
    assert render_corpus(PROMPTS, 2, 0, (96, 128), folder, Silent()) == 3
    assert (folder / "metadata.jsonl").read_bytes() == whole
    corpus = open_corpus(folder)
    assert all(read_image(corpus, row).size for row in corpus.rows)


def test_other_settings_are_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="seeds_per_prompt is 3, it began with 2"):
        render_corpus(PROMPTS, 3, 0, (96, 128), folder, Silent())


def remove_image(folder: Path) -> None:
    (folder / "images" / "00" / "00000002.png").unlink()


def add_line(text: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        with (folder / "metadata.jsonl").open("a") as file:
            file.write(text + "\n")

    return damage


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (remove_image, "line 3: `images/00/00000002.png` is missing"),
        (add_line("{"), "line 7: "),
        (add_line("[]"), "line 7: no JSON object"),
        (add_line('{"text": "a"}'), "line 7: `file_name` is missing, expected text"),
        (add_line('{"file_name": "a.png"}'), "line 7: `text` is missing, expected text"),
        (add_line('{"file_name": "images/00/00000000.png", "text": 3}'), "line 7: `text` is 3, expected text"),
        (
            add_line('{"file_name": "images/00/00000000.png", "text": " "}'),
            "line 7: `text` is ' ', expected .* not empty",
        ),
        (add_line('{"file_name": "a.png", "text": "\\ud83d"}'), "line 7: `text` has half of a surrogate pair"),
        (add_line('{"file_name": "a\\u0000.png", "text": "a"}'), "line 7: .* is no path: embedded null"),
        (add_line('{"file_name": "%s", "text": "a"}' % ("a" * 300)), "line 7: .* is no path: .*name too long"),
        (add_line('{"file_name": "images", "text": "a"}'), "line 7: `images` is missing"),
        (add_line('{"file_name": "images/00/00000003.png", "text": "a"}'), "line 7: .* is also the file of line 4"),
        (add_line('{"file_name": "./images/../images/00/00000003.png", "text": "a"}'), "is also the file of line 4"),
        (add_line('{"file_name": "images/00/00000000.png", "text": "a", "seed": -1}'), "line 7: `seed` is -1"),
        (add_line('{"file_name": "images/00/00000000.png", "text": "a", "seed": true}'), "line 7: `seed` is True"),
        (add_line('{"file_name": "../../etc/passwd", "text": "a"}'), "leaves the folder"),
        (add_line('{"file_name": "/etc/passwd", "text": "a"}'), "leaves the folder"),
        (add_line("[" * 100_000), "line 7: "),
    ],
)
def test_damaged_rows_are_named(folder: Path, damage: Callable[[Path], None], says: str) -> None:
    damage(folder)
    with pytest.raises(ArtifactError, match=says):
        open_corpus(folder)


def test_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8)).save(secret)
    path = folder / "images" / "00" / "00000001.png"
    path.unlink()
    path.symlink_to(secret)
    with pytest.raises(ArtifactError, match="leaves the folder"):
        open_corpus(folder)


@pytest.mark.parametrize("data", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + bytes(50)])
def test_damaged_images_are_refused(folder: Path, data: bytes) -> None:
    corpus = open_corpus(folder)
    path = folder / corpus.rows[0].file_name
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="is not the file that its row was written for"):
        read_image(corpus, corpus.rows[0])
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    del rows[0]["sha256"]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = open_corpus(folder)
    with pytest.raises(ArtifactError, match="no readable image"):
        read_image(corpus, corpus.rows[0])


def test_folders_of_other_tools_are_read(tmp_path: Path) -> None:
    """Hugging Face's image folders: `file_name` and `text` alone."""
    Image.new("RGBA", (20, 10), (255, 0, 0, 128)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "red"}\n\n')
    corpus = open_corpus(tmp_path)
    assert (len(corpus), corpus.rows[0].seed) == (1, None)
    assert read_image(corpus, corpus.rows[0]).shape == (10, 20, 3)


def test_links_are_followed_within_the_folder(folder: Path) -> None:
    (folder / "a.png").symlink_to(folder / "images" / "00" / "00000002.png")
    add_line('{"file_name": "a.png", "text": "a"}')(folder)
    with pytest.raises(ArtifactError, match=r"line 7: `a\.png` is also the file of line 3"):
        open_corpus(folder)
    (folder / "a.png").unlink()
    (folder / "a.png").symlink_to(folder / "a.png")
    with pytest.raises(ArtifactError, match=r"line 7: .*a.png.* is no path"):
        open_corpus(folder)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("caption", ["a\u2028cat", "a\x85cat", "a\x0bcat\x0c", "a\rcat"])
def test_captions_may_hold_other_line_separators(tmp_path: Path, caption: str, end: str) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    rows = [{"file_name": name, "text": caption, "license": "CC0", "seed": None} for name in ("a.png", "b.png")]
    text = "\ufeff" + end.join(json.dumps(row, ensure_ascii=False) for row in rows)
    if any(ord(character) < 32 for character in caption):  # not valid inside of JSON text
        text = "\ufeff" + end.join(json.dumps(row) for row in rows)
    (tmp_path / "metadata.jsonl").write_bytes(text.encode())
    assert [(row.file_name, row.text) for row in open_corpus(tmp_path).rows] == [("a.png", caption), ("b.png", caption)]


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_other_encodings_are_refused(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "metadata.jsonl").write_bytes('{"file_name": "a.png", "text": "café"}\n'.encode(encoding))
    with pytest.raises(ArtifactError, match=r"is UTF-16, expected UTF-8|is not UTF-8: byte 0xe9 in line 1"):
        open_corpus(tmp_path)


def test_absent_and_empty_corpora(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no corpus"):
        open_corpus(tmp_path)
    (tmp_path / "metadata.jsonl").write_text("\n")
    with pytest.raises(ArtifactError, match="lists no image"):
        open_corpus(tmp_path)


def test_full_disk_keeps_what_was_written(folder: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    image = np.zeros((8, 8, 3), np.uint8)
    with patch("os.fsync", side_effect=full), pytest.raises(HostError, match="No space left"):
        write_image(folder, 6, image, "a", 1)
    with patch.object(Path, "open", side_effect=full), pytest.raises(HostError, match="No space left"):
        append_rows(folder, [])
    assert written_rows(folder) == 6
    assert not list(folder.rglob("*.partial"))


flat_settings = st.dictionaries(st.text(max_size=4), st.integers() | st.text(max_size=4) | st.none(), max_size=4)


@settings(max_examples=50, deadline=None)
@given(flat_settings, flat_settings)
def test_differences_are_those_that_differ(before: dict[str, object], wanted: dict[str, object]) -> None:
    expected = {key for key in before | wanted if before.get(key) != wanted.get(key)}
    lines = differing_settings({"in": before}, {"in": wanted})
    assert len(lines) == len(expected)
    assert all(line.startswith("in.") for line in lines)
