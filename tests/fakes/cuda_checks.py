"""Comparisons of a device with NumPy, bit for bit; for the fake driver and for real GPUs alike."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from l2p_runtime.backends.cuda import CudaDevice
from l2p_runtime.backends.cuda_arrays import CudaArray
from l2p_runtime.backends.host_kernels import KERNELS
from l2p_runtime.coarse import cubic_taps

Layout = Literal["whole", "rows"]
"""`rows`: a view of some rows and columns of a larger array, as a stripe is."""


def same_bits(found: NDArray[Any], wanted: NDArray[Any]) -> None:
    """Fail unless dtype, shape and every bit are the same."""
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    unsigned = f"u{wanted.dtype.itemsize}"
    np.testing.assert_array_equal(np.ascontiguousarray(found).view(unsigned), wanted.copy("C").view(unsigned))


def check_noise(device: CudaDevice, shape: tuple[int, ...], seed: int, image_index: int, layout: Layout) -> None:
    """Compare noise [C,H,W], and see that nothing beside it is written."""
    whole, found = placed(device, np.full(shape, 0.5, np.float32), layout)
    before, wanted = device.download(whole), np.empty(shape, np.float32)
    device.launch("noise", found, seed, image_index)
    KERNELS["noise"](wanted, seed, image_index)
    same_bits(device.download(found), wanted)
    untouched(device, whole, before, layout)


def check_euler(
    device: CudaDevice,
    shape: tuple[int, ...],
    seed: int,
    layouts: tuple[Layout, Layout, Layout],
    guidance: float | None,
    step: float,
) -> None:
    """Compare one Euler step [B,3,H,W], without a negative where guidance is None."""
    rng = np.random.default_rng(seed)
    image, prediction, negative = (awkward_values(rng, shape) for _ in range(3))
    whole, target = placed(device, image, layouts[0])
    before = device.download(whole)
    _, positive = placed(device, prediction, layouts[1])
    _, base = placed(device, negative, layouts[2])
    if guidance is None:
        device.launch("euler", target, positive, None, 1.0, step)
        KERNELS["euler"](image, prediction, None, 1.0, step)
    else:
        device.launch("euler", target, positive, base, guidance, step)
        KERNELS["euler"](image, prediction, negative, guidance, step)
    same_bits(device.download(target), image)
    untouched(device, whole, before, layouts[0])


def check_mix_enlarged(
    device: CudaDevice, size: tuple[int, int], enlarged: tuple[int, int], seed: int, layout: Layout, sigma: float
) -> None:
    """Compare noise [3,H,W] mixed with an image [3,h,w] that is enlarged to it."""
    rng = np.random.default_rng(seed)
    image, coarse = (rng.standard_normal((3, *shape), np.float32) for shape in (enlarged, size))
    whole, target = placed(device, image, layout)
    before = device.download(whole)
    tables = [table for axis in range(2) for table in cubic_taps(size[axis], enlarged[axis])]
    device.launch("mix_enlarged", target, device.upload(coarse), *map(device.upload, tables), sigma)
    KERNELS["mix_enlarged"](image, coarse, *tables, sigma)
    same_bits(device.download(target), image)
    untouched(device, whole, before, layout)


def check_pixels(device: CudaDevice, image: NDArray[np.float32], dtype: str, layout: Layout) -> None:
    """Compare pixels of an image [3,H,W]."""
    _, source = placed(device, image, layout)
    shape = (*image.shape[1:], 3)
    found, wanted = device.alloc(shape, dtype), np.empty(shape, dtype)
    device.launch("pixels", found, source)
    KERNELS["pixels"](wanted, image)
    same_bits(device.download(found), wanted)


def awkward_values(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Normal values, sprinkled with zeros of both signs, subnormals and large ones."""
    values = rng.standard_normal(shape, np.float32)
    special = np.array([0.0, -0.0, 1e-45, -3e-39, 1.17549435e-38, 1e12, -7e14, 1.0, -1.0], np.float32)
    values[rng.random(shape) < 0.2] = rng.choice(special)
    return values


def pixel_values(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Values in and around -1..1: noise, ties of every dtype and their neighbours, the ends, and infinities."""
    steps = rng.choice([255, 65535, 2048, 2**24], shape)
    ties = (rng.integers(0, steps + 1) + 0.5) / steps * 2 - 1
    values = np.where(rng.random(shape) < 0.5, ties, rng.uniform(-1.1, 1.1, shape)).astype(np.float32)
    values = np.nextafter(values, np.float32(0), out=values, where=rng.random(shape) < 0.2)
    ends = np.array([-1, 1, 0, -0.0, np.inf, -np.inf, 1e-45, np.nextafter(np.float32(-1), np.float32(0))], np.float32)
    chosen = rng.random(shape) < 0.1
    values[chosen] = rng.choice(ends, shape)[chosen]
    return values


def placed(device: CudaDevice, values: NDArray[Any], layout: Layout) -> tuple[CudaArray, CudaArray]:
    """Values on the device, and the array that they are all or part of."""
    if layout == "whole":
        whole = device.upload(values)
        return whole, whole
    *leading, rows, columns = values.shape
    around = np.full((*leading, rows + 3, columns + 5), 0.25, values.dtype)
    around[..., 2 : 2 + rows, 1 : 1 + columns] = values
    whole = device.upload(around)
    return whole, whole[..., 2 : 2 + rows, 1 : 1 + columns]


def untouched(device: CudaDevice, whole: CudaArray, before: NDArray[Any], layout: Layout) -> None:
    """Fail where something around a placed view was written."""
    after = device.download(whole)
    if layout == "rows":
        for values in (before, after):
            values[..., 2:-1, 1:-4] = 0
        same_bits(after, before)


def check_copies(device: CudaDevice, seed: int, count: int) -> None:
    """Copy between views of random shapes, steps and offsets, and compare the whole target."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        shape = rng.integers(1, 6, rng.integers(0, 5))
        dtype = rng.choice(["float32", "float16", "uint8", "int64"])
        (source, read), (target, written) = (_strided(rng, shape, dtype) for _ in range(2))
        on_source, on_target = device.upload(source), device.upload(target)
        device.copy(on_target[written], on_source[read])
        target[written] = source[read]
        same_bits(device.download(on_target), target)
        same_bits(device.download(on_source[read]), np.asarray(source[read]))


def _strided(rng: np.random.Generator, shape: NDArray[np.int64], dtype: str) -> tuple[NDArray[Any], tuple[slice, ...]]:
    """An array of random bytes, and slices that cut a view of a shape from it."""
    starts, steps, ends = (rng.integers(low, 3, len(shape)) * (rng.random(len(shape)) < 0.4) for low in (0, 1, 0))
    steps = np.maximum(steps, 1)
    stops = starts + (shape - 1) * steps + 1
    values = rng.integers(0, 256, (*(stops + ends), np.dtype(dtype).itemsize), np.uint8)
    return values.view(dtype)[..., 0], tuple(map(slice, starts.tolist(), stops.tolist(), steps.tolist()))
