"""Lists the GPUs of this machine. Needs only the driver: no CUDA library and no Python package."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

_DRIVER = "libcuda.so.1"
_MAJOR, _MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU; `capability` is its compute capability as `sm89`."""

    name: str
    capability: str


def gpus() -> tuple[Gpu, ...]:
    """Every GPU that the driver shows, in its order; none when there is no driver or it does not start."""
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError:
        return ()
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return ()
    found = (_gpu(driver, ordinal) for ordinal in range(count.value))
    return tuple(gpu for gpu in found if gpu is not None)


def _gpu(driver: ctypes.CDLL, ordinal: int) -> Gpu | None:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    failed = (
        driver.cuDeviceGet(ctypes.byref(device), ordinal)
        or driver.cuDeviceGetName(name, len(name), device)
        or driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
        or driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    )
    return None if failed else Gpu(name.value.decode(errors="replace"), f"sm{major.value}{minor.value}")
