"""Finds and loads the native kernels: one C-ABI library, called through ctypes.

The library is optional. Each kernel has a NumPy twin that gives the same bits, so a missing or foreign library costs
only time. `native_status` says which one is in use, and why; the first use without it logs one line. `L2P_NATIVE=0`
turns the library off.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

ABI_VERSION = 2
SWITCH = "L2P_NATIVE"
SLOWER = "the NumPy kernels give the same bits, slower"
_NAMES = ("libl2p_native.so", "libl2p_native.dylib")

_POINTER, _COUNT, _STRIDE = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int64
_PLANES = (_POINTER, _STRIDE, _STRIDE)
"""Address of float32 planes, and the strides of planes and rows in floats."""
_SIGNATURES: dict[str, tuple[tuple[Any, ...], Any]] = {
    # Seed; image index; first and count of channels, rows and columns; table; out with its strides; threads.
    "normal_noise": ((ctypes.c_uint64, *[ctypes.c_uint32] * 7, _POINTER, *_PLANES, ctypes.c_int), ctypes.c_int),
    # Image, prediction, negative; planes, rows and columns; guidance, step; threads.
    "euler": ((*_PLANES * 3, *[_COUNT] * 3, ctypes.c_float, ctypes.c_float, ctypes.c_int), ctypes.c_int),
    # Out, bits; image; rows, columns; threads.
    "pixels": ((_POINTER, ctypes.c_int, *_PLANES, _COUNT, _COUNT, ctypes.c_int), ctypes.c_int),
    # Image; coarse image with its rows and columns; taps and weights; planes, rows and columns; factors; threads.
    "mix_enlarged": (
        (*_PLANES * 2, _COUNT, _COUNT, *[_POINTER] * 4, *[_COUNT] * 3, *[ctypes.c_float] * 2, ctypes.c_int),
        ctypes.c_int,
    ),
    "onnx_allocator_is_registered": ((), ctypes.c_int),
    "onnx_allocator_release": ((), None),
}
"""Arguments and result of each function, without its prefix."""


@dataclass(frozen=True)
class NativeLibrary:
    """The loaded library. Its functions release the GIL; kernels return 0 or an error code.

    Attributes:
        path: the file that was loaded.
        normal_noise: `l2p_normal_noise` of `csrc/noise.cpp`.
        euler: `l2p_euler` of `csrc/pixels.cpp`.
        pixels: `l2p_pixels` of `csrc/pixels.cpp`.
        mix_enlarged: `l2p_mix_enlarged` of `csrc/pixels.cpp`.
        onnx_allocator_is_registered: whether ONNX Runtime's environment has the allocator of `csrc/onnx_allocator.cpp`.
        onnx_allocator_release: unmaps what that allocator keeps.
    """

    path: str
    normal_noise: Callable[..., int]
    euler: Callable[..., int]
    pixels: Callable[..., int]
    mix_enlarged: Callable[..., int]
    onnx_allocator_is_registered: Callable[[], int]
    onnx_allocator_release: Callable[[], None]


@dataclass(frozen=True)
class NativeStatus:
    """Whether the native kernels are in use.

    Attributes:
        available: true when calls go to the library.
        path: the library's file, empty when there is none.
        reason: why it is not in use, empty when it is.
    """

    available: bool
    path: str
    reason: str


def load_native() -> NativeLibrary | None:
    """Return the library, loaded on the first call, or None where NumPy has to do its work.

    The first call that finds none logs a warning to `l2p_runtime.native`, unless it was turned off.
    """
    if _is_disabled():
        return None
    library, status = _probe()
    if library is None:
        _warn(status.reason)
    return library


@functools.cache
def _warn(reason: str) -> None:
    # Without a handler, logging writes the line to stderr as it is.
    logging.getLogger(__name__).warning("l2p_runtime: no native kernels (%s); %s", reason, SLOWER)


def native_status() -> NativeStatus:
    """Say whether the library is in use, from where, and if not why."""
    return NativeStatus(False, "", f"{SWITCH}=0 is set") if _is_disabled() else _probe()[1]


def _is_disabled() -> bool:
    return os.environ.get(SWITCH) == "0"


@functools.cache
def _probe() -> tuple[NativeLibrary | None, NativeStatus]:
    """Load the first library that opens and has our ABI; a file passed over keeps its reason."""
    reasons: list[str] = []
    found = ""
    folders = _folders()
    for path in (folder / name for folder in folders for name in _NAMES):
        if not path.is_file():
            continue
        found = found or str(path)
        try:
            library = _load(path)
        except (OSError, AttributeError) as error:
            reasons.append(f"{path}: {error}")
            continue
        if isinstance(library, str):
            reasons.append(f"{path}: {library}")
            continue
        return library, NativeStatus(True, library.path, "")
    if not reasons:
        reasons.append(f"no {_NAMES[0]} in {' or '.join(map(str, folders))}")
    return None, NativeStatus(False, found, "; ".join(reasons))


def _folders() -> tuple[Path, ...]:
    # An editable install leaves the sources where they are and puts what CMake built into site-packages.
    own = Path(__file__).resolve().parent / "lib"
    installed = Path(sysconfig.get_path("platlib")) / "l2p_runtime" / "lib"
    return tuple(dict.fromkeys((own, installed)))


def _load(path: Path) -> NativeLibrary | str:
    """Load one file.

    Returns:
        The library, or what is wrong with it.

    Raises:
        OSError: the file is not a library of this machine.
        AttributeError: a function is missing.
    """
    # CDLL, not PyDLL: it releases the GIL while a kernel runs.
    library = ctypes.CDLL(str(path))
    library.l2p_abi_version.argtypes = []
    library.l2p_abi_version.restype = ctypes.c_int
    version = library.l2p_abi_version()
    if version != ABI_VERSION:
        return f"ABI version {version}, wanted {ABI_VERSION}: reinstall l2p-export"
    functions = {}
    for name, (arguments, result) in _SIGNATURES.items():
        function = getattr(library, f"l2p_{name}")
        function.argtypes, function.restype = arguments, result
        functions[name] = function
    return NativeLibrary(str(path), **functions)
