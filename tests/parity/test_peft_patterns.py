"""Keys of PEFT's patterns, matched by us and by PEFT."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from l2p_export.checkpoint.lora import patterns
from l2p_export.checkpoint.lora.patterns import first_matches
from l2p_runtime.errors import ArtifactError

BLOCKS = ("layers.1", "layers.11", "noise_refiner.0", "transformer.layers.1")
LAYERS = ("attention.to_q", "attention.to_out.0", "feed_forward.w1", "adaLN_modulation.0")
NAMES = (*(f"{block}.{layer}" for block in BLOCKS for layer in LAYERS), "to_q", "all_x_embedder.2-1", "x")

# Whole names, their ends, and pieces of regular expressions.
PIECES = (
    *("to_q", "layers", "1", "attention", "w", ".", r"\.", "^", "$", ".*", "\\d+", "[01]", "[^.]+", "(to_q|to_out.0)"),
    *("|", "(?:a|layers)", "?", "+", "*", "(?!noise)", "(?i)", "(", ")", "[", "{2}", r"\b", "x", r"\1", "_"),
)


def keys() -> st.SearchStrategy[str]:
    whole = st.sampled_from(NAMES).flatmap(lambda name: st.sampled_from([name, name[2:], f"^{name}$", name[:-1]]))
    return whole | st.lists(st.sampled_from(PIECES), max_size=5).map("".join)


def compiles(key: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(rf"(.*\.)?({key})$")
    except re.error:
        return False
    return True


def by_peft(key_list: list[str]) -> dict[str, str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {name: get_pattern_key(key_list, name) for name in NAMES}
    # PEFT returns the name itself where nothing matches, and looks it up with a default.
    return {name: key for name, key in found.items() if key in key_list}


@settings(max_examples=60, deadline=None)
@given(st.lists(keys().filter(compiles), min_size=1, max_size=6))
@example(["^to_q"])
@example(["layers.1.attention.to.q"])
@example(["attention.to_q", "layers.1.attention.to_q"])
@example([""])
@example(["x)|(.*to_q"])
def test_the_first_key_that_matches_as_in_peft(key_list: list[str]) -> None:
    assert first_matches(key_list, NAMES, "alpha_pattern", Path("x")) == by_peft(key_list)


@pytest.mark.parametrize("key", ["(", "to_q)", "[a", "*", "a(?i)", "(?P<n>", "{" * 400 + "(" * 400, r"\9", "(?<=a*)"])
def test_what_is_no_regular_expression_is_named(key: str) -> None:
    with pytest.raises(ArtifactError, match="is no regular expression") as caught:
        first_matches(["to_q", "t.*", key], NAMES, "alpha_pattern", Path("x"))
    assert ascii(key) in str(caught.value)


def test_a_key_that_backtracks_for_ever_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "_SECONDS", 1.0)
    slow = r"((\w|\.)+)+!"
    with pytest.raises(ArtifactError, match="was not matched within 1 s") as caught:
        first_matches(["t.*", slow, "w.*"], ["layers.1." + "a" * 40], "rank_pattern", Path("x"))
    assert ascii(slow) in str(caught.value)


def test_keys_are_bounded() -> None:
    with pytest.raises(ArtifactError, match="of 1001 characters"):
        first_matches(["a" * 1001], NAMES, "alpha_pattern", Path("x"))
    with pytest.raises(ArtifactError, match="has 4097 keys in alpha_pattern"):
        first_matches([f"a{index}" for index in range(4097)], NAMES, "alpha_pattern", Path("x"))
