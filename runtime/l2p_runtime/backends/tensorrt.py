"""TensorRT: runs engines that were built on a GPU like the one that is here."""

from __future__ import annotations

from l2p_runtime.backends import Backend
from l2p_runtime.backends.trt_engine import open_engine_backend

PRIORITY = 30

# What is on the public index is a placeholder that downloads the library from NVIDIA's own.
_INSTALL = "pip install --extra-index-url https://pypi.nvidia.com 'l2p-export[tensorrt]'"


def open_device(device: int) -> Backend:
    """Open a GPU.

    Raises:
        HostError: no driver, no GPU, one that the library does not support, or the library is not installed.
        UsageError: no GPU of that index.
    """
    return open_engine_backend("tensorrt", "tensorrt", _INSTALL, device)
