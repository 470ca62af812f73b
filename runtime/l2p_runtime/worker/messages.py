"""Messages between a worker and its clients: one JSON object a line, of bounded length.

A client sends one request and reads until the answer; what it sends meanwhile, and that it is gone, cancels.

| request | answer |
| --- | --- |
| `{"do": "status"}` | `{"done": {...}}` |
| `{"do": "stop"}` | `{"done": {}}`; the connection is closed when the worker ends |
| `{"do": "draw", ...}` | `{"event": {...}}` any number of times, then `{"done": {...}}` |

An error is `{"error": {"kind", "text", "hint"}}` instead of `done`.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from typing import Any

from l2p_runtime import errors
from l2p_runtime.errors import ArtifactError, HostError, InternalError, L2PError, UsageError

MESSAGE_BYTES_MAX = 8 << 20
"""A request holds prompts; a longer one is refused unread."""

_TEXT_MAX = 4_000
_PIECE_BYTES = 1 << 16

Message = dict[str, Any]


class Messages:
    """Sends and receives messages on one connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._read = bytearray()

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message.

        Raises:
            UsageError: it is too long.
            OSError: the peer has gone, or reads nothing.
        """
        # In ASCII: a lone surrogate in a path or an error's text stays one.
        line = json.dumps(message).encode("ascii") + b"\n"
        if len(line) > MESSAGE_BYTES_MAX:
            raise UsageError(
                f"the request has {len(line):,} bytes, a worker takes {MESSAGE_BYTES_MAX:,}", hint="draw fewer frames"
            )
        self._connection.sendall(line)

    def receive(self) -> Message | None:
        """The next message; None when the peer has gone.

        Raises:
            ArtifactError: it is too long, or no JSON object.
            OSError: the connection failed.
        """
        while b"\n" not in self._read:
            if len(self._read) > MESSAGE_BYTES_MAX:
                raise ArtifactError(f"a message has over {MESSAGE_BYTES_MAX:,} bytes")
            piece = self._connection.recv(_PIECE_BYTES)
            if not piece:
                return None
            self._read += piece
        line, _, rest = self._read.partition(b"\n")
        self._read = rest
        try:
            message = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ArtifactError("a message is no JSON") from error
        if not isinstance(message, dict):
            raise ArtifactError(f"a message is a {type(message).__name__}, expected an object")
        return message

    def close(self) -> None:
        """Close the connection, also for a thread that waits for a message."""
        try:
            self._connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        finally:
            self._connection.close()


def error_message(error: BaseException) -> Message:
    """An error as its message; one that is no `L2PError` is a bug or a lack of memory."""
    if isinstance(error, MemoryError):
        error = HostError("the worker is out of memory", hint="draw a smaller image, or give it more memory")
    if not isinstance(error, L2PError):
        error = InternalError(f"{type(error).__name__}: {error}", hint="the worker's log has the traceback")
    facts = {"kind": type(error).__name__, "text": str(error)[:_TEXT_MAX], "hint": error.hint[:_TEXT_MAX]}
    return {"error": facts}


def raise_error(facts: object) -> None:
    """Raise the error that a message holds.

    Raises:
        L2PError: of the kind that the worker had; InternalError for one that is not known here.
    """
    if not isinstance(facts, dict):
        raise InternalError("the worker sent an error that is none")
    kind = getattr(errors, str(facts.get("kind")), None)
    if not (isinstance(kind, type) and issubclass(kind, L2PError)):
        kind = InternalError
    raise kind(str(facts.get("text")), hint=str(facts.get("hint", "")))
