"""Backends, which run networks. One file per backend; nothing else in the runtime names one."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from l2p_runtime.errors import HostError, InternalError, UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from l2p_runtime.contract import EngineRecord, NetworkSpec, Target


class Array(Protocol):
    """Memory of a device seen as an array; NumPy's own arrays on the host."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""

    @property
    def dtype(self) -> Any:
        """Of the values, a NumPy dtype."""

    @property
    def nbytes(self) -> int:
        """Bytes the values take."""

    def __getitem__(self, index: Any, /) -> Any:
        """A view by slices; no copy."""

    def reshape(self, shape: tuple[int, ...], /) -> Any:
        """The same values under another shape."""


class Device(Protocol):
    """Memory, copies and the few kernels that run between networks, on one stream.

    A device takes only its own arrays; their class is up to the device.
    """

    name: str

    def alloc(self, shape: tuple[int, ...], dtype: str) -> Array:
        """Uninitialised memory."""

    def upload(self, values: NDArray[Any]) -> Array:
        """A contiguous copy of host values on the device; may be the host array itself."""

    def download(self, array: Any) -> NDArray[Any]:
        """The values on the host; may be the array itself."""

    def contiguous(self, view: Any) -> Array:
        """The view itself if its values are contiguous, else a copy."""

    def copy(self, target: Any, source: Any) -> None:
        """Copy values between equally shaped views."""

    def launch(self, kernel: str, *arguments: Any) -> None:
        """Run a kernel of `l2p_runtime.backends.host_kernels.KERNELS`, or its equal on this device."""

    def synchronize(self) -> None:
        """Wait for the stream."""

    def available_bytes(self) -> int:
        """Memory that could be allocated now."""

    def close(self) -> None:
        """Free everything; neither the device nor its arrays may be used afterwards."""


class Engine(Protocol):
    """One network, loaded and ready to run."""

    spec: NetworkSpec

    def run(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """Run on contiguous inputs and write into contiguous outputs of the right shape."""

    def memory_bytes(self) -> int:
        """Bytes of memory that `close` gives back."""

    def close(self) -> None:
        """Free the memory; the engine cannot run again."""


@dataclass(frozen=True, slots=True)
class Backend:
    """A device and how it loads a network.

    Attributes:
        identity: name and library version; another identity needs comparisons of its own.
        load: (ONNX graph file, weights file, the network's inputs and outputs) to a ready engine.
        target: target that engines must be built for to run here; None for a backend that runs ONNX graphs.
        load_engine: (engine file, its record, the network's inputs and outputs) to a ready engine; None likewise.
        runs_fused: whether it takes graphs with contrib operators of ONNX Runtime's CPU.
        library_bytes: what the library takes by itself, beside networks.
        held_bytes: (bytes of a network's weights, whether its plan is float32) to what it takes while it is loaded.
        release_memory: gives back what is kept of activations between the runs of a drawing.
    """

    name: str
    identity: str
    device: Device
    load: Callable[[Path, Path, NetworkSpec], Engine]
    target: Target | None = None
    load_engine: Callable[[Path, EngineRecord, NetworkSpec], Engine] | None = None
    runs_fused: bool = False
    library_bytes: int = 0
    held_bytes: Callable[[int, bool], int] = lambda weight_bytes, is_float32: weight_bytes
    release_memory: Callable[[], None] = lambda: None


def open_backend(name: str, device: int = 0) -> Backend:
    """Open a backend by name; `auto` takes the first that this machine can run, fastest first.

    A backend is a module of this package with `PRIORITY` and `open_device(index) -> Backend`. The module `onnx_cuda` is
    the backend `onnx-cuda`; both spellings are taken.

    Raises:
        UsageError: no backend, or no device, of that name.
        HostError: the backend's library or device is missing.
    """
    available, name = backend_names(), name.replace("_", "-")
    if name != "auto":
        if name not in available:
            raise UsageError(f"there is no backend `{name}`", hint=f"backends: auto, {', '.join(available)}")
        return _module(name).open_device(device)  # type: ignore[no-any-return]
    reasons = []
    for candidate in available:
        try:
            return _module(candidate).open_device(device)  # type: ignore[no-any-return]
        except HostError as error:
            reasons.append(f"{candidate}: {error}")
    raise HostError(f"no backend can run here: {'; '.join(reasons)}", hint="pip install 'l2p-export[cpu]'")


def backend_names() -> list[str]:
    """Every backend, fastest first, whether or not it can run here."""
    names = [module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__)]
    modules = [(name, _module(name)) for name in names]
    found = [(module.PRIORITY, name) for name, module in modules if hasattr(module, "PRIORITY")]
    return [name for _, name in sorted(found, reverse=True)]


def require_arrays(spec: NetworkSpec, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
    """Refuse arrays that a network cannot be run on; an engine library would read or write past their end.

    Raises:
        UsageError: inputs of shapes that fit neither the spec nor each other.
        InternalError: an input or output is missing, unknown, of another dtype than the spec's, or an output of another
            shape than the inputs make.
    """
    sizes = spec.sizes({name: tuple(array.shape) for name, array in inputs.items()})
    found = {name: tuple(array.shape) for name, array in outputs.items()}
    wanted = {tensor.name: tensor.resolve(sizes) for tensor in spec.outputs}
    if found != wanted:
        raise InternalError(f"`{spec.name}` writes {_shapes(wanted)}; it was given {_shapes(found)}")
    for tensor in (*spec.inputs, *spec.outputs):
        dtype = (inputs if tensor.name in inputs else outputs)[tensor.name].dtype
        if str(dtype) != tensor.dtype:
            raise InternalError(f"`{tensor.name}` of `{spec.name}` is given as {dtype}, expected {tensor.dtype}")


def _shapes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())


def _module(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
