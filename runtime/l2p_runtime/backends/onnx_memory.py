"""The memory of ONNX Runtime's CPU sessions: the allocator of the native library, where it is there.

Without it each tensor is fresh pages: of a call of the 4k demo at 4096 px on one core, 5.3 of 15.1 s were the system's.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from l2p_runtime.native import load_native


def use_native_allocator(options: Any) -> None:
    """Let sessions of these options take large tensors from the native library; without it, nothing changes.

    ONNX Runtime's environment gets the allocator the first time. Other sessions of the process keep their own, unless
    they too ask for those of the environment.
    """
    native = load_native()
    if native is None:
        return
    # A build of ONNX Runtime without custom operators has no way to it.
    with suppress(Exception):
        options.register_custom_ops_library(native.path)
        if native.onnx_allocator_is_registered():
            options.add_session_config_entry("session.use_env_allocators", "1")


def release_memory() -> None:
    """Give back what the allocator keeps between allocations; what is in use stays."""
    native = load_native()
    if native is not None:
        native.onnx_allocator_release()
