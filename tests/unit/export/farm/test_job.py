"""What every job refuses, and prompts in a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l2p_export.farm import MANAGERS, Argument, Needs, write_job
from l2p_export.farm.job import PROMPTS, with_prompts_file
from l2p_runtime.errors import UsageError
from l2p_runtime.frames.prompts import read_prompts
from unit.export.farm.jobs import make_job

FOLDER = Path("/jobs/sh 010")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"name": " "}, "--name is empty"),
        ({"name": "x" * 129}, "129 characters, expected up to 128"),
        ({"name": "a\nb"}, r"U\+000A at 2"),
        ({"pattern": "shot.exr"}, "expected a name with ####"),
        ({"chunk": 0}, "--chunk is 0, expected 1 or more"),
        ({"timeout_seconds": 0}, "--timeout is 0"),
        ({"notice_seconds": 601}, "expected 1 to 600 seconds"),
        ({"bundle": Path("/a\x7fb")}, r"BUNDLE has the character U\+007F"),
    ],
)
def test_what_no_manager_takes_is_refused(changes: dict[str, object], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        make_job(**changes)


@pytest.mark.parametrize("text", ["a\0b", "\x1b[1m", "\ud800", "\uffff", "\x85"])
def test_characters_that_a_job_cannot_pass_on_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"--prompt has the character U\+"):
        Argument("--prompt", text, "text")


def test_a_relative_file_is_refused() -> None:
    with pytest.raises(UsageError, match="expected an absolute path"):
        Argument("--embeddings", "x.npy", "file")


def test_needs_are_rounded_up() -> None:
    needs = Needs((5 << 20) + 1, 1)
    assert (needs.memory_mib, needs.gpu_memory_mib) == (6, 1)


@given(st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs"))).filter(lambda text: "\uffff" not in text))
def test_a_prompt_in_a_file_is_the_prompt(text: str) -> None:
    job = make_job(frames="3,1", arguments=(Argument("--prompt", "", "text"), Argument("--steps", "4", "word")))
    job = make_job(frames="3,1", arguments=(*_with_prompt(text), *job.arguments[1:]))
    moved, lines = with_prompts_file(job, FOLDER)
    assert [argument.option for argument in moved.arguments] == ["--steps", "--prompts"]
    assert moved.arguments[-1].value == str(FOLDER / PROMPTS)
    assert [json.loads(line) for line in lines.splitlines()] == [{"frame": frame, "prompt": text} for frame in (1, 3)]


def _with_prompt(text: str) -> tuple[Argument, ...]:
    try:
        return (Argument("--prompt", text, "text"),)
    except UsageError:
        return (Argument("--prompt", "", "text"),) if not text else pytest.fail(f"{text!r} was refused")


@pytest.mark.parametrize("manager", MANAGERS)
def test_a_long_prompt_is_written_beside_the_job(manager: str, tmp_path: Path) -> None:
    prompt = "a circle, " * 300
    job = make_job(prompt, folder=tmp_path / "frames")
    files = write_job(manager, job, tmp_path / "job")
    assert tmp_path / "job" / PROMPTS in files
    lines = read_prompts(tmp_path / "job" / PROMPTS)
    assert {line.prompt for line in lines.values()} == {prompt}
    assert list(lines) == list(job.frames)


@pytest.mark.parametrize("manager", MANAGERS)
def test_a_dry_run_writes_nothing(manager: str, tmp_path: Path) -> None:
    files = write_job(manager, make_job(folder=tmp_path / "frames"), tmp_path / "job", dry_run=True)
    assert files
    assert not list(tmp_path.iterdir())


def test_a_long_prompt_beside_a_prompts_file_is_refused() -> None:
    job = make_job("x" * 2000)
    job = make_job(arguments=(*job.arguments, Argument("--prompts", "/p.jsonl", "file")))
    with pytest.raises(UsageError, match="--prompts is given too"):
        MANAGERS["openjd"](job, FOLDER)
