from __future__ import annotations

import gc
import importlib
import sys
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from fakes.cuda import GIB, CUresult, FakeDriver, FakeNvrtc, fake_device, fake_driver, host_kernels
from fakes.cuda_checks import (
    Layout,
    awkward_values,
    check_copies,
    check_euler,
    check_mix_enlarged,
    check_noise,
    check_pixels,
    pixel_values,
    same_bits,
)
from l2p_runtime.backends import cuda_kernels, open_backend
from l2p_runtime.backends.cuda import CudaDevice, open_cuda
from l2p_runtime.backends.cuda_arrays import CudaArray, block_copies
from l2p_runtime.backends.cuda_kernels import compile_kernels, compile_source
from l2p_runtime.errors import HostError, InternalError, UsageError

DTYPES = st.sampled_from(["float32", "float16", "uint8", "uint16", "int64", "bool"])
SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)
LAYOUTS = st.sampled_from(["whole", "rows"])
SEEDS = st.one_of(st.sampled_from([0, 1, 7, 2**32 - 1, 2**32, 2**63 + 7, 2**64 - 1]), st.integers(0, 2**64 - 1))
KERNELS = ("l2p_noise", "l2p_euler", "l2p_mix_enlarged", "l2p_pixels_uint8", "l2p_pixels_uint16", "l2p_pixels_float16")


INSTALL = "pip install 'l2p-export[rtx]'"


@pytest.fixture(scope="module")
def device() -> CudaDevice:
    return fake_device()


def counting(shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    return np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)


def forwards(index: Any) -> Any:
    """The index with every step turned positive."""
    if isinstance(index, tuple):
        return tuple(map(forwards, index))
    if isinstance(index, slice) and index.step is not None and index.step < 0:
        return slice(index.start, index.stop, -index.step)
    return index


@st.composite
def indexed(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Any]]:
    """A shape, and indices that are applied one after the other."""
    shape = draw(SHAPES)
    values, indices = np.empty(shape), []
    for _ in range(draw(st.integers(1, 2))):
        indices.append(forwards(draw(hnp.basic_indices(values.shape, allow_newaxis=False, allow_ellipsis=True))))
        values = np.asarray(values[indices[-1]])
    return shape, indices


# Arrays and views


@given(case=indexed(), dtype=DTYPES)
@settings(deadline=None)
def test_views_are_numpys(device: CudaDevice, case: tuple[tuple[int, ...], list[Any]], dtype: str) -> None:
    shape, indices = case
    host = counting(shape, dtype)
    view = whole = device.upload(host)
    for index in indices:
        host = np.asarray(host[index])
        view = view[index]
    assert (view.shape, view.dtype, view.nbytes, view.ndim) == (host.shape, host.dtype, host.nbytes, host.ndim)
    assert view.is_contiguous == host.flags.c_contiguous
    assert (device.contiguous(view) is view) == view.is_contiguous
    if host.size:
        assert whole.address <= view.address <= whole.address + whole.nbytes - view.nbytes
        moving = [axis for axis, size in enumerate(host.shape) if size > 1]
        assert [view.strides[axis] for axis in moving] == [host.strides[axis] for axis in moving]
    same_bits(device.download(view), host)
    same_bits(device.download(device.contiguous(view)), host)


@given(values=hnp.arrays(DTYPES, SHAPES), order=st.sampled_from("CF"))
@settings(deadline=None)
def test_upload_and_download_return_the_values(device: CudaDevice, values: NDArray[Any], order: Any) -> None:
    host = np.asarray(values, order=order)
    array = device.upload(host)
    before = host.copy("C")
    host[...] = 0
    same_bits(device.download(array), before)


