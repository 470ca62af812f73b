"""The kernels between networks on a GPU: `data/kernels.cu`, compiled for the GPU at hand when one is first launched."""

from __future__ import annotations

import importlib
import importlib.resources
import math
from collections.abc import Callable
from ctypes import c_float, c_longlong, c_uint32, c_uint64, c_void_p
from typing import TYPE_CHECKING, Any

import numpy as np

from l2p_runtime.backends.cuda_arrays import CudaArray, merged_axes
from l2p_runtime.errors import HostError, InternalError, UsageError
from l2p_runtime.noise import TABLE_COEFFICIENTS, TABLE_ROWS, checked_seed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from l2p_runtime.backends.cuda_context import CudaContext

_BLOCK = 256
_GRID_Y_MAX = 65535
_INSTALL_NVRTC = "pip install 'nvidia-cuda-nvrtc>=13,<14'"

# A kernel's argument: its value and its C type.
_Argument = tuple[Any, type]


class CudaKernels:
    """The kernels on one GPU; called as `backends.host_kernels.KERNELS` are, and giving the same bits, NaN aside."""

    def __init__(self, context: CudaContext, image: bytes, upload: Callable[[NDArray[Any]], CudaArray]) -> None:
        """Load compiled kernels and the table that noise reads.

        Args:
            context: the GPU; kernels run on its stream.
            image: what `compile_kernels` made for that GPU.
            upload: puts a host array there.

        Raises:
            HostError: the driver refuses the image, or has no memory for it.
        """
        self._context = context
        self._module = context.load_module(image)
        self._functions: dict[str, Any] = {}
        self._table = upload(_noise_table())

    def noise(self, out: CudaArray, seed: int, image_index: int) -> None:
        """Fill out [3,H,W] float32 with the standard normal noise of a seed (docs/design.md, "Seed contract").

        Raises:
            UsageError: the seed or the index is out of range.
            InternalError: out is not float32, or its lines are not contiguous.
        """
        if not 0 <= image_index < 1 << 32:
            raise UsageError(f"image_index is {image_index}, wanted 0 to 2^32 - 1", hint="count the images from 0")
        key = [(checked_seed(seed), c_uint64), (image_index, c_uint32), (self._table.address, c_void_p)]
        planes, rows, columns = _sizes(out)
        # One thread makes four values.
        grid = planes * rows, -(-columns // 4)
        self._launch("l2p_noise", grid, [*_plane(out), *_integers(planes, rows, columns), *key])

    def euler(
        self, image: CudaArray, prediction: CudaArray, negative: CudaArray | None, guidance: float, step: float
    ) -> None:
        """One Euler step in place: image += velocity * step, all [B,3,H,W] float32.

        The velocity is minus the prediction; with guidance, negative + guidance * (positive - negative).

        Raises:
            InternalError: shapes differ, an array is not float32, or its lines are not contiguous.
        """
        for other in (prediction, negative):
            if other is not None and other.shape != image.shape:
                raise InternalError(f"an Euler step of {list(image.shape)} with {list(other.shape)}")
        base: list[_Argument] = [(0, c_void_p), *_integers(0, 0)] if negative is None else _plane(negative)
        # NumPy too makes these float32 before they meet an array.
        factors = [(float(np.float32(factor)), c_float) for factor in (guidance, step)]
        planes, rows, columns = _sizes(image)
        arguments = [*_plane(image), *_plane(prediction), *base, *_integers(planes, rows, columns), *factors]
        self._launch("l2p_euler", (planes * rows, columns), arguments)

    def pixels(self, out: CudaArray, image: CudaArray) -> None:
        """Turn image [3,H,W] in [-1,1] into out [H,W,3]: full-range uint8 or uint16, rounded; or float16 in [0,1].

        NaN stays NaN in float16 and becomes 0 in the integers.

        Raises:
            InternalError: out has another dtype or shape or is not contiguous, or image is not float32 with
                contiguous lines.
        """
        dtype, (planes, rows, columns) = str(out.dtype), _sizes(image)
        fits = planes == 3 and out.shape == (rows, columns, 3) and out.is_contiguous
        if not fits or dtype not in {"uint8", "uint16", "float16"}:
            raise InternalError(f"pixels of an image {list(image.shape)} cannot go into {dtype} {list(out.shape)}")
        arguments = [(out.address, c_void_p), *_plane(image), *_integers(rows, columns)]
        self._launch(f"l2p_pixels_{dtype}", (rows, columns), arguments)

    def mix_enlarged(
        self,
        image: CudaArray,
        coarse: CudaArray,
        row_taps: CudaArray,
        row_weights: CudaArray,
        column_taps: CudaArray,
        column_weights: CudaArray,
        sigma: float,
    ) -> None:
        """Turn noise [3,H,W] into sigma * noise + (1 - sigma) * coarse [3,h,w] enlarged, in place.

        Raises:
            InternalError: images are not float32 with contiguous lines, or taps and weights are not [H,4] and [W,4].
        """
        planes, rows, columns = _sizes(image)
        wanted = [("int32", (rows, 4)), ("float32", (rows, 4)), ("int32", (columns, 4)), ("float32", (columns, 4))]
        tables = (row_taps, row_weights, column_taps, column_weights)
        found = [(str(table.dtype), table.shape) for table in tables]
        if found != wanted or not all(table.is_contiguous for table in tables) or _sizes(coarse)[0] != planes:
            raise InternalError(f"an image {list(image.shape)} cannot be mixed with one enlarged by {found}")
        addresses: list[_Argument] = [(table.address, c_void_p) for table in tables]
        factors = [(float(np.float32(factor)), c_float) for factor in (sigma, 1.0 - sigma)]
        arguments = [*_plane(image), *_plane(coarse), *addresses, *_integers(planes, rows, columns), *factors]
        self._launch("l2p_mix_enlarged", (planes * rows, columns), arguments)

    def _launch(self, name: str, grid: tuple[int, int], arguments: list[_Argument]) -> None:
        """Queue a kernel for so many lines of so many threads; none at all for an empty array."""
        lines, threads = grid
        if lines * threads == 0:
            return
        if name not in self._functions:
            self._functions[name] = self._context.call("cuModuleGetFunction", self._module, name.encode())
        values, types = zip(*arguments, strict=True)
        grid_x, grid_y = -(-threads // _BLOCK), min(lines, _GRID_Y_MAX)
        shape = (grid_x, grid_y, 1, _BLOCK, 1, 1)
        self._context.call("cuLaunchKernel", self._functions[name], *shape, 0, self._context.stream, (values, types), 0)


def compile_kernels(capability: tuple[int, int]) -> bytes:
    """Compile `data/kernels.cu` with NVRTC: machine code for the GPU, or PTX where NVRTC is older than the GPU.

    Args:
        capability: compute capability of the GPU, (8, 9).

    Returns:
        What the driver loads as a module.

    Raises:
        HostError: NVRTC is missing or fails; with its log.
    """
    try:
        nvrtc = importlib.import_module("cuda.bindings.nvrtc")
        checked_nvrtc(nvrtc, "nvrtcVersion")
    # The bindings load the library with the first call, and say RuntimeError when there is none.
    except (ImportError, RuntimeError, OSError) as error:
        raise HostError(f"NVRTC, which compiles kernels, cannot be loaded: {error}", hint=_INSTALL_NVRTC) from error
    return compile_source(nvrtc, kernel_source(), capability)


def kernel_source() -> bytes:
    """The text of `data/kernels.cu`."""
    return importlib.resources.files("l2p_runtime").joinpath("data", "kernels.cu").read_bytes()


def compile_source(nvrtc: Any, source: bytes, capability: tuple[int, int]) -> bytes:
    """Compile CUDA C; as `compile_kernels`, with the module `cuda.bindings.nvrtc` given."""
    wanted = 10 * capability[0] + capability[1]
    known = [arch for arch in checked_nvrtc(nvrtc, "nvrtcGetSupportedArchs") if arch <= wanted]
    if not known:
        raise HostError(f"NVRTC cannot compile for compute capability {wanted / 10}", hint=_INSTALL_NVRTC)
    # Machine code of this very architecture loads in every driver; PTX wants one as new as NVRTC.
    arch, kind = max(known), "CUBIN" if wanted in known else "PTX"
    options = [f"--gpu-architecture={'sm' if kind == 'CUBIN' else 'compute'}_{arch}".encode(), b"--fmad=false"]
    program = checked_nvrtc(nvrtc, "nvrtcCreateProgram", source, b"kernels.cu", 0, [], [])
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = bytes(checked_nvrtc(nvrtc, "nvrtcGetProgramLogSize", program))
            checked_nvrtc(nvrtc, "nvrtcGetProgramLog", program, log)
            text = log.rstrip(b"\0\n").decode(errors="replace")
            raise HostError(f"NVRTC says {status.name} for sm_{wanted}:\n{text}", hint=_INSTALL_NVRTC)
        image = bytes(checked_nvrtc(nvrtc, f"nvrtcGet{kind}Size", program))
        checked_nvrtc(nvrtc, f"nvrtcGet{kind}", program, image)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return image


def checked_nvrtc(nvrtc: Any, name: str, *arguments: Any) -> Any:
    """Call a function of NVRTC.

    Returns:
        The value it gives, None where it gives none, a tuple where it gives several.

    Raises:
        HostError: its status is not success.
    """
    status, *values = getattr(nvrtc, name)(*arguments)
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise HostError(f"NVRTC says {status.name} in {name}", hint=_INSTALL_NVRTC)
    return tuple(values) if len(values) > 1 else values[0] if values else None


def _noise_table() -> NDArray[np.float64]:
    """The polynomials of `noise.py`, [256, 7], constant terms first."""
    data = importlib.resources.files("l2p_runtime").joinpath("data", "normal_table.f64").read_bytes()
    wanted = TABLE_ROWS * TABLE_COEFFICIENTS * 8
    if len(data) != wanted:
        raise InternalError(f"normal_table.f64 has {len(data)} bytes, wanted {wanted}", hint="reinstall l2p-export")
    return np.frombuffer(data, "<f8").astype(np.float64).reshape(TABLE_ROWS, TABLE_COEFFICIENTS)


def _sizes(array: CudaArray) -> tuple[int, int, int]:
    """Planes, rows and columns of [...,H,W].

    Raises:
        InternalError: fewer than two axes.
    """
    if len(array.shape) < 2:
        raise InternalError(f"a kernel works on [...,H,W], not on {list(array.shape)}")
    *leading, rows, columns = array.shape
    return math.prod(leading), rows, columns


def _plane(array: CudaArray) -> list[_Argument]:
    """Address of [...,H,W] and the strides of planes and rows, in values.

    Raises:
        InternalError: not float32, a line is not contiguous, or planes are not at equal distances.
    """
    *strides, row, value = array.strides
    size = array.dtype.itemsize
    planes = [] if 0 in array.shape else merged_axes(array.shape[:-2], (tuple(strides),))
    if str(array.dtype) != "float32" or len(planes) > 1 or (value != size and array.shape[-1] > 1):
        raise InternalError(
            f"a kernel cannot read {array.dtype} {list(array.shape)} with strides {list(array.strides)}",
            hint="make the view contiguous first",
        )
    return [(array.address, c_void_p), *_integers(planes[0][1][0] // size if planes else 0, row // size)]


def _integers(*values: int) -> list[_Argument]:
    return [(value, c_longlong) for value in values]
