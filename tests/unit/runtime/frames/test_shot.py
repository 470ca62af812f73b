from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fakes.frames import CALL, bundle_of
from l2p_runtime import UsageError
from l2p_runtime.coarse import Coarse
from l2p_runtime.frames import shot as shots
from l2p_runtime.frames.names import parse_pattern
from l2p_runtime.frames.prompts import PromptLine
from l2p_runtime.frames.ranges import parse_frames
from l2p_runtime.frames.shot import Shot, check_shot

PROMPTS = Path("jobs.jsonl")


@pytest.fixture
def tokenized(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that were counted; a word is a token, and 8 are too many."""
    seen: list[str] = []

    def tokens(text: str, *, truncate: bool = False) -> list[int]:
        seen.append(text)
        words = text.split() or [""]
        if len(words) > 8 and not truncate:
            raise UsageError(f"the prompt has {len(words)} tokens")
        return [0] * min(len(words), 8)

    monkeypatch.setattr(shots, "bundle_tokenizer", lambda bundle: SimpleNamespace(tokens=tokens))
    return seen


def make(frames: str = "1-3", out: str = "s.##.png", *lines: PromptLine, **changes: Any) -> Shot:
    call = CALL | {name: changes.pop(name) for name in list(changes) if name != "seed_per_frame"}
    return Shot(
        parse_frames(frames, "fileseq"),
        parse_pattern(Path("o") / out),
        call,
        {line.frame: line for line in lines},
        PROMPTS if lines else None,
        **changes,
    )


def line(number: int, frame: int, **values: Any) -> PromptLine:
    return PromptLine(number, frame, **values)


def test_requests_in_the_order_of_the_range() -> None:
    found = [(request.frame, str(request.path), request.call["seed"]) for request in make("5,1-2")]
    assert found == [(5, "o/s.05.png", 7), (1, "o/s.01.png", 7), (2, "o/s.02.png", 7)]
    assert all("image_index" not in request.call for request in make())


@pytest.mark.parametrize(("frame", "index"), [(0, 0), (7, 7), (-1, 2**32 - 1), (-(2**31), 2**31), (2**31 - 1,) * 2])
def test_a_frame_has_its_own_image_of_the_seed(frame: int, index: int) -> None:
    (request,) = make(str(frame), seed_per_frame=True)
    assert (request.call["seed"], request.call["image_index"]) == (7, index)


def test_a_line_says_what_differs() -> None:
    shot = make(
        "1-2",
        "s.##.png",
        line(4, 2, prompt="b", negative="n", seed=9, size=(64, 32), steps=3, guidance=2.0, out="x.png"),
        seed_per_frame=True,
        prompt_embeds=np.ones((1, 8)),
        negative_embeds=np.ones((1, 8)),
    )
    first, second = shot
    assert first.call == {**shot.call, "image_index": 1}
    changed = {"prompt": "b", "negative_prompt": "n", "prompt_embeds": None, "negative_embeds": None, "seed": 9}
    changed |= {"image_index": 0, "height": 64, "width": 32, "steps": 3, "guidance": 2.0}
    assert second.call == {**shot.call, **changed}
    assert second.path == Path("o/x.png")


def test_texts_are_counted_once_and_sizes_have_their_longest(tokenized: list[str]) -> None:
    lines = [line(1, 1, prompt="a b"), line(2, 2, prompt="a b c", size=(32, 32)), line(3, 3, prompt="a b", steps=1)]
    needs = check_shot(make("1-9", "s.#.png", *lines, prompt="a"), bundle_of())
    assert needs.calls == {((1, 1), 1): 2, ((2, 2), 1): 3}
    assert needs.texts == (3, 2, 1)
    assert sorted(tokenized) == ["a", "a b", "a b c"]


def test_ten_million_frames_are_checked_once(tokenized: list[str]) -> None:
    shot = make("1-10000000", prompt="a b")
    assert check_shot(shot, bundle_of()).calls == {((1, 1), 1): 2}
    assert tokenized == ["a b"]


@pytest.mark.parametrize(
    ("bad", "needle"),
    [
        (line(7, 2, prompt="w " * 9), "the prompt has 9 tokens"),
        (line(7, 2, size=(33, 32)), "size 32x33 does not divide by 16"),
        (line(7, 2, steps=0), "steps is 0"),
        (line(7, 2, guidance=101.0), "guidance is 101.0"),
        (line(7, 2, out="x.exr"), "expected a name that ends in .png"),
        (line(7, 2, out="s.01.png"), "out is `s.01.png`, which frame 1 is written to"),
    ],
)
def test_what_a_line_says_is_refused_with_its_number(bad: PromptLine, needle: str, tokenized: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        check_shot(make("1-3", "s.##.png", line(3, 3), bad), bundle_of())
    assert str(caught.value).startswith("line 7 of `jobs.jsonl`: ")
    assert needle in str(caught.value)


def test_a_line_that_is_not_drawn_is_not_checked(tokenized: list[str]) -> None:
    check_shot(make("1", "s.##.png", line(1, 1), line(2, 2, prompt="w " * 9, out="s.01.png")), bundle_of())


def test_a_frame_without_a_line_and_without_a_prompt(tokenized: list[str]) -> None:
    with pytest.raises(UsageError, match=r"frame 12 has no line in `jobs.jsonl`: the bundle was given no prompt"):
        check_shot(make("11-13", "s.##.png", line(1, 11, prompt="a"), prompt=None), bundle_of())


def test_a_frame_without_a_line_takes_the_prompt_of_all(tokenized: list[str]) -> None:
    check_shot(make("11-13", "s.##.png", line(1, 11, prompt="a"), prompt="b"), bundle_of())
    assert sorted(tokenized) == ["a", "b"]


@pytest.mark.parametrize(
    ("frames", "lines"),
    [("1-2", ()), ("1-2", (line(1, 1),)), ("1-2", (line(1, 1, out="s.png"),)), ("1-10000000", ())],
)
def test_a_name_without_a_frame_for_several(frames: str, lines: tuple[PromptLine, ...], tokenized: list[str]) -> None:
    with pytest.raises(UsageError, match="expected a name with the frame in it"):
        check_shot(make(frames, "s.png", *lines), bundle_of())


def test_names_that_are_each_given_need_no_pattern(tokenized: list[str]) -> None:
    shot = make("1-3", "s.png", line(1, 1, out="a.png"), line(2, 2, out="b.png"))
    check_shot(shot, bundle_of())
    assert [request.path.name for request in shot] == ["a.png", "b.png", "s.png"]


def test_two_lines_of_one_file(tokenized: list[str]) -> None:
    lines = line(1, 1, out="a.png"), line(5, 2, out="a.png")
    with pytest.raises(UsageError, match=r"line 5 of .* which frame 1 is written to"):
        check_shot(make("1-3", "s.##.png", *lines), bundle_of())


def test_lines_that_trade_their_names(tokenized: list[str]) -> None:
    check_shot(make("1-2", "s.#.png", line(1, 1, out="s.2.png"), line(2, 2, out="s.1.png")), bundle_of())
    check_shot(make("1", "s.#.png", line(1, 1, out="s.2.png")), bundle_of())
    check_shot(make("1", "s.#.png", line(1, 1, out="s.1.png")), bundle_of())


def test_frames_have_no_images_of_a_seed_of_torch(tokenized: list[str]) -> None:
    check_shot(make(rng="torch-cpu"), bundle_of())
    with pytest.raises(UsageError, match="one image per seed"):
        check_shot(make(rng="torch-cpu", seed_per_frame=True), bundle_of())


def test_embeddings_need_no_tokenizer(tokenized: list[str]) -> None:
    embeds = np.ones((5, bundle_of().manifest.model.caption_width), np.float32)
    needs = check_shot(make(prompt="a description", prompt_embeds=embeds), bundle_of())
    assert (needs.calls, needs.texts, tokenized) == ({((1, 1), 1): 5}, (), [])


def test_steps_with_guidance_compute_two_prompts(tokenized: list[str]) -> None:
    shot = make("1-2", "s.#.png", line(1, 2, guidance=1.0), guidance=2.0, negative_prompt="a b c")
    assert check_shot(shot, bundle_of()).calls == {((1, 1), 2): 3, ((1, 1), 1): 1}
    coarse = make("1", coarse=Coarse(16, 32), height=32, width=64, guidance=2.0)
    assert check_shot(coarse, bundle_of()).calls == {((1, 2), 2): 1, ((2, 4), 1): 1}