@given(shape=SHAPES, wanted=hnp.array_shapes(min_dims=0, max_dims=3, max_side=30))
@settings(deadline=None)
def test_reshape_of_contiguous_arrays(device: CudaDevice, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    host = counting(shape, "float32")
    array = device.upload(host)
    same_bits(device.download(array.reshape((host.size,))), host.reshape(-1))
    same_bits(device.download(array.reshape((1, host.size, 1)).reshape(shape)), host)
    if np.prod(wanted, dtype=int) != host.size:
        with pytest.raises(InternalError, match="cannot take the shape"):
            array.reshape(wanted)


def test_reshape_refuses_views_with_gaps_and_negative_sizes(device: CudaDevice) -> None:
    array = device.alloc((4, 6), "float32")
    assert array[1:3].reshape((12,)).address == array.address + 24
    with pytest.raises(InternalError, match="not contiguous"):
        array[:, :3].reshape((12,))
    with pytest.raises(InternalError, match="cannot take"):
        array.reshape((-4, -6))


@pytest.mark.parametrize("index", [5, -6, (0, 3), (0, 0, 0), (0, ..., 0, 0)])
def test_indices_out_of_range(device: CudaDevice, index: Any) -> None:
    with pytest.raises(IndexError):
        np.empty((5, 3))[index]
    with pytest.raises(IndexError):
        device.alloc((5, 3), "float32")[index]


@pytest.mark.parametrize(
    "index", [None, True, np.bool_(1), 1.0, [0, 1], np.array([0]), np.array(0), slice(None, None, -1), (..., ...), "x"]
)
def test_indices_that_need_a_copy_are_refused(device: CudaDevice, index: Any) -> None:
    with pytest.raises(InternalError):
        device.alloc((5, 3), "float32")[index]


def test_numpy_integers_index(device: CudaDevice) -> None:
    array = device.upload(counting((5, 3), "float32"))
    assert device.download(array[np.int64(-1), np.uint8(2)]) == 14
    assert device.download(array[np.int64(1) : np.int64(2)]).tolist() == [[3, 4, 5]]


def test_arrays_iterate_and_cannot_be_changed(device: CudaDevice) -> None:
    rows = [device.download(row).tolist() for row in device.upload(counting((2, 2), "uint8"))]  # type: ignore[attr-defined]
    assert rows == [[0, 1], [2, 3]]
    with pytest.raises(AttributeError):
        device.alloc((1,), "uint8").address = 0  # type: ignore[misc]


# Copies


@given(seed=st.integers(0, 2**32))
@settings(deadline=None)
def test_copies_between_strided_views(device: CudaDevice, seed: int) -> None:
    check_copies(device, seed, 5)


@given(seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=30)
def test_copies_whose_runs_lie_too_far_apart_for_one_block(seed: int) -> None:
    check_copies(fake_device(max_pitch=20), seed, 5)


def test_a_stripe_is_one_block_copy(device: CudaDevice) -> None:
    whole, stripe = device.alloc((1, 3, 40, 32), "float32"), device.alloc((1, 3, 8, 32), "float32")
    (block,) = block_copies(whole[:, :, 8:16], stripe, 2**31)
    assert (block.width_bytes, block.height) == (8 * 32 * 4, 3)
    assert (block.target_pitch, block.source_pitch) == (40 * 32 * 4, 8 * 32 * 4)
    (block,) = block_copies(whole[:, :, :, 4:8], whole[:, :, :, :4], 2**31)
    assert (block.width_bytes, block.height) == (16, 120)
    assert [b.height for b in block_copies(whole[..., 8:16, :], stripe, 100)] == [1, 1, 1]


def test_copies_between_unequal_arrays_are_refused(device: CudaDevice) -> None:
    array = device.alloc((2, 3), "float32")
    with pytest.raises(InternalError, match=r"\[3, 2\].*\[2, 3\]"):
        device.copy(array, device.alloc((3, 2), "float32"))
    with pytest.raises(InternalError, match=r"float16.*float32"):
        device.copy(array, device.alloc((2, 3), "float16"))


# Memory


def test_memory_goes_back_with_the_last_view() -> None:
    device = fake_device()
    driver = fake_driver(device)
    array = device.alloc((1000,), "float32")
    view = array[10:20].reshape((2, 5))[1]
    assert driver.held_bytes == 4000
    del array
    assert driver.held_bytes == 4000
    del view
    assert driver.held_bytes == 0
    device.upload(np.zeros(3))
    assert driver.held_bytes == 0
    assert driver.calls["cuMemAllocAsync"] == driver.calls["cuMemFreeAsync"] == 2


def test_empty_arrays_are_arrays(device: CudaDevice) -> None:
    array = device.alloc((0, 3), "float32")
    assert device.download(array).shape == (0, 3)
    device.copy(array, device.upload(np.zeros((0, 3), np.float32)))
    device.launch("noise", device.alloc((3, 0, 4), "float32"), 7, 0)


def test_available_bytes_counts_what_was_freed_in_stream_order() -> None:
    device = fake_device(total_bytes=10_000)
    driver = fake_driver(device)
    array = device.alloc((6000,), "uint8")
    assert device.available_bytes() == 4000
    del array
    assert driver.cuMemGetInfo()[1] == 4000
    assert device.available_bytes() == 10_000


def test_available_bytes_counts_the_scratch_buffer_as_free() -> None:
    device = fake_device(total_bytes=10_000)
    device.scratch(7000)
    assert device.available_bytes() == 10_000


def test_scratch_is_one_buffer_that_grows() -> None:
    device = fake_device(total_bytes=GIB)
    driver = fake_driver(device)
    first = device.scratch(1000)
    assert (first.shape, str(first.dtype), first.is_contiguous) == ((1000,), "uint8", True)
    assert device.scratch(600).address == device.scratch(1000).address == first.address
    assert device.scratch(600).nbytes == 600
    assert driver.held_bytes == 1000
    del first
    for size in (3000, 2000, 50_000, 10):
        assert device.scratch(size).nbytes == size
    # The most that was asked for, not the sum: the smaller one was given back first.
    assert driver.held_bytes == driver.peak_bytes == 50_000
    assert device.scratch(0).shape == (0,)


def test_scratch_grows_where_old_and_new_do_not_fit_together() -> None:
    device = fake_device(total_bytes=10_000)
    device.scratch(6000)
    assert device.scratch(9000).nbytes == 9000


def test_scratch_that_is_still_referred_to_stays_valid() -> None:
    device = fake_device()
    held = device.scratch(8)
    device.copy(held, device.upload(counting((8,), "uint8")))
    device.scratch(100)
    assert device.download(held).tolist() == list(range(8))


def test_arrays_take_the_room_of_an_idle_scratch_buffer() -> None:
    device = fake_device(total_bytes=10_000)
    device.scratch(9000)
    assert device.alloc((5000,), "uint8").nbytes == 5000
    assert device.scratch(5000).nbytes == 5000


def test_freed_memory_that_the_pool_still_holds_is_used_again() -> None:
    device = fake_device(total_bytes=10_000)
    parts = [device.alloc((2000,), "uint8") for _ in range(5)]
    parts.clear()
    assert device.alloc((10_000,), "uint8").nbytes == 10_000


def test_out_of_memory_says_what_was_wanted_and_what_is_free() -> None:
    device = fake_device(total_bytes=10_000)
    kept = device.alloc((6000,), "uint8")
    with pytest.raises(HostError, match=r"cuda:0 \(Fake GPU\).*5,000 bytes.*4,000 bytes are free") as error:
        device.alloc((1250,), "float32")
    assert "memory budget" in error.value.hint
    with pytest.raises(HostError, match="5,000"):
        device.upload(np.zeros(5000, np.uint8))
    with pytest.raises(HostError, match="5,000"):
        device.scratch(5000)
    with pytest.raises(HostError, match="4,500"):
        device.contiguous(kept.reshape((2, 3000))[:, :2250])
    del kept
    assert device.available_bytes() == 10_000


def test_close_gives_everything_back() -> None:
    device = fake_device()
    driver = fake_driver(device)
    array = device.alloc((3, 8, 8), "float32")
    device.launch("noise", array, 7, 0)
    device.scratch(100)
    assert driver.held_bytes
    assert driver.modules
    device.close()
    assert (driver.held_bytes, driver.retained, driver.streams, driver.modules) == (0, 0, set(), {})
    assert driver.current is None
    device.close()
    for use in (device.make_current, device.synchronize, device.available_bytes, lambda: device.scratch(9)):
        with pytest.raises(InternalError, match="closed"):
            use()
    with pytest.raises(InternalError, match="closed"):
        device.download(array)
    del array
    assert driver.retained == 0


def test_a_device_that_is_dropped_closes_after_its_last_array() -> None:
    device = fake_device()
    driver = fake_driver(device)
    device.scratch(10)
    array = device.upload(np.zeros(5))
    del device
    gc.collect()
    assert (driver.held_bytes, driver.retained) == (40, 1)
    del array
    gc.collect()
    assert (driver.held_bytes, driver.retained, driver.streams) == (0, 0, set())


def test_close_gives_back_after_an_error_and_says_it() -> None:
    device = fake_device()
    driver = fake_driver(device)
    array = device.alloc((5,), "uint8")
    driver.fail("cuStreamSynchronize", "CUDA_ERROR_ILLEGAL_ADDRESS")
    with pytest.raises(HostError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        device.close()
    assert (driver.held_bytes, driver.retained) == (0, 0)
    device.close()
    del array


def test_any_thread_may_use_a_device_and_drop_its_arrays() -> None:
    device = fake_device()
    driver = fake_driver(device)
    arrays = [device.upload(counting((4,), "uint8"))]
    seen: list[Any] = []

    def use() -> None:
        seen.append(device.download(arrays[0]).tolist())
        seen.append(driver.current)

    def drop() -> None:
        arrays.clear()
        seen.append(driver.current)

    for work in (use, drop):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    # Dropping needs no context, and leaves that of another library alone.
    assert seen == [[0, 1, 2, 3], 100, None]
    assert driver.held_bytes == 0


def test_another_librarys_context_is_no_obstacle_and_survives() -> None:
    first = fake_device()
    driver = fake_driver(first)
    driver.cuCtxSetCurrent(555)
    array = first.alloc((2,), "uint8")
    driver.cuCtxSetCurrent(555)
    del array
    assert driver.current == 555
    first.make_current()
    assert driver.current == 100
    driver.cuCtxSetCurrent(555)
    del first
    gc.collect()
    assert (driver.current, driver.retained) == (555, 0)


# Errors


@pytest.mark.parametrize(
    ("function", "use"),
    [
        ("cuMemAllocAsync", lambda device: device.alloc((2,), "uint8")),
        ("cuMemcpyHtoDAsync", lambda device: device.upload(np.zeros(2))),
        ("cuMemcpyDtoHAsync", lambda device: device.download(device.upload(np.zeros(2)))),
        ("cuMemcpyDtoDAsync", lambda device: device.copy(*(device.alloc((2,), "uint8") for _ in range(2)))),
        ("cuMemcpy2DAsync", lambda device: device.contiguous(device.alloc((4, 4), "uint8")[:, 1:3])),
        ("cuStreamSynchronize", lambda device: device.synchronize()),
        ("cuMemGetInfo", lambda device: device.available_bytes()),
        ("cuMemPoolTrimTo", lambda device: device.available_bytes()),
        ("cuCtxSetCurrent", lambda device: device.synchronize()),
        ("cuModuleLoadData", lambda device: device.launch("noise", device.alloc((3, 8, 8), "float32"), 7, 0)),
        ("cuModuleGetFunction", lambda device: device.launch("noise", device.alloc((3, 8, 8), "float32"), 7, 0)),
        ("cuLaunchKernel", lambda device: device.launch("noise", device.alloc((3, 8, 8), "float32"), 7, 0)),
    ],
)
def test_every_status_is_checked(function: str, use: Any) -> None:
    host_kernels()
    device = fake_device()
    driver = fake_driver(device)
    for status in ("CUDA_ERROR_UNKNOWN", "CUDA_ERROR_OUT_OF_MEMORY"):
        driver.fail(function, status)
        with pytest.raises(HostError, match=f"{status} in {function}|[Mm]emory") as error:
            use(device)
        assert error.value.hint
    driver.heal(function)
    use(device)
    device.close()
    assert (driver.held_bytes, driver.retained) == (0, 0)


@pytest.mark.parametrize("function", ["cuStreamCreate", "cuDeviceGetDefaultMemPool", "cuCtxSetCurrent"])
def test_opening_that_fails_gives_the_context_back(function: str) -> None:
    driver = FakeDriver()
    driver.fail(function, CUresult.CUDA_ERROR_UNKNOWN)
    with pytest.raises(HostError, match=function):
        CudaDevice(driver, 0)
    assert (driver.retained, driver.streams, driver.current) == (0, set(), None)


def test_what_a_device_says_of_itself() -> None:
    device = fake_device(1, devices=2, capability=(12, 0))
    assert (device.name, device.index, device.gpu_name, device.capability) == ("cuda:1", 1, "Fake GPU", "sm120")
    assert device.stream in fake_driver(device).streams
    assert isinstance(device.stream, int)


@pytest.mark.parametrize(
    ("driver", "index", "error", "message"),
    [
        (FakeDriver(devices=0), 0, HostError, "shows no CUDA device"),
        (FakeDriver(version=12090), 0, HostError, "made for CUDA 12.9, wanted 13.0"),
        (FakeDriver(devices=2), 2, UsageError, "no CUDA device 2, this machine shows 2"),
        (FakeDriver(), -1, UsageError, "no CUDA device -1"),
        (FakeDriver(pools=False), 0, HostError, "no CUDA memory pools"),
    ],
)
def test_machines_that_cannot(
    monkeypatch: pytest.MonkeyPatch, driver: FakeDriver, index: int, error: type[Exception], message: str
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
    with pytest.raises(error, match=message) as raised:
        open_cuda(index, INSTALL)
    assert raised.value.hint  # type: ignore[attr-defined]
    assert driver.retained == 0


def test_a_driver_that_does_not_start_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver()
    driver.fail("cuInit", "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH")
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
    with pytest.raises(HostError, match="CUDA_ERROR_SYSTEM_DRIVER_MISMATCH in cuInit"):
        open_cuda(0, INSTALL)


@pytest.mark.parametrize(("backend", "extra"), [("rtx", "rtx"), ("tensorrt", "tensorrt"), ("onnx-cuda", "gpu")])
def test_without_cuda_bindings_the_extra_of_the_backend_is_named(
    backend: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(HostError, match="cuda-bindings") as error:
        open_backend(backend)
    assert error.value.hint.endswith(f"'l2p-export[{extra}]'")


def test_without_a_driver_its_installation_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unloadable:
        def cuDriverGetVersion(self) -> None:  # noqa: N802
            raise RuntimeError("Failed to dlopen libcuda.so.1")

    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", Unloadable())
    with pytest.raises(HostError, match=r"cannot be loaded.*libcuda") as error:
        open_cuda(0, INSTALL)
    assert "580" in error.value.hint


def test_the_real_bindings_open_or_say_why() -> None:
    pytest.importorskip("cuda.bindings.driver")
    try:
        device = open_cuda(0, INSTALL)
    except HostError as error:
        assert error.hint  # noqa: PT017  either is right, as the machine is
    else:
        device.close()


# Kernels


@pytest.mark.parametrize("layout", ["whole", "rows"])
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 70)),
    seed=SEEDS,
    index=st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=40)
def test_noise(device: CudaDevice, layout: Layout, shape: tuple[int, ...], seed: int, index: int) -> None:
    check_noise(device, shape, seed, index, layout)


@pytest.mark.parametrize("shape", [(1, 2, 70_001), (3, 30_000, 1), (5, 33, 1030)])
def test_noise_of_more_than_one_grid(device: CudaDevice, shape: tuple[int, ...]) -> None:
    check_noise(device, shape, 7, 1, "whole")


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 70), st.integers(1, 40)),
    seed=st.integers(0, 2**32),
    layouts=st.tuples(LAYOUTS, LAYOUTS, LAYOUTS),
    guidance=st.one_of(st.none(), st.floats(0, 20)),
    step=st.floats(-1, 1),
)
@settings(deadline=None, max_examples=80)
def test_euler(
    device: CudaDevice,
    shape: tuple[int, ...],
    seed: int,
    layouts: tuple[Layout, Layout, Layout],
    guidance: float | None,
    step: float,
) -> None:
    check_euler(device, shape, seed, layouts, guidance, step)


