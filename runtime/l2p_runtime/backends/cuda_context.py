"""One GPU through the CUDA driver: every call is checked, memory is stream-ordered and all of it is freed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from l2p_runtime.errors import HostError, InternalError, UsageError

CUDA_VERSION_MIN = 13000
"""Of the driver, as cuDriverGetVersion counts: 1000 * major + 10 * minor."""

_INSTALL_DRIVER = "install NVIDIA driver 580 or later; `nvidia-smi` says which one runs"


class Memory:
    """One allocation; goes back in stream order when nothing refers to it any more, or when its device closes."""

    def __init__(self, address: int, size_bytes: int, free: Callable[[int], object]) -> None:
        self.address = address
        self.size_bytes = size_bytes
        self._finalizer = weakref.finalize(self, free, address)

    def release(self) -> None:
        """Give it back now; whoever still has a view must not use it."""
        self._finalizer()


@dataclass(slots=True)
class _Handles:
    """What has to be given back to the driver."""

    device: Any
    context: Any
    stream: int
    modules: list[Any]


class CudaContext:
    """The primary context of one GPU, with one stream. Closed by `close`, or when nothing refers to it any more.

    Attributes:
        driver: the module `cuda.bindings.driver`, or what stands in for it.
        index: of the GPU among those that CUDA shows.
        gpu_name: as NVIDIA names it.
        capability: compute capability, (8, 9).
        stream: handle of the one stream.
        max_pitch: the longest distance of runs in a two-dimensional copy, bytes.
    """

    def __init__(self, driver: Any, index: int) -> None:
        """Find the GPU, retain its primary context and make a stream.

        Raises:
            UsageError: there is no GPU of that index.
            HostError: there is no driver, no GPU at all, the driver is too old, or the GPU has no memory pools.
        """
        self.driver = driver
        self.index = index
        _initialise(driver)
        count = checked(driver, "cuDeviceGetCount")
        if not 0 <= index < count:
            raise UsageError(
                f"there is no CUDA device {index}, this machine shows {count} of them",
                hint=f"give a device from 0 to {count - 1}; CUDA_VISIBLE_DEVICES decides which ones are shown",
            )
        device = checked(driver, "cuDeviceGet", index)
        self.gpu_name = checked(driver, "cuDeviceGetName", 256, device).partition(b"\0")[0].decode(errors="replace")

        def attribute(name: str) -> int:
            which = getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
            return int(checked(driver, "cuDeviceGetAttribute", which, device))

        self.capability = (attribute("COMPUTE_CAPABILITY_MAJOR"), attribute("COMPUTE_CAPABILITY_MINOR"))
        self.max_pitch = attribute("MAX_PITCH")
        if not attribute("MEMORY_POOLS_SUPPORTED"):
            raise HostError(
                f"{self.gpu_name} has no CUDA memory pools here",
                hint="on a virtual GPU, have its administrator turn unified memory on",
            )
        handles = _Handles(device, checked(driver, "cuDevicePrimaryCtxRetain", device), 0, [])
        self._handles = handles
        self._memories: weakref.WeakSet[Memory] = weakref.WeakSet()
        self._finalizer = weakref.finalize(self, _tear_down, driver, handles)
        try:
            # Not ordered after the legacy stream, which other libraries of the process may use.
            flags = int(driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
            handles.stream = int(self.call("cuStreamCreate", flags))
            self._pool = self.call("cuDeviceGetDefaultMemPool", device)
        except BaseException:
            self._finalizer()
            raise
        self.stream = handles.stream

    def make_current(self) -> None:
        """Make this context current in the calling thread.

        Raises:
            HostError: the driver's status is not success.
            InternalError: the context is closed.
        """
        if not self._finalizer.alive:
            raise InternalError(f"cuda:{self.index} is used, but it is closed")
        checked(self.driver, "cuCtxSetCurrent", self._handles.context)

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function of the driver with this context current in the calling thread.

        Returns:
            The value it gives, None where it gives none.

        Raises:
            HostError: the driver's status is not success.
            InternalError: the context is closed.
        """
        # A context is current to a thread, and other libraries of the process change it.
        self.make_current()
        return checked(self.driver, name, *arguments)

    def allocate(self, size_bytes: int) -> Memory:
        """Take memory, in stream order.

        Raises:
            OutOfMemoryError: the GPU has not that much.
        """
        # The driver refuses to allocate nothing.
        arguments = max(size_bytes, 1), self.stream
        try:
            address = self.call("cuMemAllocAsync", *arguments)
        except OutOfMemoryError:
            # What was freed in stream order comes back for another use once the stream is done.
            self.trim()
            try:
                address = self.call("cuMemAllocAsync", *arguments)
            except OutOfMemoryError as error:
                raise OutOfMemoryError(
                    f"cuda:{self.index} ({self.gpu_name}) has no memory for {size_bytes:,} bytes, "
                    f"{self.free_bytes():,} bytes are free",
                    hint="set a memory budget below that, draw a smaller image, or end what else uses the GPU",
                ) from error
        memory = Memory(int(address), size_bytes, self._free)
        self._memories.add(memory)
        return memory

    def synchronize(self) -> None:
        """Wait for the stream.

        Raises:
            HostError: something that ran on it failed.
        """
        self.call("cuStreamSynchronize", self.stream)

    def trim(self) -> None:
        """Wait for the stream, and have the pool give unused memory back to the GPU."""
        self.synchronize()
        self.call("cuMemPoolTrimTo", self._pool, 0)

    def free_bytes(self) -> int:
        """Memory of the GPU that no process holds, nor this one's pool."""
        free, _ = self.call("cuMemGetInfo")
        return int(free)

    def load_module(self, image: bytes) -> Any:
        """Load compiled kernels; they stay until the context closes."""
        module = self.call("cuModuleLoadData", image)
        self._handles.modules.append(module)
        return module

    def close(self) -> None:
        """Give everything back, memory that arrays still refer to as well.

        Raises:
            HostError: something that ran on the stream failed; everything is given back all the same.
        """
        if not self._finalizer.alive:
            return
        try:
            self.synchronize()
        finally:
            for memory in list(self._memories):
                memory.release()
            self._finalizer()

    def _free(self, address: int) -> None:
        """Free in stream order, from whichever thread drops the last view.

        The status has nobody to go to: only a context that is broken refuses, and its next call says so.
        """
        if self._finalizer.alive:
            self.driver.cuMemFreeAsync(address, self.stream)


