"""TensorRT for RTX: runs engines that were compiled ahead of time, on GeForce and RTX cards."""

from __future__ import annotations

from l2p_runtime.backends import Backend
from l2p_runtime.backends.trt_engine import open_engine_backend

PRIORITY = 20


def open_device(device: int) -> Backend:
    """Open a GPU.

    Raises:
        HostError: no driver, no GPU, one that the library does not support, or the library is not installed.
        UsageError: no GPU of that index.
    """
    return open_engine_backend("rtx", "tensorrt_rtx", "pip install 'l2p-export[rtx]'", device)