@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    enlarged=st.tuples(st.integers(1, 90), st.integers(1, 300)),
    seed=st.integers(0, 2**32),
    layout=LAYOUTS,
    sigma=st.floats(0, 1),
)
@settings(deadline=None, max_examples=40)
def test_mix_enlarged(
    device: CudaDevice, size: tuple[int, int], enlarged: tuple[int, int], seed: int, layout: Layout, sigma: float
) -> None:
    check_mix_enlarged(device, size, enlarged, seed, layout, sigma)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float16"])
@given(rows=st.integers(1, 70), columns=st.integers(1, 70), seed=st.integers(0, 2**32), layout=LAYOUTS)
@settings(deadline=None, max_examples=40)
def test_pixels(device: CudaDevice, dtype: str, rows: int, columns: int, seed: int, layout: Layout) -> None:
    check_pixels(device, pixel_values(np.random.default_rng(seed), (3, rows, columns)), dtype, layout)


def test_pixels_of_every_float16(device: CudaDevice) -> None:
    halves = np.arange(0x3C01, dtype=np.uint16).view(np.float16).astype(np.float64)
    ties = (halves[1:] + halves[:-1]) / 2
    exact = np.concatenate([halves, ties, np.nextafter(ties, 0), np.nextafter(ties, 1)]).astype(np.float32)
    units = np.concatenate([exact, np.nextafter(exact, np.float32(2)), np.nextafter(exact, np.float32(-1))])
    image = np.resize(units * np.float32(2) - np.float32(1), (3, 200, 301))
    check_pixels(device, image, "float16", "whole")


