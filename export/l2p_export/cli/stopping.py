"""Ctrl-C and SIGTERM: they unwind a command, so that its partial files are removed."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from types import FrameType


class TerminatedError(BaseException):
    """SIGTERM arrived; unwinds like KeyboardInterrupt so that partial files are removed."""


@dataclass(frozen=True, slots=True)
class Stops:
    """The signals that have arrived to stop a command.

    A library that is being imported, or a callback of one, may turn what a signal raises into an error of its own, or
    drop it. So they are noted, and `again` raises where a command would go on.
    """

    arrived: list[int] = field(default_factory=list)

    def install(self) -> None:
        """Handle SIGTERM, and SIGINT unless it is ignored, as for background commands of a shell."""
        signal.signal(signal.SIGTERM, self._stop)
        if callable(signal.getsignal(signal.SIGINT)):
            signal.signal(signal.SIGINT, self._stop)

    def uninstall(self) -> None:
        """Let both end the process at once: what libraries do when the interpreter ends needs no unwinding."""
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) == self._stop:
                signal.signal(number, signal.SIG_DFL)

    def again(self) -> None:
        """Raise for the first signal, if one has arrived.

        Raises:
            KeyboardInterrupt: SIGINT.
            TerminatedError: SIGTERM.
        """
        if self.arrived:
            raise KeyboardInterrupt if self.arrived[0] == signal.SIGINT else TerminatedError

    def _stop(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.arrived.append(number)
        self.again()
