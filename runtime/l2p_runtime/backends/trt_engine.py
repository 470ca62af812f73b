"""Engines of TensorRT and of TensorRT for RTX: opened once, run on the device's stream in shared scratch memory.

    file -> TrtEngine -> run(inputs, outputs): profile, shapes, scratch memory, addresses, launch

Both libraries have the same calls and fail alike: they return None, False or 0 and say why in their log. Each such
answer is raised as an error here. Without a driver they may crash the process, so a device is opened first.
"""

from __future__ import annotations

import functools
import importlib
import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from l2p_runtime.backends import Array, Backend, require_arrays
from l2p_runtime.backends.trt_layers import LayerPrecision, read_layers
from l2p_runtime.backends.trt_runtime import EngineRuntime, Module, require_supported
from l2p_runtime.contract import (
    LIBRARY_TITLES,
    PORTABLE,
    EngineBackend,
    EngineProfile,
    EngineRecord,
    NetworkSpec,
    Target,
    TensorSpec,
    target_from_spelling,
)
from l2p_runtime.errors import ArtifactError, HostError, InternalError, L2PError, UsageError

if TYPE_CHECKING:
    from l2p_runtime.backends.cuda import CudaDevice
    from l2p_runtime.backends.cuda_arrays import CudaArray

ALIGNMENT_BYTES = 256
"""Of every address that the libraries are given."""

_DTYPES = {"float32": "FLOAT", "float16": "HALF", "uint8": "UINT8", "int64": "INT64", "bool": "BOOL"}
_REBUILD = "build the bundle again with this version of the library, for this GPU"