def test_nan_becomes_zero_or_stays(device: CudaDevice) -> None:
    image = device.upload(np.full((3, 2, 5), np.nan, np.float32))
    for dtype in ("uint8", "uint16", "float16"):
        out = device.alloc((2, 5, 3), dtype)
        device.launch("pixels", out, image)
        values = device.download(out)
        assert np.isnan(values).all() if dtype == "float16" else not values.any()


def test_an_empty_negative_is_no_guidance(device: CudaDevice) -> None:
    image = device.upload(awkward_values(np.random.default_rng(1), (1, 3, 0, 8)))
    device.launch("euler", image, image, None, 1.0, 0.5)


def test_kernels_refuse_what_they_cannot_read(device: CudaDevice) -> None:
    def make(*shape: int, dtype: str = "float32") -> CudaArray:
        return device.alloc(shape, dtype)

    def taps(*sizes: int) -> list[CudaArray]:
        return [make(size, 4, dtype=dtype) for size in sizes for dtype in ("int32", "float32")]

    good = make(3, 8, 8)
    for kernel, arguments in (
        ("blur", (good,)),
        ("noise", (make(3, 8, 8, dtype="float16"), 7, 0)),
        ("noise", (make(3, 8, 16)[..., ::2], 7, 0)),
        ("noise", (make(64), 7, 0)),
        ("euler", (good, make(3, 8, 7), None, 1.0, 0.5)),
        ("euler", (good, good, make(3, 7, 8), 2.0, 0.5)),
        ("euler", (make(4, 6, 8, 8)[:2, :4:2], make(2, 2, 8, 8), None, 1.0, 0.5)),
        ("mix_enlarged", (good, good, *taps(8, 7), 0.5)),
        ("mix_enlarged", (good, make(2, 8, 8), *taps(8, 8), 0.5)),
        ("mix_enlarged", (good, good, *reversed(taps(8, 8)), 0.5)),
        ("pixels", (make(8, 8, 3, dtype="float32"), good)),
        ("pixels", (make(8, 9, 3, dtype="uint8"), good)),
        ("pixels", (make(8, 8, 4, dtype="uint8")[..., :3], good)),
        ("pixels", (make(8, 8, 3, dtype="uint8"), make(4, 8, 8))),
    ):
        with pytest.raises(InternalError):
            device.launch(kernel, *arguments)
    for seed, index in ((-1, 0), (2**64, 0), (7, -1), (7, 2**32)):
        with pytest.raises(UsageError):
            device.launch("noise", good, seed, index)


