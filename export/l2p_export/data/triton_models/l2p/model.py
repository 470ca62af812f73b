"""Draws one image per request. Limits, drawing and messages are those of `l2p_runtime`."""

from glue import Host


class TritonPythonModel:
    """What the server's Python backend calls."""

    def initialize(self, args: dict) -> None:
        """Open the bundle beside this file; the load fails with the reason."""
        self._host = Host(args)

    def execute(self, requests: list) -> list:
        """One response per request."""
        return [self._host.answer(request) for request in requests]

    def finalize(self) -> None:
        """Give the memory back."""
        self._host.service.close()
