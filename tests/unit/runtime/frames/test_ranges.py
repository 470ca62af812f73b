from __future__ import annotations

import itertools
import tracemalloc

import fileseq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openjd.model import IntRangeExpr

from l2p_runtime import UsageError
from l2p_runtime.frames.ranges import FRAMES_MAX, FrameRange, Span, frames_of, parse_frames

NUMBERS = st.integers(-60, 60)
STEPS = st.integers(1, 25)


@st.composite
def parts(draw: st.DrawFn, signs: str) -> str:
    """One part; the sign in front of a step is only where both the dialect and its library take it."""
    first, last = draw(NUMBERS), draw(NUMBERS)
    space = draw(st.sampled_from(["", " "]))
    if draw(st.booleans()):
        return f"{space}{first}"
    sign, step = draw(st.sampled_from(signs)), draw(STEPS)
    if signs == "-:":
        sign, step = (":", -step) if last < first else (sign, step)
    end = "" if sign == "-" else f"{sign}{step}"
    return f"{first}{space}-{space}{last}{end}"


def restated(part: str) -> list[int]:
    """The frames of a part of fileseq's, from the words of its documentation."""
    body, sign, step = part, "", 1
    for found in "xy:":
        if found in part:
            body, text = part.split(found)
            sign, step = found, abs(int(text))
    body = body.replace(" ", "")
    cut = body.find("-", 1)
    first, last = (int(body), int(body)) if cut < 0 else (int(body[:cut]), int(body[cut + 1 :]))
    frames = list(range(first, last + 1)) if first <= last else list(range(first, last - 1, -1))
    if sign == "y":
        return [frame for index, frame in enumerate(frames) if index % step]
    if sign == ":":
        order = [frame for size in range(step, 0, -1) for frame in frames[::size]]
        return list(dict.fromkeys(order))
    return frames[::step]


@given(st.lists(parts("-xy:"), min_size=1, max_size=6))
def test_fileseq_reads_the_same_frames_in_the_same_order(texts: list[str]) -> None:
    expected = list(dict.fromkeys(itertools.chain.from_iterable(map(restated, texts))))
    text = ",".join(texts)
    assert list(fileseq.FrameSet(text)) == expected
    if not expected:
        with pytest.raises(UsageError, match="are none"):
            parse_frames(text, "fileseq")
        return
    found = parse_frames(text, "fileseq")
    assert list(found) == expected
    assert len(found) == len(expected)
    assert {frame for frame in range(-80, 80) if frame in found} == set(expected)


@given(st.lists(parts("-:"), min_size=1, max_size=4))
def test_open_job_description_reads_the_same_frames(texts: list[str]) -> None:
    text = ",".join(texts)
    try:
        expected = list(IntRangeExpr.from_str(text))
    except Exception:  # noqa: BLE001 - what the library refuses
        with pytest.raises(UsageError):
            parse_frames(text, "openjd")
        return
    found = parse_frames(text, "openjd")
    assert list(found) == expected
    assert len(found) == len(expected)


@given(st.lists(parts("-xy:"), min_size=1, max_size=5))
def test_without_a_dialect_no_text_has_two_meanings(texts: list[str]) -> None:
    text = ",".join(texts)
    readings = []
    for dialect in ("openjd", "fileseq"):
        try:
            readings.append(set(parse_frames(text, dialect)))
        except UsageError:
            continue
    if not readings or (len(readings) == 2 and readings[0] != readings[1]):
        with pytest.raises(UsageError):
            parse_frames(text)
    else:
        assert set(parse_frames(text)) == readings[0]


@given(st.lists(parts("-xy:"), min_size=1, max_size=5))
def test_text_is_read_back(texts: list[str]) -> None:
    try:
        frames = parse_frames(",".join(texts), "fileseq")
    except UsageError:
        return
    again = parse_frames(frames.text("fileseq"), "fileseq")
    assert list(again) == list(frames)
    assert again == frames
    other = parse_frames(frames.text("openjd"), "openjd")
    assert set(other) == set(frames)
    assert set(IntRangeExpr.from_str(frames.text("openjd"))) == set(frames)