def test_kernels_are_compiled_once_and_at_the_first_launch() -> None:
    asked: list[tuple[int, int]] = []
    driver = FakeDriver(capability=(7, 5))
    device = CudaDevice(driver, 0, compiler=lambda capability: asked.append(capability) or b"image")  # type: ignore[func-returns-value]
    image = device.alloc((3, 4, 4), "float32")
    assert not asked
    for _ in range(2):
        device.launch("noise", image, 7, 0)
        device.launch("euler", image, image, None, 1.0, 0.5)
    assert asked == [(7, 5)]
    assert list(driver.modules.values()) == [b"image"]
    assert driver.launches == ["l2p_noise", "l2p_euler"] * 2


# The compiler


def test_machine_code_where_the_compiler_knows_the_gpu_and_ptx_where_it_is_newer() -> None:
    nvrtc = FakeNvrtc(archs=(75, 89, 90, 120))
    assert compile_source(nvrtc, b"", (8, 9)) == b"cubin --gpu-architecture=sm_89 --fmad=false"
    assert compile_source(nvrtc, b"", (10, 3)) == b"ptx --gpu-architecture=compute_90 --fmad=false"
    assert compile_source(nvrtc, b"", (13, 0)) == b"ptx --gpu-architecture=compute_120 --fmad=false"
    with pytest.raises(HostError, match=r"compute capability 7\.0"):
        compile_source(nvrtc, b"", (7, 0))
    assert nvrtc.programs == 0