class OutOfMemoryError(HostError):
    """The driver has no memory for what a call needs."""


def checked(driver: Any, name: str, *arguments: Any) -> Any:
    """Call a function of the driver.

    Returns:
        The value it gives, None where it gives none, a tuple where it gives several.

    Raises:
        OutOfMemoryError: its status is CUDA_ERROR_OUT_OF_MEMORY.
        HostError: any other status but success.
    """
    status, *values = getattr(driver, name)(*arguments)
    if status == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
        raise OutOfMemoryError(f"out of GPU memory in {name}", hint="set a memory budget, or draw a smaller image")
    if status != driver.CUresult.CUDA_SUCCESS:
        raise HostError(
            f"the CUDA driver says {status.name} in {name}",
            hint="start again in a new process: after most errors of a GPU, a process cannot use it any more",
        )
    return tuple(values) if len(values) > 1 else values[0] if values else None


def _initialise(driver: Any) -> None:
    """Load the driver and see that it is new enough and has a GPU."""
    try:
        version = checked(driver, "cuDriverGetVersion")
    # The bindings load the driver's library with the first call.
    except (RuntimeError, OSError) as error:
        raise HostError(f"the NVIDIA driver cannot be loaded: {error}", hint=_INSTALL_DRIVER) from error
    if version < CUDA_VERSION_MIN:
        found, wanted = (f"{number // 1000}.{number % 1000 // 10}" for number in (version, CUDA_VERSION_MIN))
        raise HostError(f"the NVIDIA driver is made for CUDA {found}, wanted {wanted} or later", hint=_INSTALL_DRIVER)
    (status,) = driver.cuInit(0)
    if status == driver.CUresult.CUDA_ERROR_NO_DEVICE:
        raise HostError(
            "this machine shows no CUDA device", hint="see `nvidia-smi`, and whether CUDA_VISIBLE_DEVICES hides it"
        )
    if status != driver.CUresult.CUDA_SUCCESS:
        raise HostError(f"the CUDA driver cannot start: {status.name} in cuInit", hint=_INSTALL_DRIVER)


def _tear_down(driver: Any, handles: _Handles) -> None:
    """Give modules, stream and context back.

    It may run in any thread, whose own context is put back; only ours would be left behind dead. Statuses have nobody
    to go to.
    """
    driver.cuCtxPushCurrent(handles.context)
    for module in handles.modules:
        driver.cuModuleUnload(module)
    if handles.stream:
        driver.cuStreamDestroy(handles.stream)
    driver.cuCtxPopCurrent()
    status, current = driver.cuCtxGetCurrent()
    if status == driver.CUresult.CUDA_SUCCESS and int(current) == int(handles.context):
        driver.cuCtxSetCurrent(None)
    driver.cuDevicePrimaryCtxRelease(handles.device)
