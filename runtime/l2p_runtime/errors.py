"""The error classes: each error states what was found, what was expected, what to do, and an exit code.

The codes (docs/design.md, "Exit codes"): 0 done, 2 usage, 3 environment, 4 artifact, 5 parity, 6 frames, 70 our bug,
130/143 interrupted.
"""

from __future__ import annotations

from typing import ClassVar


class L2PError(Exception):
    """A failure that a user can act on.

    Args:
        message: what was found and what was expected; no full stop unless it has several sentences.
        hint: what to do about it, as an instruction or a command; empty when nothing can be done.
    """

    exit_code: ClassVar[int] = 70

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(L2PError):
    """The call itself is wrong: sizes, options, prompts, names."""

    exit_code = 2


class HostError(L2PError):
    """The machine lacks something: a library, a GPU, disk, memory, permission."""

    exit_code = 3


class UnsupportedError(HostError):
    """A backend cannot run a network, though nothing is wrong with the network."""


class ArtifactError(L2PError):
    """A checkpoint, ONNX graph, engine or bundle is damaged, foreign or not what it claims to be."""

    exit_code = 4


class ParityError(L2PError):
    """A comparison is over its threshold."""

    exit_code = 5


class FramesError(L2PError):
    """Some frames of a shot were not drawn or not written; all others are on disk."""

    exit_code = 6


class InternalError(L2PError):
    """A state that only a bug in l2p-export can reach."""

    exit_code = 70


class CancelledError(L2PError):
    """The caller asked to stop."""

    exit_code = 130


def counted(number: int, noun: str) -> str:
    """`1 byte`, `2 bytes`, `1,024 bytes`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
