from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fakes.frames import CALL, NumberPipeline
from l2p_runtime import ArtifactError, CancelledError, HostError, UsageError
from l2p_runtime.frames.drawing import FrameEvent, FrameReport, draw_frames
from l2p_runtime.frames.embeddings import FRAMES_AHEAD, GROUPS_MAX
from l2p_runtime.frames.shot import FrameRequest


def requests(*prompts: str, **call: Any) -> list[FrameRequest]:
    """A frame for each prompt, whose seed is its number."""
    return [
        FrameRequest(frame, Path(f"{frame}.png"), CALL | call | {"prompt": prompt, "seed": frame})
        for frame, prompt in enumerate(prompts, 1)
    ]


class Written(dict[int, int]):
    """Takes the first pixel of each frame."""

    def __call__(self, request: FrameRequest, pixels: Any) -> None:
        self[request.frame] = int(pixels[0, 0, 0])


def raising(error: BaseException, *frames: int, times: int = 1_000) -> Callable[[dict[str, Any]], None]:
    left = dict.fromkeys(frames, times)

    def before(call: dict[str, Any]) -> None:
        if left.get(call["seed"], 0):
            left[call["seed"]] -= 1
            raise error

    return before


def test_frames_are_written_in_order_in_another_thread() -> None:
    threads, frames = set(), []

    def write(request: FrameRequest, pixels: Any) -> None:
        threads.add(threading.current_thread().name)
        frames.append(request.frame)

    report = draw_frames(NumberPipeline(), requests(*"aaaa"), write)
    assert report == FrameReport(4, 0, ())
    assert frames == [1, 2, 3, 4]
    assert len(threads) == 1
    assert threading.current_thread().name not in threads


def test_a_frame_is_written_while_the_next_is_drawn() -> None:
    """Each waits for the other, which would never end if one came after the other."""
    drawing_second, written_first = threading.Event(), threading.Event()

    def before(call: dict[str, Any]) -> None:
        if call["seed"] == 2:
            drawing_second.set()
            assert written_first.wait(10)

    def write(request: FrameRequest, pixels: Any) -> None:
        if request.frame == 1:
            assert drawing_second.wait(10)
            written_first.set()

    assert draw_frames(NumberPipeline(before), requests(*"aaa"), write).written == 3


def test_no_more_than_two_images_are_held() -> None:
    images: list[weakref.ref[Any]] = []
    most, drawn = 0, threading.Semaphore(0)

    class Counting(NumberPipeline):
        def generate(self, *arguments: Any, **call: Any) -> Any:
            nonlocal most
            pixels = super().generate(*arguments, **call)
            images.append(weakref.ref(pixels))
            gc.collect()
            most = max(most, sum(image() is not None for image in images))
            drawn.release()
            return pixels

    def write(request: FrameRequest, pixels: Any) -> None:
        """Takes until the next image is drawn."""
        assert drawn.acquire(timeout=10)
        if request.frame < 8:
            assert drawn.acquire(timeout=10)
            drawn.release()

    draw_frames(Counting(), requests(*"aaaaaaaa"), write)
    assert most == 2


@pytest.mark.parametrize("error", [HostError("x"), ArtifactError("x"), OSError(5, "x"), MemoryError("x")])
def test_a_frame_that_cannot_be_drawn_fails_and_the_others_go_on(error: Exception) -> None:
    written = Written()
    events: list[FrameEvent] = []
    report = draw_frames(
        NumberPipeline(raising(error, 2, 4)), requests(*"aaaa"), written, tell=events.append, retries=1
    )
    assert report == FrameReport(2, 0, (2, 4))
    assert sorted(written) == [1, 3]
    failed = [event for event in events if event.state == "failed"]
    assert [(event.frame, event.path) for event in failed] == [(2, Path("2.png")), (4, Path("4.png"))]
    assert all("x" in str(event.error) for event in failed)


def test_a_frame_that_cannot_be_written_fails_and_the_others_go_on() -> None:
    written = Written()

    def write(request: FrameRequest, pixels: Any) -> None:
        if request.frame in (1, 3):
            raise OSError(28, "No space left on device", "s.png")
        written(request, pixels)

    events: list[FrameEvent] = []
    report = draw_frames(NumberPipeline(), requests(*"aaa"), write, tell=events.append)
    assert report == FrameReport(1, 0, (1, 3))
    assert [str(event.error) for event in events if event.error] == ["No space left on device `s.png`"] * 2


@pytest.mark.parametrize(("retries", "failed"), [(0, (2,)), (1, (2,)), (2, ())])
def test_a_failed_frame_is_tried_again(retries: int, failed: tuple[int, ...]) -> None:
    pipe = NumberPipeline(raising(HostError("x"), 2, times=2))
    assert draw_frames(pipe, requests(*"aaa"), Written(), retries=retries).failed == failed


def test_a_frame_is_written_again_without_being_drawn_again() -> None:
    fails = [OSError(5, "x")] * 2

    def write(request: FrameRequest, pixels: Any) -> None:
        if fails and request.frame == 1:
            raise fails.pop()

    pipe = NumberPipeline()
    assert draw_frames(pipe, requests(*"aa"), write, retries=2).written == 2
    assert pipe.drawn == [1, 2]


