from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from l2p_runtime import UsageError
from l2p_runtime.frames.prompts import PromptLine, read_prompts

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
LINES = st.fixed_dictionaries(
    {"frame": st.integers(-(2**31), 2**31 - 1)},
    optional={
        "prompt": TEXT,
        "negative": TEXT,
        "seed": st.integers(0, 2**64 - 1),
        "size": st.tuples(st.integers(1, 9999), st.integers(1, 9999)).map(lambda size: f"{size[0]}x{size[1]}"),
        "steps": st.integers(-5, 2000),
        "guidance": st.floats(allow_nan=False, allow_infinity=False),
        "out": st.from_regex(r"[a-z]{1,5}\.exr", fullmatch=True),
    },
)


def write(folder: Path, *lines: object) -> Path:
    path = folder / "jobs.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


@given(st.lists(LINES, min_size=1, max_size=6, unique_by=lambda line: line["frame"]), st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_lines_are_read_as_they_are(tmp_path: Path, lines: list[dict[str, Any]], ascii_only: bool) -> None:
    path = tmp_path / "jobs.jsonl"
    path.write_text("\n\n".join(json.dumps(line, ensure_ascii=ascii_only) for line in lines), encoding="utf-8")
    found = read_prompts(path)
    assert list(found) == [line["frame"] for line in lines]
    for index, line in enumerate(lines):
        expected = dict(line)
        if "size" in line:
            width, height = line["size"].split("x")
            expected["size"] = int(height), int(width)
        assert found[line["frame"]] == PromptLine(number=2 * index + 1, **expected)


def test_marks_and_windows_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "jobs.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"frame": 1}\r\n\r\n{"frame": 2}\r\n')
    assert [line.number for line in read_prompts(path).values()] == [1, 3]


@pytest.mark.parametrize(
    ("line", "needle"),
    [
        ("{", "no JSON"),
        ("nonsense", "no JSON"),
        ("[1]", "a list, expected an object"),
        ("5", "a int, expected an object"),
        ("[" * 100_000, "no JSON"),
        ('{"frame": 1}{"frame": 2}', "no JSON"),
        ('{"frame": 1, "frame": 2}', "'frame' is there twice"),
        ('{"frame": 1, "guidance": NaN}', "NaN is no number of JSON"),
        ('{"frame": 1, "guidance": -Infinity}', "-Infinity is no number"),
        ('{"frame": ' + "9" * 5000 + "}", "no JSON"),
        ("{}", "there is no `frame`"),
        ({"prompt": "x"}, "there is no `frame`"),
        ({"frame": 1, "promt": "x"}, "'promt' is not known"),
        ({"frame": 1, "path": "/etc/passwd"}, "'path' is not known"),
        ({"frame": "1"}, "frame is '1', expected a whole number"),
        ({"frame": 1.0}, "frame is 1.0, expected a whole number"),
        ({"frame": True}, "frame is True, expected a whole number"),
        ({"frame": None}, "frame is None"),
        ({"frame": 2**31}, "expected -2147483648 to 2147483647"),
        ({"frame": 1, "prompt": 5}, "prompt is 5, expected text"),
        ({"frame": 1, "prompt": None}, "prompt is None, expected text"),
        ({"frame": 1, "prompt": ["a"]}, "prompt is ['a'], expected text"),
        ('{"frame": 1, "prompt": "\\ud800"}', "what is no character at position 0"),
        ('{"frame": 1, "prompt": "\\u0000"}', "null character"),
        ({"frame": 1, "negative": 1}, "negative is 1, expected text"),
        ({"frame": 1, "seed": -1}, "seed is -1, expected 0 to"),
        ({"frame": 1, "seed": 2**64}, "expected 0 to 18446744073709551615"),
        ({"frame": 1, "seed": "7"}, "seed is '7'"),
        ({"frame": 1, "size": 512}, "size is 512, expected WIDTHxHEIGHT"),
        ({"frame": 1, "size": "512"}, "size is '512'"),
        ({"frame": 1, "steps": 1.5}, "steps is 1.5"),
        ({"frame": 1, "guidance": "2"}, "guidance is '2'"),
        ({"frame": 1, "guidance": True}, "guidance is True"),
        ({"frame": 1, "out": "../x.exr"}, "without a folder"),
        ({"frame": 1, "out": "/x.exr"}, "without a folder"),
        ({"frame": 1, "out": "a\\x.exr"}, "without a folder"),
        ({"frame": 1, "out": ".."}, "without a folder"),
        ({"frame": 1, "out": ""}, "without a folder"),
    ],
)
def test_a_wrong_line_is_refused_with_its_number(line: object, needle: str, tmp_path: Path) -> None:
    path = write(tmp_path, {"frame": 100}, "", line)
    with pytest.raises(UsageError) as caught:
        read_prompts(path)
    assert f"line 3 of `{path}`" in str(caught.value)
    assert needle in str(caught.value)


def test_a_frame_of_two_lines(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="frame 5 is in lines 1 and 3"):
        read_prompts(write(tmp_path, {"frame": 5}, {"frame": 6}, {"frame": 5, "prompt": "x"}))


@pytest.mark.parametrize("text", ["", "\n\n", " \n"])
def test_a_file_without_lines(text: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no lines"):
        read_prompts(write(tmp_path, text))


def test_a_file_of_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "jobs.jsonl"
    path.write_bytes('{"frame": 1}\n{"frame": 2, "prompt": "é"}'.encode("latin-1"))
    with pytest.raises(UsageError, match="in line 2"):
        read_prompts(path)
