"""Outputs that overlap inputs are refused before anything is written, by every command that has an output."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from conftest import run_cli
from l2p_export.cli.main import main
from l2p_export.cli.outputs import require_apart
from l2p_runtime.errors import UsageError

CONTENT = b"what a user would miss"

INPUTS = {
    "import": ("CHECKPOINT", "--source", "--lora"),
    "build": ("CHECKPOINT", "--source", "--lora", "--text-encoder", "--plan", "--statistics", "--profile"),
    "generate": ("BUNDLE", "--embeddings", "--negative-embeddings", "--prompts", "--store"),
    "farm": ("BUNDLE", "--embeddings", "--negative-embeddings", "--prompts", "--store"),
    "generate --server http://127.0.0.1:9": ("--embeddings", "--negative-embeddings"),
    "calibrate": ("BUNDLE", "--prompts", "--store"),
    "pack": ("BUNDLE", "--store"),
    "eval": ("MODEL", "--prompts", "--store"),
    "triton write": ("BUNDLE", "--store"),
    "train source": ("--init",),
    "train corpus": ("SOURCE", "--prompts"),
    "train transfer": ("SOURCE", "--corpus", "--init"),
}
"""Command to what it reads; every command that has `--out`."""

OUTPUTS = {
    "build": ("--out", "--store", "--timing-cache"),
    "calibrate": ("--out", "--sensitivity"),
    "train source": ("--out", "--work"),
    "train transfer": ("--out", "--work"),
}
"""Command to the options that name what it writes; `--out` alone for others."""

SUFFIXES = {"import": ".safetensors", "generate": ".png", "train transfer": ".safetensors"}
"""Suffix that `--out` has to have."""

NEEDED = {
    "build": ("--profile", "4k"),
    "train transfer": (),
    "eval": (),
    "farm": ("--manager", "openjd", "--frames", "1"),
}


def commands(group: click.Command = main, words: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    """Every command under its words."""
    if isinstance(group, click.Group):
        context = click.Context(group)
        for name in group.list_commands(context):
            found = group.get_command(context, name)
            assert found is not None
            yield from commands(found, (*words, name))
    else:
        yield " ".join(words), group


def test_the_table_has_every_command_with_an_output() -> None:
    written = {
        name: tuple(p.opts[0] for p in command.params if p.opts[0] in ("--out", "--work", "--sensitivity"))
        for name, command in commands()
    }
    assert {name for name, options in written.items() if options} == {name.partition(" --")[0] for name in INPUTS}
    for name, options in written.items():
        assert set(options) <= set(OUTPUTS.get(name, ("--out",)))


def test_the_table_has_every_input() -> None:
    outputs = {"--out", "--work", "--sensitivity", "--timing-cache", "--worker"}
    for name, command in commands():
        paths = {
            param.opts[0] if isinstance(param, click.Option) else param.human_readable_name
            for param in command.params
            if isinstance(param.type, click.Path) or param.name == "loras"
        }
        if name in INPUTS:
            assert paths - outputs - {"--store" if name == "build" else ""} <= {*INPUTS[name]}, name


TABLE = [
    (command, source, output)
    for command, sources in INPUTS.items()
    for source in sources
    for output in OUTPUTS.get(command, ("--out",))
]


@pytest.mark.parametrize(("command", "source", "output"), TABLE)
@pytest.mark.parametrize("overlap", ["is", "links to", "is a hard link of", "lies in", "contains"])
def test_an_output_that_is_an_input(command: str, source: str, output: str, overlap: str, tmp_path: Path) -> None:
    name = command.partition(" --")[0]
    suffix = SUFFIXES.get(name, "") if output == "--out" else ""
    read, written = overlapping(tmp_path, overlap, suffix)
    (tmp_path / "other").touch()
    before = snapshot(tmp_path)
    arguments = [*command.split(), *NEEDED.get(name, ())]
    if any(argument.isupper() for argument in INPUTS[command]):
        arguments.append(str(read if source.isupper() else tmp_path / "other"))
    if not source.isupper():
        arguments += [source, f"{read}:0.8" if source == "--lora" else str(read)]
    if output != "--out":
        arguments += ["--out", str(tmp_path / f"new{SUFFIXES.get(name, '')}")]
    result = run_cli(*arguments, output, written)
    assert result.returncode == 2, result.stderr
    assert snapshot(tmp_path) == before
    if "which is read" not in result.stderr:
        # A check of what may be at --out that comes first.
        assert any(text in result.stderr for text in ("is a folder", "expected a file name", "is a file")), (
            result.stderr
        )


def overlapping(folder: Path, overlap: str, suffix: str) -> tuple[Path, Path]:
    """An input, and an output that overlaps it."""
    read = folder / "in" / f"file{suffix}"
    read.parent.mkdir()
    read.write_bytes(CONTENT)
    written = folder / f"out{suffix}"
    match overlap:
        case "is":
            return read, read
        case "links to":
            written.symlink_to(read)
            return read, written
        case "is a hard link of":
            written.hardlink_to(read)
            return read, written
        case "lies in":
            return read.parent, read.parent / f"new{suffix}"
    within = folder / f"out{suffix}" / "deep"
    within.mkdir(parents=True)
    (within / read.name).write_bytes(CONTENT)
    return within / read.name, written


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.lstat().st_ino, path.read_bytes() if path.is_file() else b"")
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("spelling", ["in/./a", "in/../in/a", "link/a", "in/linked", "other/b"])
def test_every_spelling_of_a_file_is_that_file(spelling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    Path("other").mkdir()
    Path("in/a").write_bytes(CONTENT)
    Path("in/linked").symlink_to("a")
    Path("link").symlink_to("in")
    os.link("in/a", "other/b")
    for outside in ({"X": Path("in/a")}, {"X": [Path("in")]}, {"X": "in"}):
        with pytest.raises(UsageError, match=r"--out .*which is read"):
            require_apart({"--out": Path(spelling)}, outside)


def test_what_a_link_within_an_input_points_to_is_read(tmp_path: Path) -> None:
    blobs, snapshot_folder = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot_folder.mkdir()
    (blobs / "a1b2").write_bytes(CONTENT)
    (snapshot_folder / "model.safetensors").symlink_to("../blobs/a1b2")
    (snapshot_folder / "transformer").symlink_to("../elsewhere")
    (tmp_path / "elsewhere").mkdir()
    for written in (blobs / "a1b2", blobs, tmp_path / "elsewhere", tmp_path / "elsewhere" / "new", tmp_path):
        with pytest.raises(UsageError, match="which is read"):
            require_apart({"--out": written}, {"--source": snapshot_folder})
    require_apart({"--out": blobs / "new"}, {"--source": snapshot_folder})


def test_what_lies_beside_an_input_is_free(tmp_path: Path) -> None:
    read = tmp_path / "a.safetensors"
    read.write_bytes(CONTENT)
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    inputs = {"X": read, "Y": [tmp_path / "folder", tmp_path / "nowhere", tmp_path / "loop"], "Z": None}
    for name in ("b.safetensors", "a.safetensors.part", "folder2", "new/deep/x"):
        require_apart({"--out": tmp_path / name, "--work": None}, inputs)


def test_two_outputs_at_one_place(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("x")
    for second in ("x", "link", "../" + tmp_path.name + "/x"):
        with pytest.raises(UsageError, match="--out and --work are both"):
            require_apart({"--out": tmp_path / "x", "--work": tmp_path / second}, {})
