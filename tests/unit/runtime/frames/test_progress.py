from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l2p_runtime.errors import HostError
from l2p_runtime.frames.drawing import FrameEvent, State
from l2p_runtime.frames.progress import failure_line, progress_line, progress_lines, shares


@pytest.mark.parametrize(
    ("form", "none", "half", "near", "all_done"),
    [
        ("openjd", "openjd_progress: 0.0", "openjd_progress: 50.0", "openjd_progress: 99.9", "openjd_progress: 100.0"),
        ("percent", "0%", "50%", "99%", "100%"),
        ("afanasy", "PROGRESS: 0%", "PROGRESS: 50%", "PROGRESS: 99%", "PROGRESS: 100%"),
        ("tractor", "TR_PROGRESS 000%", "TR_PROGRESS 050%", "TR_PROGRESS 099%", "TR_PROGRESS 100%"),
        ("none", "", "", "", ""),
    ],
)
def test_lines(form: str, none: str, half: str, near: str, all_done: str) -> None:
    assert [progress_line(form, share) for share in (0.0, 0.5, 0.9999999, 1.0)] == [none, half, near, all_done]


def test_a_line_is_told_once() -> None:
    told: list[str] = []
    tell = progress_lines("percent", told.append)
    for share in (0.0, 0.001, 0.01, 0.0101, 0.5, 0.5, 1.0):
        tell(share)
    assert told == ["0%", "1%", "50%", "100%"]
    silent = progress_lines("none", told.append)
    silent(0.5)
    assert len(told) == 4


def test_a_failure_is_one_line_for_open_job_description() -> None:
    assert failure_line("openjd", "a\r\nb\n  c") == "openjd_fail: a b c"
    assert len(failure_line("openjd", "x" * 70_000)) < 64_000
    assert {failure_line(form, "x") for form in ("percent", "afanasy", "tractor", "none")} == {""}


def event(frame: int, state: State, done: int = 0) -> FrameEvent:
    error = HostError("x") if state == "failed" else None
    return FrameEvent(frame, Path(), state, (done, 4), error)


def test_shares_count_what_is_drawn_and_not_yet_written() -> None:
    shown: list[float] = []
    tell = shares(2, shown.append)
    for told in (event(1, "drawing", 2), event(1, "drawing", 4), event(2, "drawing", 4), event(1, "written")):
        tell(told)
    assert shown == pytest.approx([0.2475, 0.495, 0.99, 0.995])
    tell(event(2, "written"))
    assert shown[-1] == 1.0


@given(st.lists(st.sampled_from(["written", "skipped", "failed"]), min_size=1, max_size=20))
def test_shares_never_go_back_and_are_whole_only_when_every_frame_is_there(states: list[State]) -> None:
    shown: list[float] = []
    tell = shares(len(states), shown.append)
    for frame, state in enumerate(states):
        if state != "skipped":
            for done in range(1, 5):
                tell(event(frame, "drawing", done))
        tell(event(frame, state))
    assert shown == sorted(shown)
    assert (shown[-1] == 1.0) == ("failed" not in states)
