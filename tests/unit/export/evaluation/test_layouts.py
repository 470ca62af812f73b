from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from l2p_export.evaluation.layouts import Layout, read_layout, write_layout
from l2p_runtime.errors import UsageError
from l2p_runtime.progress import Silent
from unit.export.evaluation.fake_drawers import SIZE_PX, FakeModel, plain

ROWS = (
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "colors", "include": [{"class": "caf\u00e9", "count": 1, "color": "red"}], "prompt": "a red caf\u00e9"},
)


def _geneval_file(folder: Path) -> Path:
    path = folder / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS) + "\n", encoding="utf-8")
    return path


def _dpg_folder(folder: Path) -> Path:
    (folder / "prompts").mkdir()
    for name, text in (("partiprompts9", "a tower\n"), ("COCOval2014000000000042", "a cat, asleep")):
        (folder / "prompts" / f"{name}.txt").write_text(text, encoding="utf-8")
    (folder / "prompts" / "notes.md").write_text("no prompt")
    return folder / "prompts"


def _files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# GenEval.


def test_geneval_reads_every_image_with_its_row(tmp_path: Path) -> None:
    layout = read_layout("geneval", _geneval_file(tmp_path), 4, 10)
    out = tmp_path / "out"
    assert write_layout(layout, FakeModel(plain).drawer(), out, Silent()) == 8
    seen = []
    # As evaluate_images.py goes through its folder.
    for folder in sorted(out.iterdir()):
        if not folder.is_dir() or not folder.name.isdigit():
            continue
        with (folder / "metadata.jsonl").open() as file:
            row = json.load(file)
        for image in sorted((folder / "samples").iterdir()):
            assert re.match(r"\d+\.png", image.name)
            seen.append((row, int(np.asarray(Image.open(image)).mean())))
    assert seen == [(ROWS[0], seed) for seed in (10, 11, 12, 13)] + [(ROWS[1], seed) for seed in (14, 15, 16, 17)]
    assert {"00000/samples/00000.png", "00001/samples/00003.png", "00001/metadata.jsonl"} <= _files(out)


def test_pictures_say_what_they_are_of(tmp_path: Path) -> None:
    write_layout(read_layout("geneval", _geneval_file(tmp_path), 1, 3), FakeModel(plain).drawer(), tmp_path, Silent())
    with Image.open(tmp_path / "00001" / "samples" / "00000.png") as image:
        assert (image.text["prompt"], image.text["seed"]) == ("a red caf\u00e9", "4")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no prompt"),
        ("\n\n", "holds no prompt"),
        ('{"prompt": "a", "tag": "b"}\n{"prompt": \n', "line 2 is no JSON"),
        ('{"prompt": "a", "tag": "b"}\n\n{"tag": "b"}\n', "line 3 has no text `prompt`"),
        ('{"prompt": "a"}\n', "line 1 has no text `tag`"),
        ('["prompt", "tag"]\n', "line 1 has no text `prompt`"),
        ('{"prompt": 3, "tag": "b"}\n', "line 1 has no text `prompt`"),
        ("[" * 100_000, "line 1 is no JSON"),
        (None, "cannot read prompts"),
    ],
)
def test_files_that_are_not_genevals_are_refused(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match=message) as caught:
        read_layout("geneval", path, 4, 0)
    assert "evaluation_metadata.jsonl" in caught.value.hint


# DPG-Bench.


def test_dpg_bench_cuts_four_images_from_each_file(tmp_path: Path) -> None:
    layout = read_layout("dpg", _dpg_folder(tmp_path), 4, 10)
    out = tmp_path / "out"
    assert write_layout(layout, FakeModel(plain).drawer(), out, Silent()) == 8
    assert _files(out) == {"COCOval2014000000000042.png", "partiprompts9.png", "settings.json"}
    side = SIZE_PX
    for name, first in (("COCOval2014000000000042", 10), ("partiprompts9", 14)):
        with Image.open(out / f"{name}.png") as grid:
            assert grid.size == (2 * side, 2 * side)
            # The squares of compute_dpg_bench.py for `--pic-num 4 --resolution 64`.
            corners = [(0, 0), (side, 0), (0, side), (side, side)]
            colours = [np.unique(np.asarray(grid.crop((x, y, x + side, y + side)))).tolist() for x, y in corners]
        assert colours == [[first], [first + 1], [first + 2], [first + 3]]


