"""A path where nothing is has one code in every command."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from conftest import run_cli
from l2p_export.cli.inputs import InputPath
from l2p_export.cli.main import main

PLACES = ("nowhere", "nowhere/deep.safetensors", "a" * 300, "loop", "file/within", "")

WRITTEN = {"--out", "--work", "--sensitivity", "--timing-cache", "--store", "--socket", "--worker"}
"""Options of paths that need not be there."""


def commands(
    group: click.Command = main, words: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    if isinstance(group, click.Group):
        for name in group.list_commands(click.Context(group)):
            found = group.get_command(click.Context(group), name)
            assert found is not None
            yield from commands(found, (*words, name))
    else:
        yield words, group


def inputs() -> Iterator[tuple[tuple[str, ...], str]]:
    """Every command with a parameter that names something to read."""
    for words, command in commands():
        for param in command.params:
            if isinstance(param.type, InputPath) or param.name == "loras":
                yield words, param.opts[0] if isinstance(param, click.Option) else ""


def test_every_path_is_an_input_or_an_output() -> None:
    for words, command in commands():
        for param in command.params:
            if isinstance(param.type, click.Path) and not isinstance(param.type, InputPath):
                assert param.opts[0] in WRITTEN, words


@pytest.mark.parametrize(("words", "option"), list(inputs()), ids=lambda value: " ".join(value) if value else "")
def test_a_path_where_nothing_is(words: tuple[str, ...], option: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    for place in PLACES:
        result = run_cli(*words, *filter(None, [option]), place, cwd=tmp_path)
        assert result.returncode == 2, result.stderr
        assert "there is no " in result.stderr or (place == "" and "is empty" in result.stderr) or option == "--lora"
        assert "hint: " in result.stderr


def test_stores_profiles_and_lora_folders(tmp_path: Path) -> None:
    for arguments in (
        ("build", "--profile", "nowhere.toml"),
        ("plan", "--profile", "nowhere.toml"),
        ("store", "check", "nowhere"),
        ("import", "nowhere", "--out", "x.safetensors"),
    ):
        result = run_cli(*arguments, cwd=tmp_path)
        assert result.returncode == 2, result.stderr
        assert "there is no" in result.stderr
