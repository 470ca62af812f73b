"""What a render-farm job holds, whatever its manager: frames, the call of `generate`, and the needs of a machine."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from l2p_runtime.errors import UsageError, counted
from l2p_runtime.frames.names import PLACEHOLDERS, parse_pattern
from l2p_runtime.frames.prompts import FILE_BYTES_MAX
from l2p_runtime.frames.ranges import FrameRange

NAME_MAX = 128
"""Characters of a job's name that Open Job Description takes."""

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
"""Characters that no manager's file can hold: most controls, lone surrogates, and what XML has no character for."""

_NOTICE_SECONDS_MAX = 600

PROMPTS = "prompts.jsonl"
_MOVED = ("--prompt", "--negative")


@dataclass(frozen=True, slots=True)
class Argument:
    """One option of `generate` with its value.

    Attributes:
        option: its name, as `--steps`.
        value: its value; empty for a flag.
        kind: `flag`; `word` for values without spaces, quotes and braces; `text` for any text; `file` for a file
            that is read, an absolute path; `folder` likewise.
    """

    option: str
    value: str
    kind: Literal["flag", "word", "text", "file", "folder"]

    @property
    def text(self) -> str:
        """The argument as one word: its value may begin with a hyphen."""
        return self.option if self.kind == "flag" else f"{self.option}={self.value}"

    def __post_init__(self) -> None:
        """Refuse values that no manager can pass on.

        Raises:
            UsageError: a control character, a lone surrogate, or a relative path.
        """
        check_text(self.option, self.value)
        if self.kind in ("file", "folder") and not Path(self.value).is_absolute():
            raise UsageError(f"{self.option} is `{self.value}`, expected an absolute path")


@dataclass(frozen=True, slots=True)
class Needs:
    """What drawing takes of a machine.

    Attributes:
        memory_bytes: of the host.
        gpu_memory_bytes: of one GPU; 0 for a job on the CPU.
        cores: processor cores; None for what the manager gives by default.
    """

    memory_bytes: int
    gpu_memory_bytes: int = 0
    cores: int | None = None

    @property
    def memory_mib(self) -> int:
        """Host memory in MiB, rounded up."""
        return -(-self.memory_bytes >> 20)

    @property
    def gpu_memory_mib(self) -> int:
        """GPU memory in MiB, rounded up."""
        return -(-self.gpu_memory_bytes >> 20)


@dataclass(frozen=True, slots=True)
class CueOptions:
    """What only OpenCue asks for.

    Attributes:
        show, shot: as Cuebot knows them.
        user: who submits.
        user_id: the user's number on the hosts; None for what they make of the name.
        service: service of the layer, which must exist in Cuebot; `default` always does.
        tags: hosts that may draw have one of these; empty for the service's tags.
    """

    show: str
    shot: str
    user: str
    user_id: int | None
    service: str = "default"
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DrawJob:
    """Frames of one bundle, drawn in chunks.

    Attributes:
        name: of the job, as the manager shows it.
        program: command that draws, `l2p-export` or its path on the farm's machines.
        bundle: absolute path of the bundle.
        frames: frame numbers; a farm draws them in ascending order.
        chunk: frames that one task draws.
        folder: absolute path of the folder of the frames.
        pattern: file name of a frame, as `shot.####.exr`.
        arguments: further options of `generate`.
        needs: what drawing takes of a machine.
        timeout_seconds: limit for one chunk.
        load_seconds: limit for loading the bundle, where a worker keeps it loaded.
        notice_seconds: from the request to stop until the kill.
        cue: what only OpenCue asks for.
    """

    name: str
    program: str
    bundle: Path
    frames: FrameRange
    chunk: int
    folder: Path
    pattern: str
    arguments: tuple[Argument, ...]
    needs: Needs
    timeout_seconds: int = 86_400
    load_seconds: int = 3_600
    notice_seconds: int = 60
    cue: CueOptions | None = None

    def __post_init__(self) -> None:
        """Refuse what no manager takes.

        Raises:
            UsageError: a value out of range, or text with control characters.
        """
        for option, text in (("--name", self.name), ("--pattern", self.pattern), ("--program", self.program)):
            check_text(option, text, lines=False)
            if not text.strip():
                raise UsageError(f"{option} is empty")
        for option, path in (("BUNDLE", self.bundle), ("--pattern", self.folder)):
            check_text(option, str(path), lines=False)
        if len(self.name) > NAME_MAX:
            raise UsageError(f"--name has {counted(len(self.name), 'character')}, expected up to {NAME_MAX}")
        if parse_pattern(self.folder / self.pattern).digits is None:
            raise UsageError(f"--pattern is `{self.pattern}`, expected a name with {PLACEHOLDERS} for the frame")
        for option, value in (("--chunk", self.chunk), ("--timeout", self.timeout_seconds)):
            if value < 1:
                raise UsageError(f"{option} is {value}, expected 1 or more")
        if not 1 <= self.notice_seconds <= _NOTICE_SECONDS_MAX:
            raise UsageError(f"--notice is {self.notice_seconds}, expected 1 to {_NOTICE_SECONDS_MAX} seconds")


def with_prompts_file(job: DrawJob, folder: Path) -> tuple[DrawJob, str]:
    """A job whose prompt is in a file beside it, one line per frame, for prompts that a manager cannot pass on.

    Args:
        job: the job.
        folder: where the file `PROMPTS` will lie.

    Returns:
        The job that reads the file, and the text of the file.

    Raises:
        UsageError: the job reads such a file already, or this one would be too large.
    """
    texts = {argument.option.lstrip("-"): argument.value for argument in job.arguments if argument.option in _MOVED}
    if any(argument.option == "--prompts" for argument in job.arguments):
        raise UsageError(
            "the prompt is too long for a job, or has what the manager would change, and --prompts is given too",
            hint="put this prompt into the lines of --prompts",
        )
    text = "".join(json.dumps({"frame": frame, **texts}) + "\n" for frame in sorted(job.frames))
    if len(text) > FILE_BYTES_MAX:
        raise UsageError(
            f"the prompts of {counted(len(job.frames), 'frame')} take {len(text):,} bytes, expected up to "
            f"{FILE_BYTES_MAX:,}",
            hint="write several jobs, or a shorter prompt",
        )
    kept = tuple(argument for argument in job.arguments if argument.option not in _MOVED)
    return replace(job, arguments=(*kept, Argument("--prompts", str(folder / PROMPTS), "file"))), text


def check_text(option: str, text: str, *, lines: bool = True) -> None:
    """Refuse characters that a job file cannot hold.

    Args:
        option: whose value it is.
        text: the value.
        lines: whether it may have several lines and tabs.

    Raises:
        UsageError: a control character or a lone surrogate.
    """
    found = _CONTROL.search(text) or (None if lines else re.search(r"[\t\r\n]", text))
    if found is not None:
        raise UsageError(
            f"{option} has the character U+{ord(found[0]):04X} at {found.start() + 1}, which a job cannot pass on",
            hint=f"remove it from {option}",
        )
