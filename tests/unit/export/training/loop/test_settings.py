"""Folders that one command writes at a time, and only with the settings that it began with."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from l2p_engines.store.locks import locked
from l2p_export.evaluation.layouts import read_layout, write_layout
from l2p_export.evaluation.scores import draw_all, evaluate, world_prompts
from l2p_export.training.corpus.corpus import open_corpus
from l2p_export.training.corpus.rendered import render_corpus, world_captions
from l2p_export.training.loop.settings import LOCK_NAME, locked_folder, require_settings
from l2p_runtime.errors import ArtifactError, HostError, UsageError
from l2p_runtime.files import partial_path
from l2p_runtime.progress import Silent
from unit.export.evaluation.fake_drawers import FakeModel, plain, rendered

SILENT = Silent()
PROMPTS = world_prompts(4, 0, held_out=False)


def corpus(folder: Path) -> None:
    render_corpus(world_captions(3, 7), 1, 0, (32, 32), folder, SILENT)


def scores(folder: Path) -> None:
    evaluate(PROMPTS, draw_all(FakeModel(rendered()).drawer(), PROMPTS, folder, SILENT))


def layout(folder: Path) -> None:
    prompts = folder.with_name("prompts.jsonl")
    prompts.write_text('{"prompt": "a red circle", "tag": "single_object"}\n')
    write_layout(read_layout("geneval", prompts, 2, 0), FakeModel(plain).drawer(), folder, SILENT)


WRITERS: dict[str, Callable[[Path], None]] = {"corpus": corpus, "scores": scores, "layout": layout}


@pytest.mark.parametrize("name", WRITERS)
def test_a_folder_has_one_writer(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    with locked(folder / LOCK_NAME), pytest.raises(HostError, match=r"another command is writing `.*out`"):
        WRITERS[name](folder)
    assert not list(folder.iterdir())
    WRITERS[name](folder)
    assert not (folder / LOCK_NAME).exists()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    WRITERS[name](folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_two_processes_leave_one_corpus(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from l2p_export.cli.main import run; "
        "sys.argv = ['l2p-export', 'train', 'corpus', '--count', '40', '--size', '32x32', '--quiet', '--out', "
        f"{str(tmp_path / 'c')!r}]; run()"
    )
    both = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            for _ in range(2)]  # fmt: skip
    ends = sorted(process.wait() for process in both)
    # The second may begin when the first has ended.
    assert ends in ([0, 3], [0, 0])
    rows = open_corpus(tmp_path / "c").rows
    assert [row.file_name for row in rows] == [f"images/00/{number:08}.png" for number in range(40)]


def test_leftovers_of_killed_writers_are_removed(tmp_path: Path) -> None:
    corpus(tmp_path / "c")
    left = [partial_path(tmp_path / "c" / "metadata.jsonl"), partial_path(tmp_path / "c" / "images" / "00" / "1.png")]
    for path in left:
        path.write_bytes(b"half")
    corpus(tmp_path / "c")
    assert not any(path.exists() for path in left)


def test_a_folder_that_stays_empty_is_removed(tmp_path: Path) -> None:
    with pytest.raises(UsageError), locked_folder(tmp_path / "a" / "b"):
        raise UsageError("not this time")
    assert not (tmp_path / "a").exists()
    (tmp_path / "a").mkdir()
    with locked_folder(tmp_path / "a"):
        pass
    assert (tmp_path / "a").is_dir()


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(HostError, match="cannot write"), locked_folder(tmp_path / "file"):
        pass


@pytest.mark.parametrize(
    "other",
    [
        partial(render_corpus, world_captions(3, 8), 1, 0, (32, 32)),
        partial(render_corpus, world_captions(3, 7)[::-1], 1, 0, (32, 32)),
    ],
)
def test_as_many_other_prompts_are_another_corpus(tmp_path: Path, other: Callable[..., int]) -> None:
    corpus(tmp_path / "c")
    with pytest.raises(UsageError, match=r"prompts is digest [0-9a-f]{16}, it began with digest [0-9a-f]{16}"):
        other(tmp_path / "c", SILENT)


def test_a_users_own_images_are_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a cat"}\n')
    for write in (corpus, scores):
        with pytest.raises(UsageError, match=r"has a metadata\.jsonl that no command wrote"):
            write(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def test_images_of_another_prompt_are_not_scored(tmp_path: Path) -> None:
    scores(tmp_path)
    path = tmp_path / "metadata.jsonl"
    rows = [json.loads(line) for line in path.read_text().split("\n") if line]
    for changed in ({**rows[1], "text": "a blue circle"}, {**rows[1], "seed": 77}):
        path.write_text("".join(json.dumps(row) + "\n" for row in (rows[0], changed, *rows[2:])))
        with pytest.raises(ArtifactError, match=r"image 2, of .* is not one of this evaluation"):
            scores(tmp_path)
    path.write_text("".join(json.dumps(row) + "\n" for row in (*rows, *rows)))
    with pytest.raises(ArtifactError, match="is also the file of line 1"):
        scores(tmp_path)


def test_equal_settings_are_taken_up(tmp_path: Path) -> None:
    require_settings(tmp_path, {"seed": 1, "sizes": (1, 2)})
    require_settings(tmp_path, {"seed": 1, "sizes": [1, 2]})
    with pytest.raises(UsageError, match="seed is 2, it began with 1"):
        require_settings(tmp_path, {"seed": 2, "sizes": (1, 2)})