class TrtEngine:
    """One engine with one execution context; implements `Engine`.

    Activations live in the device's scratch memory, which all engines of the device share: they run one after the
    other on its stream, so that together they need the largest and not the sum.
    """

    # The library's objects are nowhere but in these attributes, arguments and locals included: an error that somebody
    # keeps refers to the frames that it passed, and would keep gigabytes of weights on the device after `close`.

    def __init__(self, shared: EngineRuntime, path: Path, record: EngineRecord, spec: NetworkSpec) -> None:
        """Open an engine; its weights are on the device afterwards.

        Args:
            shared: the library and the device.
            path: the file.
            record: what the bundle says of it.
            spec: the network's inputs and outputs.

        Raises:
            ArtifactError: the file is no engine, is for another target, or is not what record and spec say.
            HostError: the device has not enough memory.
        """
        _require_target(path, record, shared.target)
        self.spec = spec
        self._shared = shared
        self._profiles = record.profiles
        self._file_bytes = path.stat().st_size
        self._prepared: tuple[int, Mapping[str, tuple[int, ...]]] | None = None
        self._scratch_bytes = 0
        self._context: Any = None
        shared.journal.clear()
        self._engine = _deserialize(shared, path)
        try:
            self._require_interface(path.name, len(record.profiles))
            self._stream_weights()
            # By default it would hold the activations of its largest profile for as long as it lives.
            strategy = shared.module.ExecutionContextAllocationStrategy.USER_MANAGED
            self._context = self._engine.create_execution_context(strategy)
            self._require(self._context is not None, "create_execution_context()", hint=_REBUILD)
        except BaseException:
            self.close()
            raise

    def run(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """Start a run on the device's stream; it has ended once the device is synchronised.

        Args:
            inputs: contiguous arrays of the device, of the spec's dtypes.
            outputs: likewise, of the shapes that follow from the inputs; they are written.

        Raises:
            UsageError: no optimization profile covers these sizes.
            ArtifactError: the engine does not do what the bundle says of it.
            HostError: the device lacks memory for the activations, or the library failed.
            InternalError: an array of another dtype or layout, or the engine is closed.
        """
        self._require_open()
        require_arrays(self.spec, inputs, outputs)
        arrays = {tensor.name: _require_contiguous(tensor.name, inputs) for tensor in self.spec.inputs}
        written = {tensor.name: _require_contiguous(tensor.name, outputs) for tensor in self.spec.outputs}
        _require_aligned(written)
        device = self._shared.device
        self._shared.journal.clear()
        device.make_current()
        self._prepare({name: tuple(array.shape) for name, array in arrays.items()})
        # Copies and scratch are held until the launch: freed after it, they go in stream order, behind it.
        placed = {name: _aligned(device, array) for name, array in arrays.items()} | written
        scratch = self._provide_scratch()
        for name, array in placed.items():
            told = self._context.set_tensor_address(name, array.address)
            self._require(told, f"set_tensor_address({name})", InternalError)
        self._require(self._context.execute_async_v3(device.stream), "execute_async_v3()")
        del placed, scratch

    def layers(self) -> tuple[LayerPrecision, ...]:
        """What the engine computes in, layer by layer; see `read_layers`."""
        self._require_open()
        return read_layers(self._shared.module, self._engine)

    def memory_bytes(self) -> int:
        """Bytes of its weights on the device, of its file where the library does not tell; none once closed."""
        if self._engine is None:
            return 0
        statistic = getattr(getattr(self._shared.module, "EngineStat", None), "TOTAL_WEIGHTS_SIZE", None)
        total = int(self._engine.get_engine_stat(statistic)) if statistic is not None else 0
        streamable = int(getattr(self._engine, "streamable_weights_size", 0))
        if streamable > 0:
            return max(total - streamable, 0) + int(self._engine.weight_streaming_budget_v2)
        return max(total, 0) or self._file_bytes

    def close(self) -> None:
        """Wait for what runs and give the weights back; a second time does nothing.

        Raises:
            HostError: something that ran on the device failed; the weights go all the same.
        """
        if self._engine is None:
            return
        try:
            # Its kernels read weights that go away with it.
            self._shared.device.synchronize()
        finally:
            self._prepared = None
            self._context = None
            self._engine = None

    def _require_open(self) -> None:
        if self._context is None:
            raise InternalError(f"the engine of `{self.spec.name}` is closed")

    def _stream_weights(self) -> None:
        """Keep in host memory what does not fit the GPU, of an engine that was built for it; before a context is made.

        Its own default is to put all weights on the GPU all the same.
        """
        streamable = int(getattr(self._engine, "streamable_weights_size", 0))
        if streamable > 0:
            budget = min(int(self._engine.get_weight_streaming_automatic_budget()), streamable)
            self._engine.weight_streaming_budget_v2 = budget
            found = int(self._engine.weight_streaming_budget_v2)
            self._require(found == budget, f"weight_streaming_budget_v2 = {budget} (it is {found})")

    def _require_interface(self, file: str, profiles: int) -> None:
        """The engine has the spec's inputs and outputs and the record's profiles, and no others."""
        trt = self._shared.module
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        for kind, mode, wanted in (
            ("inputs", trt.TensorIOMode.INPUT, self.spec.inputs),
            ("outputs", trt.TensorIOMode.OUTPUT, self.spec.outputs),
        ):
            found = {name for name in names if self._engine.get_tensor_mode(name) == mode}
            if found != {tensor.name for tensor in wanted}:
                raise ArtifactError(
                    f"`{file}` has {kind} {_listed(found)}, the manifest says {_listed(t.name for t in wanted)}",
                    hint=_REBUILD,
                )
            for tensor in wanted:
                self._require_tensor(file, tensor)
        if self._engine.num_optimization_profiles != profiles:
            raise ArtifactError(
                f"`{file}` has {self._engine.num_optimization_profiles} optimization profiles, "
                f"the manifest says {profiles}",
                hint=_REBUILD,
            )

    def _require_tensor(self, file: str, tensor: TensorSpec) -> None:
        trt = self._shared.module
        dtype, place = self._engine.get_tensor_dtype(tensor.name), self._engine.get_tensor_location(tensor.name)
        if dtype == getattr(trt.DataType, _DTYPES[tensor.dtype]) and place == trt.TensorLocation.DEVICE:
            return
        found, where = (str(value).rpartition(".")[2].lower() for value in (dtype, place))
        raise ArtifactError(
            f"`{tensor.name}` of `{file}` is {found} on the {where}, the manifest says {tensor.dtype}", hint=_REBUILD
        )

    def _prepare(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Choose the profile, set the shapes and ask how much scratch memory they need, when they change."""
        index = self._find_profile(shapes)
        if self._prepared == (index, shapes):
            return
        self._prepared = None
        if self._context.active_optimization_profile != index:
            chosen = self._context.set_optimization_profile_async(index, self._shared.device.stream)
            self._require(chosen, f"set_optimization_profile_async({index})")
        for name, shape in shapes.items():
            taken = self._context.set_input_shape(name, shape)
            self._require(taken, f"set_input_shape({name}, {list(shape)})", ArtifactError, _REBUILD)
        # What it will write fits the arrays that it is given, which follow from the spec.
        sizes = self.spec.sizes(dict(shapes))
        for tensor in self.spec.outputs:
            found, wanted = list(self._context.get_tensor_shape(tensor.name)), list(tensor.resolve(sizes))
            call = f"get_tensor_shape({tensor.name}): {found}, expected {wanted},"
            self._require(found == wanted, call, ArtifactError, _REBUILD)
        self._scratch_bytes = self._ask_scratch_bytes(index)
        self._prepared = index, shapes

    def _find_profile(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        for index, profile in enumerate(self._profiles):
            if profile.covers(shapes):
                return index
        raise _no_profile(self.spec.name, shapes, self._profiles)

    def _ask_scratch_bytes(self, index: int) -> int:
        # It answers 0 both when nothing is needed and when it fails; the profile's own need is never too little.
        size_bytes = 0
        if hasattr(self._context, "update_device_memory_size_for_shapes"):
            size_bytes = int(self._context.update_device_memory_size_for_shapes())
        if size_bytes <= 0:
            size_bytes = int(self._engine.get_device_memory_size_for_profile_v2(index))
        self._require(size_bytes >= 0, f"get_device_memory_size_for_profile_v2({index})")
        return size_bytes

    def _provide_scratch(self) -> CudaArray | None:
        """Hand over the scratch memory; every time, since another engine may have made it grow and move."""
        if not self._scratch_bytes:
            return None
        try:
            scratch = self._shared.device.scratch(self._scratch_bytes)
        except HostError as error:
            raise HostError(
                f"the activations of `{self.spec.name}` take {self._scratch_bytes:,} bytes at these sizes: {error}",
                hint=error.hint,
            ) from error
        self._shared.journal.clear()
        self._context.set_device_memory(scratch.address, scratch.nbytes)
        # It returns nothing; where it refuses, the context keeps memory that may be somebody else's by now.
        self._require(not self._shared.journal.errors, "set_device_memory()")
        return scratch

    def _require(self, answer: bool, call: str, kind: type[L2PError] = HostError, hint: str = "") -> None:
        """Raise what the log says when a call has failed."""
        if answer:
            return
        self._prepared = None
        what = f"{call} failed in the engine of `{self.spec.name}`"
        raise self._shared.journal.failure(what, kind, hint or "start again in a new process; report it if it stays")


def open_engine_backend(backend: EngineBackend, module_name: str, install: str, index: int) -> Backend:
    """Open a GPU and the library that runs engines on it.

    Args:
        backend: which library.
        module_name: its import name.
        install: what to run when it is missing.
        index: of the GPU.

    Raises:
        HostError: no driver, no GPU, one that the library does not support, or no library.
        UsageError: no GPU of that index.
    """
    from l2p_runtime.backends.cuda import open_cuda

    device = open_cuda(index, install)
    try:
        require_supported(backend, device)
        module = _import_library(backend, module_name, install)
        shared = EngineRuntime(backend, module, device)
    except BaseException:
        device.close()
        raise
    return Backend(
        name=backend,
        identity=f"{module_name} {module.__version__} on {device.capability}",
        device=device,
        load=functools.partial(_refuse_graph, backend),
        target=shared.target,
        load_engine=functools.partial(TrtEngine, shared),
    )


def _import_library(backend: EngineBackend, module_name: str, install: str) -> Module:
    try:
        return importlib.import_module(module_name)
    except (ImportError, OSError, RuntimeError) as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == module_name
        found = "is not installed" if absent else f"does not load: {error}"
        raise HostError(f"{LIBRARY_TITLES[backend]} {found}", hint=install) from error


def _refuse_graph(backend: EngineBackend, graph: Path, weights: Path, spec: NetworkSpec) -> NoReturn:
    del weights
    raise InternalError(f"backend `{backend}` runs engines, it was given the graph `{graph.name}` of `{spec.name}`")


def _require_target(path: Path, record: EngineRecord, here: Target) -> None:
    built = target_from_spelling(record.target)
    runs = (built.backend, built.library_version) == (here.backend, here.library_version)
    if not runs or built.compute_capability not in (here.compute_capability, PORTABLE):
        raise ArtifactError(
            f"`{path.name}` was built for {record.target}, this machine runs {here.spelling}",
            hint=f"build the bundle again with --backend {here.backend} "
            f"--target {here.backend}-{here.compute_capability}",
        )


def _deserialize(shared: EngineRuntime, path: Path) -> Any:
    """The engine in a file, whose weights go to the device."""
    if not path.stat().st_size:
        raise ArtifactError(f"`{path.name}` is empty", hint=_REBUILD)
    shared.device.make_current()
    # What arrays gave back returns to the GPU then, and the library allocates weights outside of the device's pool.
    shared.device.synchronize()
    with path.open("rb") as file:
        # Mapped, the file's pages are the only copy on the host, and the system may drop them. A stream reader is no
        # cure: the library asks it for all weights at once, and its bindings want them in one piece of memory
        # (NVIDIA/TensorRT #4327).
        engine = shared.runtime.deserialize_cuda_engine(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    if engine is None:
        what = f"`{path.name}` cannot be opened with {shared.target.backend} {shared.module.__version__}"
        raise shared.journal.failure(what, ArtifactError, _REBUILD)
    return engine


def _require_contiguous(name: str, arrays: Mapping[str, Any]) -> CudaArray:
    array: CudaArray = arrays[name]
    if not array.is_contiguous:
        raise InternalError(f"`{name}` of shape {list(array.shape)} is not contiguous")
    return array


def _require_aligned(arrays: Mapping[str, CudaArray]) -> None:
    for name, array in arrays.items():
        if array.address % ALIGNMENT_BYTES:
            raise InternalError(f"output `{name}` is at {array.address:#x}, not at a multiple of {ALIGNMENT_BYTES}")


def _aligned(device: CudaDevice, array: CudaArray) -> CudaArray:
    """The array itself where its address will do, else a copy: a view may begin anywhere, as rows of tokens do."""
    if not array.address % ALIGNMENT_BYTES:
        return array
    copy = device.alloc(array.shape, str(array.dtype))
    device.copy(copy, array)
    return copy


def _no_profile(network: str, shapes: Mapping[str, tuple[int, ...]], profiles: Sequence[EngineProfile]) -> UsageError:
    """Names the inputs that are out of range, and the ranges that they are out of."""
    outside = [[part for part in profile.inputs if not part.covers(shapes[part.name])] for profile in profiles]
    names = dict.fromkeys(part.name for parts in outside for part in parts)
    ranges = (", ".join(f"{part.name} {list(part.min)} to {list(part.max)}" for part in parts) for parts in outside)
    return UsageError(
        f"the engine of `{network}` was not built for {', '.join(f'{name} {list(shapes[name])}' for name in names)}; "
        f"it takes {'; or '.join(ranges)}",
        hint="draw a size within these ranges, or build the bundle again with a --profile that covers this one",
    )


def _listed(names: Any) -> str:
    return ", ".join(sorted(names)) or "none"
