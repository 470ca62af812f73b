"""Reads text files of users: UTF-8, with or without a byte order mark; only a newline ends a line."""

from __future__ import annotations

import codecs
from pathlib import Path

from l2p_runtime.errors import UsageError

BYTE_ORDER_MARK = "\ufeff"

# Longest first: the mark of UTF-32 begins with that of UTF-16.
_OTHER_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


def read_text(path: Path, bytes_max: int) -> str:
    """Text of a UTF-8 file without its byte order mark; a carriage return and newline become a newline.

    Args:
        path: the file.
        bytes_max: maximum size.

    Raises:
        UsageError: the file is too large, or is not UTF-8 text.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        data = file.read(bytes_max + 1)
    if len(data) > bytes_max:
        raise UsageError(f"`{path}` has {path.stat().st_size:,} bytes, expected at most {bytes_max:,}")
    return _decoded(data, path).replace("\r\n", "\n")


def read_lines(path: Path, bytes_max: int) -> list[str]:
    """Lines of a UTF-8 file, as `read_text` reads it.

    Only a newline ends a line: U+2028, U+0085, form feeds and a lone carriage return are characters of their line. Byte
    order marks at the start of a line are dropped, because joining files leaves them there.

    Raises:
        UsageError: the file is too large, or is not UTF-8 text.
        OSError: the file cannot be read.
    """
    return [line.lstrip(BYTE_ORDER_MARK) for line in read_text(path, bytes_max).split("\n")]


def _decoded(data: bytes, path: Path) -> str:
    hint = "save it as UTF-8"
    for mark, encoding in _OTHER_MARKS:
        if data.startswith(mark):
            raise UsageError(f"`{path}` is {encoding}, expected UTF-8", hint=hint)
    try:
        text = data.decode("utf-8").removeprefix(BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UsageError(f"`{path}` is not UTF-8: byte {data[error.start]:#04x} in line {line}", hint=hint) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UsageError(f"`{path}` is not UTF-8 text: a zero byte in line {line}", hint=hint)
    return text
