"""Draws one image per request and sends a preview of every step before it."""

import numpy as np
import triton_python_backend_utils as pb_utils
from glue import PNG, Host, as_png, asks_for, response


class TritonPythonModel:
    """What the server's Python backend calls."""

    def initialize(self, args: dict) -> None:
        """Open the bundle beside this file; the load fails with the reason."""
        self._host = Host(args)

    def execute(self, requests: list) -> None:
        """Previews, then the image, then the end; a caller that went away stops the drawing."""
        for request in requests:
            sender, png = request.get_response_sender(), asks_for(request, PNG)

            def show(step: int, steps: int, pixels: np.ndarray, sender=sender, png=png) -> None:
                preview = as_png("preview", pixels, {}) if png else {"preview": pixels}
                sender.send(response({**preview, "step": np.array([step, steps], np.int32)}))

            sender.send(self._host.answer(request, show), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def finalize(self) -> None:
        """Give the memory back."""
        self._host.service.close()