def test_what_is_no_failure_of_a_frame_ends_all() -> None:
    with pytest.raises(ZeroDivisionError):
        draw_frames(NumberPipeline(raising(ZeroDivisionError(), 2)), requests(*"aaa"), Written(), retries=3)

    def write(request: FrameRequest, pixels: Any) -> None:
        raise KeyError

    with pytest.raises(KeyError):
        draw_frames(NumberPipeline(), requests(*"aaa"), write)


def test_frames_that_are_there_are_neither_drawn_nor_encoded() -> None:
    pipe, events = NumberPipeline(), []
    report = draw_frames(
        pipe, requests(*"aaa"), Written(), is_there=lambda request: request.frame != 2, tell=events.append
    )
    assert report == FrameReport(1, 2, ())
    assert pipe.drawn == [2]
    assert sum(event.state == "skipped" for event in events) == 2
    assert draw_frames(pipe, requests(*"aaa"), Written(), is_there=lambda request: True).skipped == 3
    assert len(pipe.encoded) == 1


def test_a_cancelled_drawing_finishes_what_is_being_written() -> None:
    written, drawn = Written(), []

    def before(call: dict[str, Any]) -> None:
        drawn.append(call["seed"])
        if call["seed"] == 3:
            raise CancelledError("stop")

    with pytest.raises(CancelledError):
        draw_frames(NumberPipeline(before), requests(*"aaaaa"), written, retries=5)
    assert sorted(written) == [1, 2]
    assert drawn == [1, 2, 3]


def test_an_error_that_a_library_made_of_a_signal_is_no_failure_of_a_frame() -> None:
    stopped = []

    def before(call: dict[str, Any]) -> None:
        if call["seed"] == 2:
            stopped.append(True)
            raise HostError("the library was interrupted")

    with pytest.raises(CancelledError):
        draw_frames(NumberPipeline(before), requests(*"aaa"), Written(), retries=5, cancelled=lambda: bool(stopped))


def test_cancelling_before_the_first_frame() -> None:
    pipe = NumberPipeline()
    with pytest.raises(CancelledError):
        draw_frames(pipe, requests(*"aaa"), Written(), cancelled=lambda: True)
    assert not pipe.drawn


def test_a_prompt_is_encoded_once() -> None:
    pipe = NumberPipeline()
    draw_frames(pipe, requests(*"abab" * 100), Written())
    assert pipe.encoded == [[("a",), ("b",)]]


def test_a_frame_has_the_same_pixels_whatever_is_drawn_beside_it() -> None:
    prompts = [f"prompt {index % 37}" for index in range(90)]
    every, alone = Written(), Written()
    draw_frames(NumberPipeline(guidance=2.0), requests(*prompts), every)
    for request in requests(*prompts):
        draw_frames(NumberPipeline(guidance=2.0), [request], alone)
    assert every == alone
    assert len(set(every.values())) > 20


def test_prompts_are_encoded_in_bounded_groups() -> None:
    pipe = NumberPipeline(guidance=2.0)
    draw_frames(pipe, requests(*(str(index) for index in range(100))), Written())
    assert [len(groups) for groups in pipe.encoded] == [GROUPS_MAX] * 6 + [4]
    assert pipe.encoded[0][0] == ("0", "")


def test_prompts_of_the_last_frames_are_kept() -> None:
    pipe = NumberPipeline()
    many = [str(index) for index in range(GROUPS_MAX)]
    draw_frames(pipe, requests(*many, *many, "new", *many), Written())
    assert sum(map(len, pipe.encoded)) == GROUPS_MAX + 1


def test_frames_are_taken_as_they_are_needed() -> None:
    taken = 0

    def endless() -> Any:
        nonlocal taken
        for request in requests(*"a" * 1000):
            taken += 1
            yield request

    def before(call: dict[str, Any]) -> None:
        assert taken <= call["seed"] + FRAMES_AHEAD

    assert draw_frames(NumberPipeline(before), endless(), Written()).written == 1000


def test_an_encoder_that_fails_fails_its_frames_only() -> None:
    class Failing(NumberPipeline):
        def encode_each(self, groups: Any, *, truncate_prompt: bool = False) -> Any:
            if ("bad",) in (listed := list(groups)):
                raise HostError("the text encoder does not fit")
            return super().encode_each(listed, truncate_prompt=truncate_prompt)

    prompts = ["a"] * FRAMES_AHEAD + ["a", "bad", "c"]
    report = draw_frames(Failing(), requests(*prompts), Written())
    assert report == FrameReport(FRAMES_AHEAD + 1, 0, (FRAMES_AHEAD + 2, FRAMES_AHEAD + 3))


def test_a_frame_that_was_not_checked_fails_by_itself() -> None:
    asked = requests(*"aaa")
    asked[1] = FrameRequest(2, Path("2.png"), {**asked[1].call, "height": 17})
    assert draw_frames(NumberPipeline(), asked, Written()) == FrameReport(2, 0, (2,))


def test_embeddings_are_drawn_as_they_are() -> None:
    pipe, written = NumberPipeline(), Written()
    width = pipe.bundle.manifest.model.caption_width
    draw_frames(pipe, requests("told", prompt_embeds=np.full((3, width), 40, np.float32)), written)
    assert written == {1: 41}
    assert not pipe.encoded


@pytest.mark.parametrize("retries", [-1, 101, "1", 1.0])
def test_retries_out_of_range(retries: Any) -> None:
    with pytest.raises(UsageError, match="retries is"):
        draw_frames(NumberPipeline(), [], Written(), retries=retries)
