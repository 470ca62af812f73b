"""The only place that loads ONNX Runtime: without its telemetry, unless the user set that switch.

From version 1.31, Linux builds write an identifier of the machine into `~/.cache` and look up a host to report to, from
a few seconds after the library was loaded. It reads the switch once, when it is loaded.
"""

from __future__ import annotations

import os
from typing import Any

from l2p_runtime.errors import HostError

TELEMETRY_SWITCH = "ORT_DISABLE_TELEMETRY"
"""Environment variable that ONNX Runtime reads; `1` turns its telemetry off."""


ERRORS_ONLY = 3
"""ONNX Runtime's severity of log messages that hides warnings."""


def disable_telemetry() -> None:
    """Turn ONNX Runtime's telemetry off for this process and its children; a setting of the user stays as it is."""
    os.environ.setdefault(TELEMETRY_SWITCH, "1")


def import_onnxruntime(install: str = "pip install 'l2p-export[cpu]'") -> Any:
    """ONNX Runtime.

    Args:
        install: what to run when it is missing.

    Raises:
        HostError: it cannot be imported.
    """
    disable_telemetry()
    try:
        import onnxruntime
    except ImportError as error:
        raise HostError(f"ONNX Runtime cannot be imported: {error}", hint=install) from error
    # It warns of machines without GPUs, among other things that nobody can change.
    onnxruntime.set_default_logger_severity(ERRORS_ONLY)
    return onnxruntime
