"""One engine library on one device: its log, its runtime object and its target."""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from l2p_runtime.contract import CAPABILITIES, LIBRARY_TITLES, EngineBackend, Target, short_version
from l2p_runtime.errors import HostError, L2PError

if TYPE_CHECKING:
    from l2p_runtime.backends.cuda import CudaDevice

Module: TypeAlias = Any
"""`tensorrt_rtx` or `tensorrt`: neither has type information."""

LINES_KEPT = 8

_LINE_CHARACTERS = 400
_OUT_OF_MEMORY = re.compile(r"[Oo]ut ?[Oo]f ?(?:GPU )?[Mm]emory|OUT_OF_MEMORY|bad_alloc|MEM_ALLOC|MemoryAllocation")
_NO_GPU = re.compile(r"CUDA initialization failure|driver version is insufficient|no CUDA-capable")


@dataclass(slots=True)
class Journal:
    """The last lines of a library's log, newest last."""

    errors: deque[str] = field(default_factory=lambda: deque(maxlen=LINES_KEPT))
    warnings: deque[str] = field(default_factory=lambda: deque(maxlen=LINES_KEPT))

    def log(self, severity: str, text: str) -> None:
        """Keep one line; never raises, since the library calls it from any of its threads."""
        kept = {"INTERNAL_ERROR": self.errors, "ERROR": self.errors, "WARNING": self.warnings}.get(severity)
        if kept is not None:
            kept.append(" ".join(text.split())[:_LINE_CHARACTERS])

    def clear(self) -> None:
        """Forget what was said before the next call."""
        self.errors.clear()
        self.warnings.clear()

    def failure(self, what: str, fallback: type[L2PError], hint: str) -> L2PError:
        """The error for a call that failed.

        Args:
            what: which call, of which engine.
            fallback: its type, unless the log says that the machine lacks memory or a driver.
            hint: what to do then.
        """
        lines = list(self.errors) or list(self.warnings)
        text = f"{what}; the library said: {' | '.join(lines)}" if lines else f"{what}, and the library said nothing"
        if any(_OUT_OF_MEMORY.search(line) for line in lines):
            return HostError(f"out of GPU memory: {text}", hint="set a memory budget, or free memory of the GPU")
        if any(_NO_GPU.search(line) for line in lines):
            return HostError(text, hint="install a newer NVIDIA driver; `nvidia-smi` says which one runs")
        return fallback(text, hint=hint)


class EngineRuntime:
    """One library on one device: what all its engines share.

    Attributes:
        module: the library.
        device: whose stream and memory they use.
        target: what an engine must have been built for.
        journal: the library's log.
        runtime: the library's own object.
    """

    def __init__(self, backend: EngineBackend, module: Module, device: CudaDevice) -> None:
        """Start the library; the device was opened before, so that there is a driver.

        Raises:
            HostError: the library does not support the device, or does not start.
        """
        self.module = module
        self.device = device
        require_supported(backend, device)
        self.target = Target(backend, short_version(str(module.__version__)), device.capability)
        self.journal = Journal()
        # The library does not keep it alive.
        self._logger = _make_logger(module, self.journal)
        try:
            self.runtime = module.Runtime(self._logger)
        except (TypeError, RuntimeError) as error:  # what the bindings make of a null pointer
            what = f"{LIBRARY_TITLES[backend]} {module.__version__} does not start: {error}"
            raise self.journal.failure(what, HostError, "`nvidia-smi` says whether the driver works") from error


def require_supported(backend: EngineBackend, device: CudaDevice) -> None:
    """Refuse a GPU that a library has no kernels for.

    Raises:
        HostError: names what it has.
    """
    if device.capability not in CAPABILITIES[backend]:
        raise HostError(
            f"{device.gpu_name} has compute capability {device.capability}; "
            f"{LIBRARY_TITLES[backend]} runs on {', '.join(CAPABILITIES[backend])}",
            hint="use --backend onnx-cuda, which runs the bundle's graphs on any GPU",
        )


def _make_logger(module: Module, journal: Journal) -> Any:
    class Logger(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, text: str) -> None:
            journal.log(severity.name, text)

    return Logger()
