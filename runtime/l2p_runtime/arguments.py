"""Checks single arguments of the public interface: their type, then their range; what passes is a plain Python value.

NumPy scalars count as the numbers that they are. A bool is no number: it is a mistake for another argument.
"""

from __future__ import annotations

import math
import operator
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from l2p_runtime.errors import UsageError

_SHOWN = 80
_BITS_MAX = 128


def integer(name: str, value: object) -> int:
    """An integer as a Python int, so that NumPy integers cannot wrap; its range is left to the caller.

    Raises:
        UsageError: another type.
    """
    try:
        number = None if _is_bool(value) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None:
        raise UsageError(f"{name} is {shown(value)}, expected a whole number", hint=f"pass {name} as an int")
    # A message could not show a number of thousands of digits.
    if number.bit_length() > _BITS_MAX:
        raise UsageError(f"{name} is a number of {number.bit_length():,} bits, expected up to {_BITS_MAX}")
    return number


def whole_number(name: str, value: object, low: int, high: int) -> int:
    """An integer from `low` to `high`, as a Python int.

    Raises:
        UsageError: another type, or out of range.
    """
    number = integer(name, value)
    if not low <= number <= high:
        raise UsageError(f"{name} is {number}, expected {low} to {high}")
    return number


def real_number(name: str, value: object) -> float:
    """A number as a Python float; its range, and that it is finite, are left to the caller.

    Raises:
        UsageError: another type.
    """
    number = None
    # Text would convert too, and so would arrays of one number.
    if not _is_bool(value) and not isinstance(value, (str, bytes, bytearray)) and getattr(value, "ndim", 0) == 0:
        try:
            number = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            pass
        except OverflowError:
            number = math.inf
    if number is None:
        raise UsageError(f"{name} is {shown(value)}, expected a number", hint=f"pass {name} as a float")
    return number


def flag(name: str, value: object) -> bool:
    """A bool, Python's or NumPy's.

    Raises:
        UsageError: another type.
    """
    if not _is_bool(value):
        raise UsageError(f"{name} is {shown(value)}, expected True or False")
    return bool(value)


def text(name: str, value: object) -> str:
    """Text of whole characters, which every file and tokenizer can hold.

    Raises:
        UsageError: another type, half a surrogate pair, or a null character.
    """
    if not isinstance(value, str):
        raise UsageError(f"{name} is {shown(value)}, expected text", hint=f"pass {name} as a str")
    try:
        position = value.encode().find(b"\0")
    except UnicodeEncodeError as error:
        raise UsageError(f"{name} holds what is no character at position {error.start}") from error
    if position >= 0:
        raise UsageError(f"{name} holds a null character, expected text without one")
    return str(value)


def one_of(name: str, value: object, choices: Sequence[str]) -> str:
    """One of some words.

    Raises:
        UsageError: another word or type.
    """
    if not isinstance(value, str) or value not in choices:
        raise UsageError(f"{name} is {shown(value)}, expected {' or '.join(choices)}")
    return str(value)


def size(name: str, value: object) -> tuple[int, int]:
    """Height and width in pixels, from `WIDTHxHEIGHT`.

    Raises:
        UsageError: another type, or text that is no size.
    """
    match = re.fullmatch(r"([0-9]{1,9})[xX\u00d7]([0-9]{1,9})", value.strip()) if isinstance(value, str) else None
    if match is None:
        raise UsageError(f"{name} is {shown(value)}, expected WIDTHxHEIGHT as 1024x1024")
    return int(match[2]), int(match[1])


def path(name: str, value: object) -> Path:
    """A path, from text or anything that `os.fspath` takes.

    Raises:
        UsageError: another type, or text that is no path.
    """
    found = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(found, str):
        raise UsageError(f"{name} is {shown(value)}, expected a path", hint=f"pass {name} as a str or a pathlib.Path")
    if not found or "\0" in found:
        raise UsageError(f"{name} is {shown(found)}, expected a path")
    return Path(found)


def function(name: str, value: Any) -> Callable[..., Any]:
    """Something that can be called.

    Raises:
        UsageError: it cannot.
    """
    if not callable(value):
        raise UsageError(f"{name} is {shown(value)}, expected a function")
    return value  # type: ignore[no-any-return]


def shown(value: object) -> str:
    """A value in a message: in one short line, or only its type."""
    try:
        written = repr(value)
    except Exception:  # noqa: BLE001 - a caller's own `__repr__`
        written = ""
    if not written or len(written) > _SHOWN or not written.isprintable():
        return f"a {type(value).__name__}"
    return written


def _is_bool(value: object) -> bool:
    # NumPy's is no subclass of Python's.
    return isinstance(value, bool) or type(value).__name__ in ("bool_", "bool")
