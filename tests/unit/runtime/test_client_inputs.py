from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l2p_runtime import Coarse, HostError, UsageError
from l2p_runtime.client import Client
from l2p_runtime.client.inputs import request_inputs
from l2p_runtime.client.transport import Address
from l2p_runtime.serving import INPUTS


def _inputs(**given_arguments: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = dict.fromkeys(("guidance", "positions", "base_grid", "coarse"))
    return request_inputs(
        {"prompt": "a", "negative_prompt": None},
        {"prompt_embeds": None, "negative_embeds": None},
        {"seed": 0, "height": None, "width": None, "steps": None},
        **arguments | given_arguments,
    )


def test_what_is_left_out_is_not_sent_so_that_older_servers_draw() -> None:
    assert _inputs().keys() == {"prompt", "seed"}


@given(st.floats(0, 1, exclude_min=True, exclude_max=True), st.integers(1, 1000), st.floats(0, 100, width=32))
def test_a_coarse_image_is_sent_exactly(renoise: float, steps: int, guidance: float) -> None:
    sent = _inputs(coarse=Coarse(16, 32, renoise, steps, guidance), positions="linear", base_grid=(4, 6))
    assert sent.keys() - {"prompt", "seed"} <= set(INPUTS)
    fields = ("coarse_height", "coarse_width", "renoise", "fine_steps", "fine_guidance")
    assert Coarse(*(sent[name].reshape(-1)[0] for name in fields)) == Coarse(16, 32, renoise, steps, guidance)
    assert (sent["positions"].tobytes(), sent["base_grid"].tolist()) == (b"linear", [4, 6])


@pytest.mark.parametrize(
    ("argument", "value", "words"),
    [
        ("coarse", (16, 16), r"coarse is a tuple, expected Coarse\(height"),
        ("coarse", Coarse(2**31, 16), "coarse_height is 2147483648"),
        ("positions", lambda *_: None, "positions is .*, expected text"),
        ("base_grid", (4,), r"base_grid is \(4,\), expected two whole numbers"),
        ("base_grid", "4x4", "base_grid is '4x4'"),
        ("base_grid", (4, 1.5), "a side of base_grid is 1.5"),
        ("base_grid", (4, 2**31), "a side of base_grid is 2147483648"),
    ],
)
def test_what_cannot_be_sent(argument: str, value: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        _inputs(**{argument: value})


class _RefusedError(Exception):
    def __init__(self, status: str | None, words: str) -> None:
        self._status, self._words = status, words

    def status(self) -> str | None:
        return self._status

    def message(self) -> str:
        return self._words


WORDS = "the server's own words"


def _client(status: str | None, input_names: Callable[[str], set[str]], words: str = WORDS) -> Client:
    def infer(*_: Any) -> None:
        raise _RefusedError(status, words)

    transport: Any = SimpleNamespace(infer=infer, input_names=input_names)
    return Client(Address("http", "h", 1), transport, None, 1.0)


def test_a_server_without_an_input_is_said_to_lack_it() -> None:
    client = _client("400", lambda model: {"prompt", "seed"})
    with pytest.raises(UsageError, match="model `l2p` has no input `positions`, `base_grid`") as caught:
        client.generate("a", positions="linear", base_grid=(4, 4))
    assert "l2p-export triton" in (caught.value.hint or "")
    with pytest.raises(UsageError, match=WORDS):
        client.generate("a")


@pytest.mark.parametrize(
    "words", ["expected number of inputs between 0 and 9 but got 11 inputs", "unexpected inference input 'positions'"]
)
def test_a_refusal_without_a_status_is_told_by_its_words(words: str) -> None:
    client = _client(None, lambda model: {"prompt", "seed"}, words)
    with pytest.raises(UsageError, match="has no input `positions`"):
        client.generate("a", positions="linear")


def test_a_failure_that_is_no_refusal_keeps_its_words() -> None:
    def unreachable(model: str) -> set[str]:
        raise OSError("gone")

    with pytest.raises(UsageError, match=WORDS):
        _client("400", unreachable).generate("a", positions="linear")
    with pytest.raises(HostError, match=WORDS):
        _client("503", lambda model: {"prompt"}).generate("a", positions="linear")