def test_dpg_bench_takes_squares_alone(tmp_path: Path) -> None:
    layout = read_layout("dpg", _dpg_folder(tmp_path), 4, 0)
    with pytest.raises(UsageError, match="64x128"):
        write_layout(layout, FakeModel(plain).drawer(128, 64), tmp_path / "out", Silent())
    assert not (tmp_path / "out").exists()


def test_folders_that_are_not_dpg_benchs_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    for message in ("it is no folder", "holds no .txt file"):
        with pytest.raises(UsageError, match=message):
            read_layout("dpg", folder, 4, 0)
        folder.mkdir(exist_ok=True)
    (folder / "1.txt").write_text(" \n")
    with pytest.raises(UsageError, match=r"1.txt` holds no prompt"):
        read_layout("dpg", folder, 4, 0)
    (folder / "1.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"1.txt` is UTF-16, expected UTF-8"):
        read_layout("dpg", folder, 4, 0)
    (folder / "1.txt").rename(folder / "1.a.txt")
    with pytest.raises(UsageError, match="a dot in its name"):
        read_layout("dpg", folder, 4, 0)


@pytest.mark.parametrize(("benchmark", "images", "seed"), [("dpg", 3, 0), ("geneval", 0, 0), ("geneval", 4, 2**64 - 1)])
def test_counts_and_seeds_that_do_not_work_are_refused(tmp_path: Path, benchmark: str, images: int, seed: int) -> None:
    path = _geneval_file(tmp_path) if benchmark == "geneval" else _dpg_folder(tmp_path)
    with pytest.raises(UsageError, match=r"images per prompt|seed is"):
        read_layout(benchmark, path, images, seed)


def test_an_unknown_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no layout 'coco'"):
        read_layout("coco", tmp_path, 4, 0)


# Both.


def _layouts(folder: Path) -> list[Layout]:
    return [read_layout("geneval", _geneval_file(folder), 4, 10), read_layout("dpg", _dpg_folder(folder), 4, 10)]


@pytest.mark.parametrize("which", [0, 1])
def test_a_stopped_run_goes_on_with_the_next_picture(tmp_path: Path, which: int) -> None:
    layout = _layouts(tmp_path)[which]
    with pytest.raises(KeyboardInterrupt):
        write_layout(layout, FakeModel(plain, stop_at=6).drawer(), tmp_path / "a", Silent())
    resumed = FakeModel(plain)
    # Two images of a grid that was not finished are drawn again.
    assert write_layout(layout, resumed.drawer(), tmp_path / "a", Silent()) == (2, 4)[which]
    assert resumed.seeds == ([16, 17], [14, 15, 16, 17])[which]
    assert write_layout(layout, resumed.drawer(), tmp_path / "a", Silent()) == 0
    write_layout(layout, FakeModel(plain).drawer(), tmp_path / "b", Silent())
    assert _files(tmp_path / "a") == _files(tmp_path / "b")
    for name in _files(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("which", [0, 1])
def test_images_of_other_settings_are_not_mixed(tmp_path: Path, which: int) -> None:
    layout = _layouts(tmp_path)[which]
    write_layout(layout, FakeModel(plain).drawer(), tmp_path / "out", Silent())
    other = FakeModel(plain, settings={"model_sha256": "another"})
    with pytest.raises(UsageError, match="other settings"):
        write_layout(layout, other.drawer(), tmp_path / "out", Silent())
    assert other.seeds == []
