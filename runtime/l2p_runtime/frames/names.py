"""File names of frames: `shot.####.exr`, `shot.%04d.exr`, `shot.$F4.exr` (docs/frames.md, "File names")."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from l2p_runtime.errors import UsageError

PLACEHOLDERS = "####, @@@@, %04d or $F4"

_DIGITS_MAX = 16
_PLACEHOLDER = re.compile(
    r"(?P<signs>#+|@+)"  # one digit each, as in Houdini and Nuke
    r"|%(?:0(?P<printf>[0-9]{1,3}))?d"
    r"|\$F(?P<houdini>[0-9]{0,3})(?![A-Za-z])"
)
_SPACED = re.compile(r"%[1-9][0-9]*d")


@dataclass(frozen=True, slots=True)
class FramePattern:
    """A file name with the number of a frame in it.

    Attributes:
        folder: where the files are; `#`, `@`, `%` and `$` in its name are characters.
        before: name before the number.
        after: name after the number.
        digits: minimum of digits, a minus sign included; None for one file of this name, `before`.
    """

    folder: Path
    before: str
    after: str = ""
    digits: int | None = None

    def name(self, frame: int) -> str:
        """The file name of a frame. A number of more digits is written whole."""
        return self.before if self.digits is None else f"{self.before}{frame:0{self.digits}d}{self.after}"

    def path(self, frame: int) -> Path:
        """The file of a frame."""
        return self.folder / self.name(frame)

    def frame(self, name: str) -> int | None:
        """The frame whose file has this name; None if none has."""
        number = name[len(self.before) : len(name) - len(self.after)]
        if self.digits is None or not re.fullmatch(r"-?[0-9]{1,20}", number):
            return None
        return int(number) if self.name(int(number)) == name else None


def parse_pattern(path: Path) -> FramePattern:
    """The pattern that a path ends in.

    Raises:
        UsageError: two placeholders, one of too many digits, or one that pads with spaces.
    """
    found = list(_PLACEHOLDER.finditer(path.name))
    if spaced := _SPACED.search(path.name):
        raise UsageError(
            f"`{path}` pads frames with spaces (`{spaced[0]}`)", hint=f"write %0{spaced[0][1:]} to pad with zeros"
        )
    if not found:
        return FramePattern(path.parent, path.name)
    if len(found) > 1:
        both = " and ".join(f"`{match[0]}`" for match in found[:2])
        raise UsageError(f"`{path}` has the placeholders {both} for frames, expected one")
    (match,) = found
    digits = len(match["signs"]) if match["signs"] else int(match["printf"] or match["houdini"] or 1)
    if not 1 <= digits <= _DIGITS_MAX:
        raise UsageError(f"`{match[0]}` in `{path}` has {digits} digits, expected 1 to {_DIGITS_MAX}")
    return FramePattern(path.parent, path.name[: match.start()], path.name[match.end() :], digits)
