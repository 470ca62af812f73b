"""An NVIDIA GPU as a device: memory, copies and kernels on one stream. Needs only the CUDA driver.

It is a device, not a backend. Backends that run networks on a GPU open it first, and pass its stream and the addresses
of its arrays to their engine library.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from l2p_runtime.backends.cuda_arrays import CudaArray, block_copies, contiguous_array
from l2p_runtime.backends.cuda_context import CudaContext, OutOfMemoryError
from l2p_runtime.backends.cuda_kernels import CudaKernels, compile_kernels
from l2p_runtime.errors import HostError, InternalError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_KERNELS = ("noise", "euler", "pixels", "mix_enlarged")


def open_cuda(index: int, install: str) -> CudaDevice:
    """Open a GPU.

    Args:
        index: of the GPU among those that CUDA shows, from 0.
        install: what to run when cuda-bindings is missing: the extra of the backend that asks.

    Raises:
        UsageError: there is no GPU of that index.
        HostError: cuda-bindings is not installed, there is no NVIDIA driver or GPU, or the driver is older than
            CUDA 13.
    """
    try:
        driver = importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise HostError(f"cuda-bindings cannot be imported: {error}", hint=install) from error
    return CudaDevice(driver, index)


class CudaDevice:
    """One GPU; implements `Device`. Closed by `close`, or when neither it nor one of its arrays is referred to.

    Everything runs in the order of one stream, frees too: an array may be dropped while a kernel still reads it, as
    long as that kernel was put on `stream`. One thread at a time may use a device; which one does not matter.

    Attributes:
        name: `cuda:0`.
        index: of the GPU among those that CUDA shows.
        gpu_name: as NVIDIA names it.
        capability: `sm89`.
        stream: handle of the one stream, for engine libraries.
    """

    def __init__(self, driver: Any, index: int, compiler: Callable[[tuple[int, int]], bytes] = compile_kernels) -> None:
        """Open a GPU through a driver.

        Args:
            driver: the module `cuda.bindings.driver`, or what stands in for it.
            index: of the GPU among those that CUDA shows, from 0.
            compiler: makes the kernels for a compute capability, at the first launch.

        Raises:
            UsageError: there is no GPU of that index.
            HostError: there is no driver or GPU, or the driver is older than CUDA 13.
        """
        self._context = CudaContext(driver, index)
        self._compiler = compiler
        self._kernels: CudaKernels | None = None
        self._scratch: CudaArray | None = None
        self.name = f"cuda:{index}"
        self.index = index
        self.gpu_name = self._context.gpu_name
        self.capability = "sm{}{}".format(*self._context.capability)
        self.stream = self._context.stream

    def alloc(self, shape: tuple[int, ...], dtype: str) -> CudaArray:
        """Uninitialised memory. Where it does not fit, the scratch buffer makes room.

        Raises:
            HostError: the GPU has not that much.
        """
        kind = np.dtype(dtype)
        size_bytes = math.prod(map(int, shape)) * kind.itemsize
        try:
            memory = self._context.allocate(size_bytes)
        except OutOfMemoryError:
            if self._scratch is None:
                raise
            self._scratch = None
            memory = self._context.allocate(size_bytes)
        return contiguous_array(shape, kind, memory.address, memory)

    def upload(self, values: NDArray[Any]) -> CudaArray:
        """A contiguous copy of host values on the GPU; complete on return, so the host array may go.

        Raises:
            HostError: the GPU has not that much memory.
        """
        # Not ascontiguousarray, which gives a number an axis.
        host = np.asarray(values, order="C")
        array = self.alloc(host.shape, host.dtype.str)
        if host.nbytes:
            self._context.call("cuMemcpyHtoDAsync", array.address, host.ctypes.data, host.nbytes, self.stream)
            self.synchronize()
        return array

    def download(self, array: CudaArray) -> NDArray[Any]:
        """A copy of the values on the host, once everything before it on the stream is done.

        Raises:
            HostError: something that ran on the stream failed, or there is no memory to make a view contiguous.
        """
        source = self.contiguous(array)
        host = np.empty(source.shape, source.dtype)
        if host.nbytes:
            self._context.call("cuMemcpyDtoHAsync", host.ctypes.data, source.address, host.nbytes, self.stream)
            self.synchronize()
        return host

    def contiguous(self, view: CudaArray) -> CudaArray:
        """The view itself when its values lie one behind the other, else a copy.

        Raises:
            HostError: the GPU has no memory for the copy.
        """
        if view.is_contiguous:
            return view
        target = self.alloc(view.shape, view.dtype.str)
        self.copy(target, view)
        return target

    def copy(self, target: CudaArray, source: CudaArray) -> None:
        """Copy values between equally shaped views, which must not overlap.

        Raises:
            InternalError: shapes or dtypes differ.
        """
        if target.shape != source.shape or target.dtype != source.dtype:
            raise InternalError(f"copy from {source.dtype} {list(source.shape)} to {target.dtype} {list(target.shape)}")
        call, driver = self._context.call, self._context.driver
        for block in block_copies(target, source, self._context.max_pitch):
            if block.height == 1:
                call("cuMemcpyDtoDAsync", block.target, block.source, block.width_bytes, self.stream)
                continue
            plan = driver.CUDA_MEMCPY2D()
            plan.srcMemoryType = plan.dstMemoryType = driver.CUmemorytype.CU_MEMORYTYPE_DEVICE
            plan.srcDevice, plan.srcPitch = block.source, block.source_pitch
            plan.dstDevice, plan.dstPitch = block.target, block.target_pitch
            plan.WidthInBytes, plan.Height = block.width_bytes, block.height
            call("cuMemcpy2DAsync", plan, self.stream)

    def launch(self, kernel: str, *arguments: Any) -> None:
        """Run a kernel with the arguments and the bits of `backends.host_kernels.KERNELS`.

        The first launch compiles all of them, which takes a fraction of a second.

        Raises:
            HostError: NVRTC is missing or fails, or the driver refuses the kernel.
            InternalError: there is no such kernel, or it cannot read these arrays.
        """
        if kernel not in _KERNELS:
            raise InternalError(f"there is no kernel `{kernel}`, only {', '.join(_KERNELS)}")
        if self._kernels is None:
            image = self._compiler(self._context.capability)
            self._kernels = CudaKernels(self._context, image, self.upload)
        getattr(self._kernels, kernel)(*arguments)

    def make_current(self) -> None:
        """Make the GPU's context current in the calling thread, for libraries that use whichever one is.

        Every other method that calls the driver does so too.
        """
        self._context.make_current()

    def synchronize(self) -> None:
        """Wait for the stream.

        Raises:
            HostError: something that ran on it failed.
        """
        self._context.synchronize()

    def available_bytes(self) -> int:
        """Memory that could be allocated now. Gives the scratch buffer back first: the next network asks for it."""
        self._scratch = None
        self._context.trim()
        return self._context.free_bytes()

    def scratch(self, size_bytes: int) -> CudaArray:
        """The one buffer that all networks put their activations in, uint8 [size_bytes].

        It grows when more is asked for, so it takes the maximum of all networks and not their sum. Ask for it before
        each run, drop it afterwards, and use it only on `stream`: the next network writes to the same memory.

        Args:
            size_bytes: how much the network needs.

        Raises:
            HostError: the GPU has not that much.
        """
        if self._scratch is None or self._scratch.nbytes < size_bytes:
            if self._scratch is not None:
                # The old one has to be gone before the new one comes, or both are there at once.
                self._scratch = None
                self._context.trim()
            self._scratch = self.alloc((size_bytes,), "uint8")
        return self._scratch[:size_bytes]

    def close(self) -> None:
        """Give everything back; the device's arrays must not be used any more.

        Raises:
            HostError: something that ran on the stream failed; everything is given back all the same.
        """
        self._scratch = self._kernels = None
        self._context.close()