@given(st.lists(NUMBERS, min_size=1, max_size=40, unique=True))
def test_ranges_of_numbers(numbers: list[int]) -> None:
    found = frames_of(numbers)
    assert list(found) == numbers
    assert list(parse_frames(str(found), "fileseq")) == numbers


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("1-100", "1-100"),
        ("5,7", "5,7"),
        ("1-9x2", "1-9x2"),
        ("1-10y3", "1-10y3"),
        ("10-1", "10-1"),
        ("1 - 5, 7", "1-5,7"),
        ("1-5,3-7", "1-5,3-7"),
        ("-5--1", "-5--1"),
        ("1-10:1", "1-10"),
        ("0007", "7"),
    ],
)
def test_what_needs_no_dialect(text: str, found: str) -> None:
    assert str(parse_frames(text)) == found


@pytest.mark.parametrize("text", ["1-10:3", "10-1:-3", "1-10:20", "1-3,20-30:2"])
def test_an_ambiguous_range_names_both_readings(text: str) -> None:
    with pytest.raises(UsageError, match=r"frames \(.*in openjd and .* frames \(.* in fileseq") as caught:
        parse_frames(text)
    assert "--frame-dialect" in caught.value.hint


def test_readings_are_told_with_their_frames() -> None:
    with pytest.raises(UsageError) as caught:
        parse_frames("1-10:3")
    assert "4 frames (1, 4, 7, 10) in openjd" in str(caught.value)
    assert "10 frames (1, 4, 7, 10, 3, 5, ...) in fileseq" in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            " ",
            ",",
            "1,,2",
            "1,",
            "a",
            "1-",
            "-",
            "--5",
            "1-2-3",
            "1 2",
            "1.5",
            "1-3x0.5",
            "+1",
            "1_0",
            "1e3",
            "0x10",
        ),
        *("1-10x", "1-10x0", "1-10:0", "1-10y0", "1-10x-3", "1-10:-3", "7:2", "1-10x2x3", "1-10y1", "1;2"),
        *("\uff11-\uff13", "99999999999", "2147483648", "-2147483649", "1\0", "1-10\u200b"),
    ],
)
def test_what_is_no_range(text: str) -> None:
    for dialect in (None, "openjd", "fileseq"):
        with pytest.raises(UsageError):
            parse_frames(text, dialect)


@pytest.mark.parametrize("text", ["1-5,3-7", "1-10:2,2-10:2", "1,1", "10-1", "1-10x2", "1-10y2"])
def test_what_open_job_description_refuses(text: str) -> None:
    with pytest.raises(UsageError):
        parse_frames(text, "openjd")


def test_a_dialect_of_another_name() -> None:
    with pytest.raises(UsageError, match="expected openjd or fileseq"):
        parse_frames("1", "opencue")  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["1-1000000000", "1-1000000000x2", "1-9000000,20000000-22000000", "0-10000000"])
def test_too_many_frames_are_refused_with_the_limit(text: str) -> None:
    with pytest.raises(UsageError, match="expected up to 10,000,000"):
        parse_frames(text)


def test_ten_million_frames_take_no_memory() -> None:
    tracemalloc.start()
    frames = parse_frames("1-9999999,-5", "fileseq")
    first = list(itertools.islice(frames, 3))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (first, len(frames)) == ([1, 2, 3], FRAMES_MAX)
    assert 9_999_999 in frames
    assert 10_000_000 not in frames
    assert peak_bytes < 100_000


def test_parts_that_all_cross_are_refused_in_time() -> None:
    text = ",".join(f"{first}-10000" for first in range(3000))
    with pytest.raises(UsageError, match=r"overlap|expected up to"):
        parse_frames(text, "fileseq")


def test_crossing_ranges_that_open_job_description_cannot_write() -> None:
    frames = FrameRange((Span(range(2_000_000)), Span(range(1, 3_000_000))))
    with pytest.raises(UsageError, match="cannot be written"):
        frames.text("openjd")
