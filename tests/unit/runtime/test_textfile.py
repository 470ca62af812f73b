"""Text files of users: one encoding, one line end."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l2p_runtime.errors import UsageError
from l2p_runtime.textfile import read_lines, read_text

SEPARATORS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\r"
"""What `str.splitlines` takes for line ends, besides the newline."""

lines = st.text(st.characters(blacklist_characters="\n\0\ufeff", blacklist_categories=("Cs",)), max_size=12)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("text") / "lines.txt"


@settings(max_examples=200, deadline=None)
@given(st.lists(lines, min_size=1, max_size=5), st.booleans(), st.sampled_from(["\n", "\r\n"]))
def test_lines_are_those_between_newlines(path: Path, written: list[str], has_mark: bool, end: str) -> None:
    path.write_bytes((b"\xef\xbb\xbf" if has_mark else b"") + end.join(written).encode())
    # A carriage return before a newline belongs to the line end.
    wanted = [line.removesuffix("\r") for line in written[:-1]] + written[-1:] if end == "\n" else written
    assert read_lines(path, 1 << 20) == wanted


@pytest.mark.parametrize("character", SEPARATORS)
def test_other_separators_are_characters(path: Path, character: str) -> None:
    path.write_bytes(f"a{character}b\nc".encode())
    assert read_lines(path, 100) == [f"a{character}b", "c"]


def test_byte_order_marks_of_joined_files_are_dropped(path: Path) -> None:
    path.write_bytes("\ufeffa\n\ufeff# b\nc\ufeffd\n".encode())
    assert read_lines(path, 100) == ["a", "# b", "c\ufeffd", ""]
    path.write_bytes("\ufeff{}".encode())
    assert read_text(path, 100) == "{}"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("a cat\na dog".encode("utf-16"), "is UTF-16, expected UTF-8"),
        ("a cat\na dog".encode("utf-32"), "is UTF-32, expected UTF-8"),
        ("a cat\na dog".encode("utf-16-le"), "a zero byte in line 1"),
        ("a cat\na café".encode("latin-1"), "is not UTF-8: byte 0xe9 in line 2"),
        ("a cat\n€".encode("cp1252"), "is not UTF-8: byte 0x80 in line 2"),
    ],
)
def test_other_encodings_are_refused_by_name(path: Path, data: bytes, says: str) -> None:
    path.write_bytes(data)
    with pytest.raises(UsageError, match=says) as caught:
        read_lines(path, 100)
    assert str(path) in str(caught.value)
    assert caught.value.hint == "save it as UTF-8"


def test_size_is_bounded(path: Path) -> None:
    path.write_bytes(b"abcd")
    assert read_text(path, 4) == "abcd"
    with pytest.raises(UsageError, match="has 4 bytes, expected at most 3"):
        read_text(path, 3)
