"""The allocator of ONNX Runtime's CPU sessions, called as ONNX Runtime calls it, and in sessions of it."""

from __future__ import annotations

import ctypes
import gc
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from l2p_runtime import native
from l2p_runtime.backends import onnx_memory

SOURCE = Path(__file__).resolve().parents[3] / "runtime/csrc/onnx_allocator.cpp"
MIB = 1 << 20
PAGE = 4096
# The places of functions in ONNX Runtime's C interface.
CREATE_ENV, CREATE_INFO, RELEASE_ENV, RELEASE_STATUS, REGISTER = 3, 68, 92, 93, 176

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the allocator is for Linux")


class _Allocator(ctypes.Structure):
    _fields_ = (
        ("version", ctypes.c_uint32),
        ("alloc", ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)),
        ("free", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)),
        ("info", ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)),
    )


@dataclass
class _Runtime:
    """A stand-in for ONNX Runtime that takes an allocator, and what it was asked."""

    base: Any
    calls: list[str]
    allocators: list[int]
    kept: list[Any]


def _runtime(*, has_version: bool = True, refuses: bool = False) -> _Runtime:
    calls: list[str] = []
    allocators: list[int] = []
    pointer, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int

    @ctypes.CFUNCTYPE(pointer, number, text, ctypes.POINTER(pointer))
    def create_env(level: int, name: bytes, out: Any) -> None:
        calls.append(f"env {level} {name.decode()}")
        out[0] = 0x1234

    @ctypes.CFUNCTYPE(pointer, text, number, number, number, ctypes.POINTER(pointer))
    def create_info(name: bytes, kind: int, device: int, memory: int, out: Any) -> None:
        calls.append(f"info {name.decode()} {kind} {device} {memory}")
        out[0] = 0x5678

    @ctypes.CFUNCTYPE(pointer, pointer, pointer)
    def register(env: int, allocator: int) -> int | None:
        calls.append(f"register {env:#x}")
        allocators.append(allocator)
        return 0x9ABC if refuses else None

    @ctypes.CFUNCTYPE(None, pointer)
    def release_env(env: int) -> None:
        calls.append(f"release {env:#x}")

    @ctypes.CFUNCTYPE(None, pointer)
    def release_status(status: int) -> None:
        calls.append(f"status {status:#x}")

    table = (pointer * (REGISTER + 1))()
    places = {CREATE_ENV: create_env, CREATE_INFO: create_info, REGISTER: register}
    for place, function in {**places, RELEASE_ENV: release_env, RELEASE_STATUS: release_status}.items():
        table[place] = ctypes.cast(function, pointer).value

    @ctypes.CFUNCTYPE(pointer, ctypes.c_uint32)
    def get_api(version: int) -> int | None:
        calls.append(f"version {version}")
        return ctypes.addressof(table) if has_version else None

    base = (pointer * 2)(ctypes.cast(get_api, pointer).value, None)
    return _Runtime(base, calls, allocators, [table, places, release_env, release_status, get_api])


def _library(folder: Path) -> ctypes.CDLL:
    """A library of its own: an allocator is registered once a process and library."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    path = folder / "allocator.so"
    flags = "-std=c++17 -O2 -fPIC -shared -fvisibility=hidden -Wall -Wextra -Werror"
    subprocess.run([compiler, *flags.split(), SOURCE, "-o", path], check=True)
    return ctypes.CDLL(str(path))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the library."""
    folder = tmp_path_factory.mktemp("allocator")
    _library(folder)
    return folder / "allocator.so"


def _copy(compiled: Path, folder: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(shutil.copy(compiled, folder / "copy.so")))


