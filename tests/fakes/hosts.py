"""Stand-ins for `hou` and `nuke`: what the examples of docs/embedding.md call, as their manuals describe it."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any, Self


class OperationInterrupted(Exception):  # noqa: N818 - Houdini's name
    """Raised by `updateProgress` after the artist has interrupted."""


class Houdini(types.ModuleType):
    """`hou`. Interrupts after a number of calls of `updateProgress`."""

    OperationInterrupted = OperationInterrupted

    def __init__(self, interrupt_after: int | None = None) -> None:
        super().__init__("hou")
        self.shares: list[float] = []
        self.open_bars = 0
        self._interrupt_after = interrupt_after

    def InterruptableOperation(self, name: str, *, open_interrupt_dialog: bool = False) -> Bar:  # noqa: N802
        """A bar for a block."""
        assert name
        assert open_interrupt_dialog
        return Bar(self)

    def update(self, share: float) -> None:
        """What a bar receives."""
        assert self.open_bars == 1
        self.shares.append(share)
        if self._interrupt_after is not None and len(self.shares) > self._interrupt_after:
            raise OperationInterrupted


class Bar:
    """`hou.InterruptableOperation`."""

    def __init__(self, host: Houdini) -> None:
        self._host = host

    def __enter__(self) -> Self:
        self._host.open_bars += 1
        return self

    def __exit__(self, *error: object) -> None:
        self._host.open_bars -= 1

    def updateProgress(self, percentage: float) -> None:  # noqa: N802
        """Show a share, 0 to 1."""
        assert 0 <= percentage <= 1
        self._host.update(percentage)


class Nuke(types.ModuleType):
    """`nuke`. Cancels after a number of calls of `isCancelled`."""

    def __init__(self, cancel_after: int | None = None) -> None:
        super().__init__("nuke")
        self.percents: list[int] = []
        self.messages: list[str] = []
        self.files: list[str] = []
        self.nodes = types.SimpleNamespace(Read=self._read)
        self._cancel_after, self._asked = cancel_after, 0

    def ProgressTask(self, name: str) -> Nuke:  # noqa: N802
        """A bar."""
        assert name
        return self

    def setMessage(self, text: str) -> None:  # noqa: N802
        """Show text in the bar."""
        assert text

    def setProgress(self, percent: int) -> None:  # noqa: N802
        """Show a percentage; Nuke takes no float."""
        assert isinstance(percent, int)
        self.percents.append(percent)

    def isCancelled(self) -> bool:  # noqa: N802
        """Whether the artist has cancelled."""
        self._asked += 1
        return self._cancel_after is not None and self._asked > self._cancel_after

    def message(self, text: str) -> None:
        """Show a dialog."""
        self.messages.append(text)

    def executeInMainThread(  # noqa: N802
        self, call: Callable[..., Any], args: object = (), kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """Call a function; a single argument needs no tuple."""
        call(*(args if isinstance(args, tuple) else (args,)), **(kwargs or {}))

    def _read(self, file: str) -> None:
        self.files.append(file)
