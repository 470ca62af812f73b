"""Standard streams that are closed, full or no longer read: progress is lost then, and work is not.

A stream that is closed when the command starts (`2>&-`) counts as `/dev/null`. Nothing that happens to stderr ends a
command. Results that cannot be written to stdout are an error, except that a reader who has read enough (`| head -1`)
ends the command silently, with the code of a process that SIGPIPE ended.
"""

from __future__ import annotations

import io
import os
import select
import sys
from contextlib import suppress
from typing import TextIO

READER_GONE = 141

_STREAMS = ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w"))


def open_streams() -> None:
    """Replace closed streams, whose numbers the next files would get, and let stderr lose what it cannot write."""
    for number, name, mode in _STREAMS:
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number: those below it are open by now.
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", errors="replace", closefd=False))  # noqa: SIM115
    # In a test, they may be no files.
    with suppress(OSError, ValueError):
        if (sys.stdout.fileno(), sys.stderr.fileno()) == (1, 2):
            sys.stdout = _over(sys.stdout, _Named(1, "w", closefd=False))
            sys.stderr = _over(sys.stderr, _Lossy(2, "w", closefd=False))


def is_stdout_read() -> bool:
    """False once the reader of the pipe that stdout is has gone away."""
    poll = select.poll()
    poll.register(1, 0)
    return not any(event & select.POLLERR for _, event in poll.poll(0))


def drop_rest() -> None:
    """Drop what a stream could not write; the interpreter would try again when it ends, and turn that into its code."""
    for number, name, _ in _STREAMS[1:]:
        stream = getattr(sys, name)
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, number)
                os.close(null)


class _Named(io.FileIO):
    """Standard output, whose errors say so."""

    def write(self, data: bytes | bytearray | memoryview, /) -> int:  # type: ignore[override]
        try:
            while (written := super().write(data)) is None:  # another process has made the pipe non-blocking
                select.select([], [1], [])
        except OSError as error:
            raise OSError(error.errno, error.strerror, "stdout") from error
        return written


class _Lossy(io.FileIO):
    """Standard error, which says of everything that it is written."""

    def write(self, data: bytes | bytearray | memoryview, /) -> int:  # type: ignore[override]
        with suppress(OSError):
            return super().write(data) or memoryview(data).nbytes
        return memoryview(data).nbytes


def _over(stream: TextIO, raw: io.FileIO) -> TextIO:
    """The same text stream over another file."""
    stream.flush()
    by_line = stream is sys.stderr or stream.isatty()
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding=stream.encoding, errors=stream.errors, line_buffering=by_line
    )