class Blocks:
    """Blocks of an allocator that was registered with a stand-in."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._runtime = _runtime()
        assert not library.RegisterCustomOps(None, self._runtime.base)
        assert library.l2p_onnx_allocator_is_registered()
        self._library = library
        self._allocator = _Allocator.from_address(self._runtime.allocators[0])
        self._self = self._runtime.allocators[0]

    def alloc(self, size: int) -> int | None:
        """Address of a block."""
        return self._allocator.alloc(self._self, size)  # type: ignore[no-any-return]

    def free(self, block: int | None) -> None:
        """Free a block."""
        self._allocator.free(self._self, block)

    def release(self) -> None:
        """Unmap what is kept."""
        self._library.l2p_onnx_allocator_release()

    def figures(self) -> tuple[int, int, int]:
        """Bytes used, kept, and most used at once."""
        values = [ctypes.c_uint64() for _ in range(3)]
        self._library.l2p_onnx_allocator_bytes(*map(ctypes.byref, values))
        used, kept, peak = (value.value for value in values)
        return used, kept, peak


@pytest.fixture(scope="module")
def blocks(compiled: Path, tmp_path_factory: pytest.TempPathFactory) -> Blocks:
    """The allocator, with its blocks."""
    return Blocks(_copy(compiled, tmp_path_factory.mktemp("blocks")))


def test_it_is_registered_once_in_the_environment_that_is_there(compiled: Path, tmp_path: Path) -> None:
    library, runtime = _copy(compiled, tmp_path), _runtime()
    for _ in range(3):
        assert not library.RegisterCustomOps(None, runtime.base)
    once = ["env 3 l2p", "info Cpu 0 0 0", "register 0x1234", "release 0x1234"]
    assert [call for call in runtime.calls if not call.startswith("version")] == once
    assert library.l2p_onnx_allocator_is_registered() == 1
    assert _Allocator.from_address(runtime.allocators[0]).info(None) == 0x5678


@pytest.mark.parametrize("wrong", ["has_version", "refuses"])
def test_a_runtime_that_takes_no_allocator_keeps_its_own(wrong: str, compiled: Path, tmp_path: Path) -> None:
    library, runtime = _copy(compiled, tmp_path), _runtime(**{wrong: wrong == "refuses"})
    assert not library.RegisterCustomOps(None, runtime.base)
    assert library.l2p_onnx_allocator_is_registered() == 0
    assert ("status 0x9abc" in runtime.calls) == (wrong == "refuses")


SIZES = st.one_of(
    st.integers(1, 4096),
    st.integers(MIB - 2, MIB + 2),
    st.integers(MIB, 12 * MIB),
    st.sampled_from([2 * MIB, 4 * MIB, 2 * MIB + 1, 4 * MIB - 1]),
)
STEPS = st.lists(st.one_of(SIZES, st.integers(-8, -1), st.just(0)), max_size=40)


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_blocks_keep_their_bytes_and_no_more_is_mapped_than_was_used(blocks: Blocks, steps: list[int]) -> None:
    """A positive step allocates, a negative one frees, 0 releases what is kept."""
    blocks.release()
    live: list[tuple[int, int, int]] = []
    most = 0
    for number, step in enumerate(steps):
        if step > 0:
            block = blocks.alloc(step)
            assert block is not None
            assert block % 64 == 0
            ctypes.memset(block, number % 251, step)
            live.append((block, step, number % 251))
        elif step < 0 and live:
            block, size, value = live.pop(step % len(live))
            assert ctypes.string_at(block, size) == bytes([value]) * size
            blocks.free(block)
        elif step == 0:
            blocks.release()
            most = 0
        used, kept, peak = blocks.figures()
        wanted = sum(-(-size // PAGE) * PAGE for _, size, _ in live if size >= MIB)
        most = max(most, wanted)
        assert (used, peak) == (wanted, most)
        assert used + kept <= peak
    for block, size, value in live:
        assert ctypes.string_at(block, size) == bytes([value]) * size
        blocks.free(block)
    blocks.release()
    assert blocks.figures() == (0, 0, 0)


def test_what_was_freed_serves_the_next(blocks: Blocks) -> None:
    blocks.release()
    first = blocks.alloc(8 * MIB)
    blocks.free(first)
    assert blocks.figures() == (0, 8 * MIB, 8 * MIB)
    # A part of it, and the rest of it.
    parts = [blocks.alloc(3 * MIB), blocks.alloc(5 * MIB)]
    assert parts == [first, first + 3 * MIB]  # type: ignore[operator]
    assert blocks.figures() == (8 * MIB, 0, 8 * MIB)
    for part in parts:
        blocks.free(part)
    # A larger one starts with the pages of the largest that is kept.
    assert first is not None
    larger = blocks.alloc(9 * MIB)
    assert larger is not None
    used, kept, peak = blocks.figures()
    assert (used, kept, peak) == (9 * MIB, 0, 9 * MIB)
    blocks.free(larger)
    blocks.release()


def test_a_block_that_grows_moves_pages_and_copies_none(blocks: Blocks) -> None:
    blocks.release()
    small = blocks.alloc(4 * MIB)
    assert small is not None
    ctypes.memset(small, 7, 4 * MIB)
    blocks.free(small)
    large = blocks.alloc(16 * MIB)
    assert large is not None
    # Uninitialised memory: it shows whose pages these are.
    assert ctypes.string_at(large, 4 * MIB) == b"\7" * (4 * MIB)
    assert ctypes.string_at(large + 4 * MIB, 12 * MIB) == bytes(12 * MIB)
    blocks.free(large)
    blocks.release()


@pytest.mark.parametrize("size", [0, 1 << 62, (1 << 64) - 1])
def test_no_block_for_nothing_or_too_much(size: int, blocks: Blocks) -> None:
    assert blocks.alloc(size) is None
    blocks.free(None)
    assert blocks.figures()[0] == 0


# In sessions of ONNX Runtime


def _model() -> bytes:
    """x to sqrt(x) + x, whose one tensor between is as large as its input."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xy")
    nodes = [helper.make_node("Sqrt", ["x"], ["s"]), helper.make_node("Add", ["s", "x"], ["y"])]
    graph = helper.make_graph(nodes, "g", [x], [y])
    return helper.make_model(  # type: ignore[no-any-return]
        graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    ).SerializeToString()


