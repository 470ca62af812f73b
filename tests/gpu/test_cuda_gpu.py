"""The device on a real GPU: the same bits as NumPy, and memory that comes back. `make test-gpu`."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from fakes.cuda_checks import (
    Layout,
    awkward_values,
    check_copies,
    check_euler,
    check_noise,
    check_pixels,
    pixel_values,
    same_bits,
)
from l2p_runtime.backends.cuda import CudaDevice, open_cuda
from l2p_runtime.errors import HostError

pytestmark = pytest.mark.gpu

MIB = 1 << 20


@pytest.fixture(scope="module")
def device() -> Iterator[CudaDevice]:
    try:
        device = open_cuda(0, "pip install 'l2p-export[gpu]'")
    except HostError as error:
        pytest.skip(f"no GPU: {error}")
    yield device
    device.close()


def test_the_device_describes_itself(device: CudaDevice) -> None:
    assert device.name == "cuda:0"
    assert device.capability.startswith("sm")
    assert device.gpu_name
    assert device.stream
    assert device.available_bytes() > 0


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8", "uint16", "int64", "bool"])
def test_upload_and_download_return_the_values(device: CudaDevice, dtype: str) -> None:
    for shape in ((), (0, 3), (1,), (7, 5), (3, 1000, 1001)):
        values = np.random.default_rng(7).integers(0, 2, shape).astype(dtype)
        same_bits(device.download(device.upload(values)), values)


@pytest.mark.parametrize("seed", range(8))
def test_copies_between_strided_views(device: CudaDevice, seed: int) -> None:
    check_copies(device, seed, 40)


def test_a_stripe_is_kept(device: CudaDevice) -> None:
    host = np.random.default_rng(7).standard_normal((2, 3, 1024, 512), np.float32)
    whole, stripe = device.upload(np.zeros_like(host)), device.upload(host)[:, :, 128:384]
    device.copy(whole[:, :, 512:768], stripe)
    wanted = np.zeros_like(host)
    wanted[:, :, 512:768] = host[:, :, 128:384]
    same_bits(device.download(whole), wanted)


@pytest.mark.parametrize("layout", ["whole", "rows"])
@pytest.mark.parametrize("shape", [(3, 1, 1), (3, 33, 1030), (3, 1024, 1023), (1, 2, 300_001), (3, 70_001, 2)])
def test_noise(device: CudaDevice, shape: tuple[int, ...], layout: Layout) -> None:
    for seed, index in ((0, 0), (7, 1), (2**32, 0), (2**64 - 1, 2**32 - 1)):
        check_noise(device, shape, seed, index, layout)


@pytest.mark.parametrize("guidance", [None, 1.0, 4.5])
@pytest.mark.parametrize("layout", ["whole", "rows"])
@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 3, 65, 127), (1, 3, 1024, 1024), (1, 3, 30_000, 2)])
def test_euler(device: CudaDevice, shape: tuple[int, ...], layout: Layout, guidance: float | None) -> None:
    check_euler(device, shape, 7, (layout, "whole", layout), guidance, -0.0613)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float16"])
@pytest.mark.parametrize("layout", ["whole", "rows"])
@pytest.mark.parametrize("shape", [(3, 1, 1), (3, 65, 127), (3, 1024, 1023)])
def test_pixels(device: CudaDevice, dtype: str, shape: tuple[int, ...], layout: Layout) -> None:
    check_pixels(device, pixel_values(np.random.default_rng(7), shape), dtype, layout)


def test_nan_becomes_zero_or_stays(device: CudaDevice) -> None:
    image = device.upload(np.full((3, 2, 5), np.nan, np.float32))
    for dtype in ("uint8", "uint16", "float16"):
        out = device.alloc((2, 5, 3), dtype)
        device.launch("pixels", out, image)
        values = device.download(out)
        assert np.isnan(values).all() if dtype == "float16" else not values.any()


def test_the_largest_image_from_noise_to_pixels(device: CudaDevice) -> None:
    # More than 2^28 values: rows near the end are compared, the noise of which NumPy can make alone.
    from l2p_runtime.noise import normal_noise

    size = 10_240
    if device.available_bytes() < 4 * 3 * size * size * 4:
        pytest.skip("the GPU has not 5 GB free")
    image = device.alloc((1, 3, size, size), "float32")
    device.launch("noise", image[0], 7, 0)
    device.launch("euler", image, image, image, 4.0, 0.75)
    out = device.alloc((size, size, 3), "uint8")
    device.launch("pixels", out, image[0])
    rows = slice(size - 16, size)
    wanted = normal_noise(7, rows=(size - 16, size), cols=(0, size))
    wanted -= np.float32(0.75) * wanted
    same_bits(device.download(image[0, :, rows]), wanted)
    scaled = (np.clip(wanted, -1.0, 1.0).transpose(1, 2, 0) + np.float32(1)) * np.float32(127.5)
    same_bits(device.download(out[rows]), np.rint(scaled).astype(np.uint8))


def test_memory_comes_back(device: CudaDevice) -> None:
    free = device.available_bytes()
    array = device.alloc((256 * MIB,), "uint8")
    assert device.available_bytes() <= free - 256 * MIB
    view = array[MIB : 2 * MIB]
    del array
    assert device.available_bytes() <= free - 256 * MIB
    del view
    assert device.available_bytes() >= free - 8 * MIB
    device.scratch(256 * MIB)
    assert device.available_bytes() >= free - 8 * MIB


def test_scratch_is_one_buffer_that_grows(device: CudaDevice) -> None:
    free = device.available_bytes()
    for size in (64 * MIB, 256 * MIB, 128 * MIB):
        assert device.scratch(size).nbytes == size
    device.synchronize()
    used = free - device._context.free_bytes()
    assert 256 * MIB <= used < 256 * MIB + 64 * MIB


def test_out_of_memory_says_what_was_wanted_and_leaves_the_device_usable(device: CudaDevice) -> None:
    wanted = device.available_bytes() + (1 << 30)
    with pytest.raises(HostError, match=f"{wanted:,} bytes"):
        device.alloc((wanted,), "uint8")
    check_noise(device, (3, 8, 8), 7, 0, "whole")


def test_arrays_may_be_dropped_while_kernels_read_them(device: CudaDevice) -> None:
    rng = np.random.default_rng(7)
    image, prediction = (awkward_values(rng, (1, 3, 512, 512)) for _ in range(2))
    target, wanted = device.upload(image), image.copy()
    positive = device.upload(prediction)
    for step in range(20):
        copy = device.alloc(prediction.shape, "float32")
        device.copy(copy, positive)
        device.launch("euler", target, copy, None, 1.0, 0.01 * step)
        del copy
        wanted -= np.float32(0.01 * step) * prediction
    same_bits(device.download(target), wanted)


def test_any_thread_may_use_a_device(device: CudaDevice) -> None:
    seen: list[Any] = []
    thread = threading.Thread(target=lambda: seen.append(device.download(device.upload(np.arange(5)))))
    thread.start()
    thread.join()
    assert seen[0].tolist() == [0, 1, 2, 3, 4]


def test_a_second_device_opens_and_closes_beside_the_first(device: CudaDevice) -> None:
    other = open_cuda(0, "pip install 'l2p-export[gpu]'")
    check_noise(other, (3, 64, 64), 7, 0, "whole")
    array = other.alloc((MIB,), "uint8")
    other.close()
    del array, other
    gc.collect()
    check_noise(device, (3, 64, 64), 7, 0, "whole")