def test_a_failing_compiler_shows_its_log() -> None:
    nvrtc = FakeNvrtc(log="kernels.cu(3): error: no such thing\n")
    with pytest.raises(HostError, match=r"NVRTC_ERROR_COMPILATION for sm_89:\nkernels.cu\(3\): error: no such thing$"):
        compile_source(nvrtc, b"", (8, 9))
    assert nvrtc.programs == 0


@pytest.mark.parametrize("absent", [None, RuntimeError("Failed to dlopen libnvrtc.so.13")])
def test_without_the_compiler_its_package_is_named(monkeypatch: pytest.MonkeyPatch, absent: Exception | None) -> None:
    class Unloadable:
        def nvrtcVersion(self) -> None:  # noqa: N802
            assert absent is not None
            raise absent

    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None if absent is None else Unloadable())
    with pytest.raises(HostError, match="NVRTC, which compiles kernels") as error:
        compile_kernels((8, 9))
    assert "nvidia-cuda-nvrtc" in error.value.hint
    # A device without it still copies.
    device = CudaDevice(FakeDriver(), 0)
    with pytest.raises(HostError, match="NVRTC"):
        device.launch("noise", device.alloc((3, 4, 4), "float32"), 7, 0)


@pytest.fixture(scope="module")
def nvrtc() -> Any:
    """The real compiler, which needs no GPU."""
    pytest.importorskip("cuda.bindings.nvrtc")
    module = importlib.import_module("cuda.bindings.nvrtc")
    try:
        cuda_kernels.checked_nvrtc(module, "nvrtcVersion")
    except RuntimeError as error:
        pytest.skip(str(error))
    return module


@pytest.mark.parametrize("capability", [(7, 5), (8, 9), (9, 0), (12, 0)])
def test_the_kernels_compile(nvrtc: Any, capability: tuple[int, int]) -> None:
    image = compile_kernels(capability)
    assert image[:4] == b"\x7fELF"
    assert all(name.encode() in image for name in KERNELS)


def test_no_multiply_is_fused_with_an_add_and_no_subnormal_is_flushed(nvrtc: Any) -> None:
    # For a GPU that the compiler does not know it makes text.
    text = compile_source(nvrtc, cuda_kernels.kernel_source(), (99, 0)).decode()
    assert all(f".entry {name}(" in text for name in KERNELS)
    assert "fma." not in text
    assert "mad.f" not in text
    assert ".ftz" not in text
    assert "mul.rn.f64" in text
    assert "add.rn.f64" in text


def test_the_real_compilers_log_reaches_the_error(nvrtc: Any) -> None:
    with pytest.raises(HostError, match=r"NVRTC_ERROR_COMPILATION for sm_89:\nkernels.cu\(1\): error"):
        compile_source(nvrtc, b"int f() { return nothing; }", (8, 9))