def _session() -> Any:
    options = onnxruntime.SessionOptions()
    options.enable_cpu_mem_arena = False
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    onnx_memory.use_native_allocator(options)
    return onnxruntime.InferenceSession(_model(), options, providers=["CPUExecutionProvider"])


def _figures(library: native.NativeLibrary) -> tuple[int, ...]:
    values = [ctypes.c_uint64() for _ in range(3)]
    ctypes.CDLL(library.path).l2p_onnx_allocator_bytes(*map(ctypes.byref, values))
    return tuple(value.value for value in values)


def test_a_session_takes_its_tensors_from_it() -> None:
    library = native.load_native()
    if library is None:
        pytest.skip("no native library installed")
    onnx_memory.release_memory()
    session = _session()
    x = np.arange(4 * MIB, dtype=np.float32)
    used = _figures(library)[0]
    (y,) = session.run(None, {"x": x})
    assert np.array_equal(y, np.sqrt(x) + x)
    # What is between is kept; `y` is the caller's.
    assert _figures(library)[2] >= used + 16 * MIB
    kept = _figures(library)[1]
    assert kept >= 16 * MIB
    onnx_memory.release_memory()
    assert _figures(library)[1] == 0
    del y, session
    gc.collect()
    onnx_memory.release_memory()
    assert _figures(library) == (used, 0, used)


def test_without_the_library_sessions_are_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.SWITCH, "0")
    session = _session()
    x = np.arange(MIB, dtype=np.float32)
    (y,) = session.run(None, {"x": x})
    assert np.array_equal(y, np.sqrt(x) + x)
    onnx_memory.release_memory()


def test_a_runtime_without_custom_operators_is_left_alone() -> None:
    class Options:
        entries: tuple[str, ...] = ()

        def register_custom_ops_library(self, path: str) -> None:
            raise RuntimeError(path)

        def add_session_config_entry(self, *entry: str) -> None:
            self.entries += entry

    options = Options()
    onnx_memory.use_native_allocator(options)
    assert options.entries == ()
