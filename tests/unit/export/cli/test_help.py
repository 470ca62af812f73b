"""Help that needs no other page: values, meanings, and a call that works."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

import click
import pytest

from conftest import run_cli
from l2p_engines.forecast.cards import CARDS
from l2p_engines.profiles import profile_names
from l2p_export.cli.main import main
from l2p_runtime.backends import backend_names
from l2p_runtime.policies import POSITIONS

Words = tuple[str, ...]


def commands(group: click.Command = main, words: Words = ()) -> Iterator[tuple[Words, click.Command]]:
    yield words, group
    if isinstance(group, click.Group):
        for name in group.list_commands(click.Context(group)):
            found = group.get_command(click.Context(group), name)
            assert found is not None
            yield from commands(found, (*words, name))


FOUND = dict(commands())


@pytest.mark.parametrize("words", list(FOUND), ids=" ".join)
def test_each_help_ends_with_a_call_that_the_command_takes(words: Words) -> None:
    text = run_cli(*words, "--help").stdout
    title, call = text.rstrip().splitlines()[-2:]
    assert title.strip() == "Example:"
    called = shlex.split(call)
    assert called[: len(words) + 1] == ["l2p-export", *words]
    found = max((name for name in FOUND if tuple(called[1 : 1 + len(name)]) == name), key=len)
    command, rest = FOUND[found], called[1 + len(found) :]
    if isinstance(command, click.Group):
        assert found == ("triton",)
        command = FOUND["triton", "write"]
    known = {option for param in command.params for option in param.opts}
    assert {word for word in rest if word.startswith("--")} <= known
    for param in command.params:
        if isinstance(param, click.Option) and param.required:
            assert set(param.opts) & set(rest)
        elif param.required:
            assert not rest[0].startswith("-")


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("--backend", backend_names()),
        ("--profile", list(profile_names())),
        ("--rng", ["philox", "torch-cpu"]),
        ("--positions", list(POSITIONS[:6])),
    ],
)
def test_values_and_what_they_do(option: str, values: list[str]) -> None:
    seen = 0
    for words, command in FOUND.items():
        for param in command.params:
            if isinstance(param, click.Option) and option in param.opts:
                seen += 1
                told = re.split(r"[^\w-]+", str(param.help))
                # `build` makes no onnx-cuda: it has the files of onnx.
                missing = [
                    value for value in values if value not in told and (words, value) != (("build",), "onnx-cuda")
                ]
                assert missing == [], words
    assert seen


def test_devices() -> None:
    text = " ".join(run_cli("plan", "--help").stdout.split())
    assert all(card.name in text for card in CARDS)
    assert all("cuda" in str(p.help) for p in FOUND["train", "source"].params if p.name == "device")  # type: ignore[attr-defined]
