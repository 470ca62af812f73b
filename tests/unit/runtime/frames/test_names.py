from __future__ import annotations

from pathlib import Path

import fileseq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from l2p_runtime import UsageError
from l2p_runtime.frames.names import FramePattern, parse_pattern

FRAMES = st.integers(-(2**31), 2**31 - 1)


@pytest.mark.parametrize(
    ("name", "frame", "found"),
    [
        ("shot.####.exr", 7, "shot.0007.exr"),
        ("shot.@@@@.exr", 7, "shot.0007.exr"),
        ("shot.#.exr", 7, "shot.7.exr"),
        ("shot.@.exr", 12, "shot.12.exr"),
        ("shot.%04d.exr", 7, "shot.0007.exr"),
        ("shot.%d.exr", 7, "shot.7.exr"),
        ("shot.$F4.exr", 7, "shot.0007.exr"),
        ("shot.$F.exr", 7, "shot.7.exr"),
        ("shot_$F3_v2.png", 7, "shot_007_v2.png"),
        ("####.png", 7, "0007.png"),
        ("shot.####.exr", -5, "shot.-005.exr"),
        ("shot.####.exr", -12345, "shot.-12345.exr"),
        ("shot.##.exr", 12345, "shot.12345.exr"),
        ("100%.####.exr", 1, "100%.0001.exr"),
        ("50%x$y.##.exr", 1, "50%x$y.01.exr"),
        ("$FOO.##.exr", 1, "$FOO.01.exr"),
        ("plain.exr", 7, "plain.exr"),
    ],
)
def test_names(name: str, frame: int, found: str) -> None:
    pattern = parse_pattern(Path("folder") / name)
    assert pattern.path(frame) == Path("folder") / found
    assert (pattern.digits is None) == (name == "plain.exr")


@pytest.mark.parametrize("folder", ["a####", "100%d", "$F4", "@", "%04d/####"])
def test_signs_in_a_folder_are_characters(folder: str) -> None:
    assert parse_pattern(Path(folder) / "x.##.png").path(3) == Path(folder) / "x.03.png"


@pytest.mark.parametrize(
    ("name", "needle"),
    [
        ("####.%04d.exr", "`####` and `%04d`"),
        ("####.####.exr", "expected one"),
        ("##@@.exr", "`##` and `@@`"),
        ("$F4.$F.exr", "`$F4` and `$F`"),
        ("x.%4d.exr", "pads frames with spaces"),
        ("x.%017d.exr", "expected 1 to 16"),
        ("x." + "#" * 17 + ".exr", "expected 1 to 16"),
        ("x.$F0.exr", "expected 1 to 16"),
    ],
)
def test_what_is_no_pattern(name: str, needle: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_pattern(Path(name))
    assert needle in str(caught.value)


@given(st.integers(1, 16), FRAMES)
def test_names_are_those_of_fileseq_with_a_digit_for_each_sign(digits: int, frame: int) -> None:
    theirs = fileseq.FileSequence(f"/f/shot.{'#' * digits}.exr", pad_style=fileseq.PAD_STYLE_HASH1)
    expected = theirs.frame(frame)
    for sign in ("#" * digits, "@" * digits, f"%0{digits}d", f"$F{digits}"):
        assert str(parse_pattern(Path(f"/f/shot.{sign}.exr")).path(frame)) == expected


@given(st.integers(1, 16), FRAMES, FRAMES)
def test_two_frames_never_share_a_name(digits: int, one: int, other: int) -> None:
    pattern = FramePattern(Path(), "x", "y", digits)
    assert (pattern.name(one) == pattern.name(other)) == (one == other)


@given(st.integers(1, 16), FRAMES)
def test_the_frame_of_a_name(digits: int, frame: int) -> None:
    pattern = FramePattern(Path(), "a.", ".b", digits)
    assert pattern.frame(pattern.name(frame)) == frame


@pytest.mark.parametrize("name", ["shot.007.png", "shot.00007.png", "shot.-0001.png", "shot..png", "shot.7a.png", "x"])
def test_names_of_no_frame(name: str) -> None:
    assert parse_pattern(Path("shot.####.png")).frame(name) is None
    assert parse_pattern(Path("shot.png")).frame("shot.png") is None
