"""Which backend opens where, and what each says when it cannot."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from fakes.cuda import fake_device, fake_driver
from fakes.onnxruntime_cuda import FakeOnnxRuntime
from fakes.tensorrt_runtime import FakeLibrary, profile_of, write_engine
from l2p_runtime.backends import Backend, Engine, backend_names, cuda, open_backend, require_arrays
from l2p_runtime.backends.onnx import make_options
from l2p_runtime.backends.onnx_cuda import OnnxCudaEngine
from l2p_runtime.backends.trt_engine import TrtEngine
from l2p_runtime.contract import EngineBackend, NetworkSpec, Target, TensorSpec
from l2p_runtime.errors import ArtifactError, HostError, InternalError, L2PError, UnsupportedError, UsageError

SPEC = NetworkSpec("toy", (TensorSpec("x", "float32", ("B", "n")),), (TensorSpec("y", "float32", ("B", "n")),))
LIBRARIES = {"rtx": ("tensorrt_rtx", "1.7.1.116"), "tensorrt": ("tensorrt", "11.4.0.106")}


@pytest.mark.parametrize(
    ("asked", "threads"),
    [(None, 0), ("", 0), ("1", 1), (" 2 ", 2), ("3,1", 3), ("4096", 4), ("0", 0), ("-1", 0), ("two", 0), ("\u0661", 0)],
)
def test_threads_are_those_that_are_asked_for(asked: str | None, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert make_options(onnxruntime).intra_op_num_threads == threads


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Make a machine: one fake GPU, and the libraries that are given; what is not given is not installed.

    Returns the libraries by import name, and every device that was opened under `devices`.
    """

    def make(
        *installed: str,
        capability: tuple[int, int] = (8, 9),
        devices: int = 1,
        onnxruntime: FakeOnnxRuntime | None = None,
        **driver: Any,
    ) -> dict[str, Any]:
        made: dict[str, Any] = {"devices": []}

        def open_cuda(index: int, install: str) -> Any:
            device = fake_device(index, capability=capability, devices=devices, **driver)
            made["devices"].append(device)
            for backend, (module, version) in LIBRARIES.items():
                library = FakeLibrary(fake_driver(device), version) if backend in installed else None
                made[module] = library
                monkeypatch.setitem(sys.modules, module, library)
            return device

        monkeypatch.setattr(cuda, "open_cuda", open_cuda)
        monkeypatch.setitem(sys.modules, "onnxruntime", onnxruntime)
        return made

    return make


@pytest.fixture
def graph(tmp_path: Path) -> tuple[Path, Path]:
    """A graph of the toy network, and its weights."""
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", "n"]) for name in "xy"]
    nodes = [helper.make_node("Softmax", ["x"], ["s"]), helper.make_node("Sigmoid", ["s"], ["y"])]
    made = helper.make_graph(nodes, "toy", tensors[:1], tensors[1:])
    path, weights = tmp_path / "toy.onnx", tmp_path / "toy.safetensors"
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    weights.write_bytes(bytes(100))
    return path, weights


def released(device: Any) -> bool:
    driver = fake_driver(device)
    return not driver.retained and not driver.held_bytes and not driver.streams


def test_the_order_and_the_names() -> None:
    assert backend_names() == ["tensorrt", "rtx", "onnx-cuda", "onnx"]


def test_no_such_backend() -> None:
    for name in ("cuda", "trt_engine", "host", "..memory", "onnx__cuda", ""):
        with pytest.raises(UsageError, match="there is no backend") as caught:
            open_backend(name)
        assert "auto, tensorrt, rtx, onnx-cuda, onnx" in caught.value.hint


@pytest.mark.parametrize("name", ["rtx", "tensorrt", "onnx-cuda", "onnx_cuda"])
def test_a_machine_without_a_driver_says_so(
    name: str, host: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_driver(index: int, install: str) -> None:
        raise HostError("no driver", hint="install one")

    monkeypatch.setattr(cuda, "open_cuda", no_driver)
    for module, _ in LIBRARIES.values():
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(HostError, match="no driver"):
        open_backend(name)
    assert open_backend("auto").name == "onnx"


def test_auto_loads_no_gpu_library_where_there_is_no_driver() -> None:
    code = (
        "import sys\n"
        "from l2p_runtime.backends import cuda, open_backend\n"
        "from l2p_runtime.errors import HostError\n"
        "def none(index, install): raise HostError('no driver')\n"
        "cuda.open_cuda = none\n"
        "assert open_backend('auto').name == 'onnx'\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "assert not loaded & {'tensorrt', 'tensorrt_rtx', 'tensorrt_bindings', 'tensorrt_libs', 'cuda'}, loaded\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["rtx", "tensorrt"])
def test_an_engine_backend(
    name: EngineBackend, host: Callable[..., Any], tmp_path: Path, graph: tuple[Path, Path]
) -> None:
    module, version = LIBRARIES[name]
    made = host(name)
    backend = open_backend(name)
    short = ".".join(version.split(".")[:2])
    assert backend.name == name
    assert backend.target == Target(name, short, "sm89")
    assert backend.identity == f"{module} {version} on sm89"
    assert backend.device is made["devices"][0]
    with pytest.raises(InternalError, match=f"backend `{name}` runs engines, it was given the graph `toy.onnx`"):
        backend.load(*graph, SPEC)
    path = tmp_path / "toy.engine"
    profiles = [profile_of(SPEC, B=(1, 1, 1), n=(1, 2, 4))]
    record = write_engine(path, graph[0], profiles, network="trunk", target=f"{name}{short}-sm89", version=version)
    assert backend.load_engine is not None
    engine = backend.load_engine(path, record, SPEC)
    assert isinstance(engine, TrtEngine)
    run(backend, engine)
    engine.close()
    backend.device.close()
    assert released(made["devices"][0])


@pytest.mark.parametrize(("name", "hint"), [("rtx", "l2p-export[rtx]"), ("tensorrt", "l2p-export[tensorrt]")])
def test_a_library_that_is_not_installed(name: str, hint: str, host: Callable[..., Any]) -> None:
    made = host()
    with pytest.raises(HostError, match="is not installed") as caught:
        open_backend(name)
    assert hint in caught.value.hint
    assert released(made["devices"][0])


@pytest.mark.parametrize(
    "error", [ImportError("libnvinfer.so.11: cannot open"), OSError("bad ELF"), RuntimeError("no")]
)
def test_a_library_that_does_not_load(
    error: Exception, host: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = host("rtx")

    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr("l2p_runtime.backends.trt_engine.importlib", SimpleNamespace(import_module=fail))
    with pytest.raises(HostError, match=f"TensorRT for RTX does not load: {error}"):
        open_backend("rtx")
    assert released(made["devices"][0])


def test_a_gpu_that_the_library_has_no_kernels_for(host: Callable[..., Any]) -> None:
    made = host("rtx", "tensorrt", capability=(9, 0))
    with pytest.raises(
        HostError, match=r"Fake GPU has compute capability sm90; TensorRT for RTX runs on sm75, "
    ) as caught:
        open_backend("rtx")
    assert "--backend onnx-cuda" in caught.value.hint
    assert released(made["devices"][0])
    assert not made["tensorrt_rtx"].calls
    assert open_backend("tensorrt").target == Target("tensorrt", "11.4", "sm90")


def test_a_library_that_does_not_start_gives_the_gpu_back(
    host: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = host("rtx")

    def fail(self: Any, logger: Any) -> None:
        raise TypeError("factory function returned nullptr")

    monkeypatch.setattr(FakeLibrary, "Runtime", fail)
    with pytest.raises(HostError, match="does not start"):
        open_backend("rtx")
    assert released(made["devices"][0])


def test_a_gpu_that_is_not_there(host: Callable[..., Any]) -> None:
    host("rtx", devices=1)
    for name in ("rtx", "auto"):
        with pytest.raises(UsageError, match="there is no CUDA device 3"):
            open_backend(name, 3)


def test_auto_takes_the_fastest_that_can_run(host: Callable[..., Any]) -> None:
    host("tensorrt", "rtx", onnxruntime=FakeOnnxRuntime())
    assert open_backend("auto").name == "tensorrt"
    made = host("rtx", onnxruntime=FakeOnnxRuntime())
    assert open_backend("auto").name == "rtx"
    assert [released(device) for device in made["devices"]] == [True, False]
    host("rtx", capability=(9, 0), onnxruntime=FakeOnnxRuntime())
    assert open_backend("auto").name == "onnx-cuda"
    made = host(onnxruntime=FakeOnnxRuntime(loads=False))
    assert open_backend("auto").name == "onnx"
    assert all(map(released, made["devices"]))


def test_auto_where_nothing_runs(host: Callable[..., Any]) -> None:
    made = host()
    with pytest.raises(
        HostError, match=r"no backend can run here: tensorrt: .*; rtx: .*; onnx-cuda: .*; onnx: "
    ) as caught:
        open_backend("auto")
    assert "l2p-export[cpu]" in caught.value.hint
    assert all(map(released, made["devices"]))


def test_onnx_cuda(host: Callable[..., Any], graph: tuple[Path, Path]) -> None:
    library = FakeOnnxRuntime()
    made = host(onnxruntime=library, devices=2)
    backend = open_backend("onnx_cuda", 1)
    assert (backend.name, backend.target, backend.load_engine) == ("onnx-cuda", None, None)
    assert backend.identity == f"onnxruntime {library.__version__} on sm89"
    engine = backend.load(*graph, SPEC)
    run(backend, engine)
    assert engine.memory_bytes() == 100
    options, settings = library.sessions[-1]
    assert settings["device_id"] == "1"
    assert settings["user_compute_stream"] == str(made["devices"][0].stream)
    assert settings["arena_extend_strategy"] == "kSameAsRequested"
    assert settings["use_tf32"] == "0"
    assert options.get_session_config_entry("session.disable_quant_qdq") == "1"
    engine.close()
    engine.close()
    assert engine.memory_bytes() == 0
    with pytest.raises(InternalError, match="the engine of `toy` is closed"):
        run(backend, engine)


@pytest.mark.parametrize(
    ("library", "text", "hint"),
    [
        (FakeOnnxRuntime(compiled=False), "has CPUExecutionProvider, wanted CUDAExecutionProvider", "l2p-export[gpu]"),
        (
            FakeOnnxRuntime(loads=False),
            r"cannot use CUDA: .*asked for CUDAExecutionProvider and gave CPUExecutionProvider.*libcublasLt",
            "cuDNN",
        ),
        (None, "ONNX Runtime cannot be imported", "l2p-export[gpu]"),
    ],
)
def test_onnx_runtime_without_cuda(
    library: FakeOnnxRuntime | None,
    text: str,
    hint: str,
    host: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = host(onnxruntime=library)
    with pytest.raises(HostError, match=text) as caught:
        open_backend("onnx-cuda")
    assert hint in caught.value.hint
    assert released(made["devices"][0])
    assert capsys.readouterr().out == ""


def test_the_installed_onnx_runtime_is_for_the_cpu(host: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime-gpu is installed")
    host()
    monkeypatch.setitem(sys.modules, "onnxruntime", onnxruntime)
    with pytest.raises(HostError, match="wanted CUDAExecutionProvider"):
        open_backend("onnx-cuda")


def test_a_session_that_falls_back_to_the_cpu(host: Callable[..., Any], graph: tuple[Path, Path]) -> None:
    library = FakeOnnxRuntime()
    host(onnxruntime=library)
    backend = open_backend("onnx-cuda")
    library.loads = False
    with pytest.raises(HostError, match="asked for CUDAExecutionProvider and gave CPUExecutionProvider"):
        backend.load(*graph, SPEC)


def test_a_heavy_operator_that_falls_back_to_the_cpu(host: Callable[..., Any], graph: tuple[Path, Path]) -> None:
    library = FakeOnnxRuntime(on_cpu=frozenset({"Softmax", "Sigmoid"}))
    host(onnxruntime=library)
    backend = open_backend("onnx-cuda")
    with pytest.raises(UnsupportedError, match=r"no CUDA kernel for Softmax of `toy\.onnx` and would use the CPU"):
        backend.load(*graph, SPEC)
    library.on_cpu = frozenset({"Sigmoid"})
    backend.load(*graph, SPEC).close()


@pytest.mark.parametrize(
    ("says", "kind", "text"),
    [
        ("Failed to allocate memory for requested buffer of size 9", HostError, "out of memory in `toy`"),
        ("CUDA failure 2: out of memory", HostError, "out of memory in `toy`"),
        ("CUDA failure 700: an illegal memory access", HostError, "the GPU failed in `toy`"),
        ("CUDNN_STATUS_EXECUTION_FAILED", HostError, "the GPU failed in `toy`"),
        ("Got invalid dimensions for input", ArtifactError, "ONNX Runtime fails in `toy`"),
    ],
)
def test_runs_that_fail(
    says: str, kind: type[L2PError], text: str, host: Callable[..., Any], graph: tuple[Path, Path]
) -> None:
    library = FakeOnnxRuntime()
    host(onnxruntime=library)
    backend = open_backend("onnx-cuda")
    engine = backend.load(*graph, SPEC)
    library.fails = RuntimeError(says)
    with pytest.raises(kind, match=text):
        run(backend, engine)
    library.fails = None
    run(backend, engine)


def test_graphs_that_are_refused(host: Callable[..., Any], graph: tuple[Path, Path], tmp_path: Path) -> None:
    host(onnxruntime=FakeOnnxRuntime())
    backend = open_backend("onnx-cuda")
    other = NetworkSpec("toy", (TensorSpec("z", "float32", ("B", "n")),), SPEC.outputs)
    with pytest.raises(ArtifactError, match=r"has \['x'\], the manifest says \['z'\]"):
        backend.load(*graph, other)
    graph[0].write_bytes(b"no graph")
    with pytest.raises(ArtifactError, match="ONNX Runtime refuses"):
        backend.load(*graph, SPEC)


def test_arrays_are_checked_before_any_library_sees_them(host: Callable[..., Any], graph: tuple[Path, Path]) -> None:
    host(onnxruntime=FakeOnnxRuntime())
    backend = open_backend("onnx-cuda")
    engine = backend.load(*graph, SPEC)
    assert isinstance(engine, OnnxCudaEngine)
    alloc = backend.device.alloc
    x, y = alloc((1, 4), "float32"), alloc((1, 4), "float32")
    with pytest.raises(InternalError, match="not contiguous"):
        engine.run({"x": alloc((1, 8), "float32")[:, ::2]}, {"y": y})
    for inputs, outputs, kind in (
        ({"x": alloc((4,), "float32")}, {"y": y}, UsageError),
        ({"x": x}, {"y": alloc((1, 5), "float32")}, InternalError),
        ({"x": alloc((1, 4), "float16")}, {"y": y}, InternalError),
        ({"x": x}, {"y": alloc((1, 4), "int64")}, InternalError),
        ({}, {"y": y}, InternalError),
        ({"x": x}, {}, InternalError),
        ({"x": x}, {"y": y, "z": y}, InternalError),
    ):
        with pytest.raises(kind):
            require_arrays(SPEC, inputs, outputs)
        with pytest.raises(kind):
            engine.run(inputs, outputs)


def run(backend: Backend, engine: Engine) -> None:
    """Run the toy network once."""
    device = backend.device
    x, y = device.alloc((1, 4), "float32"), device.alloc((1, 4), "float32")
    device.copy(x, device.upload(device.download(x) * 0))
    engine.run({"x": x}, {"y": y})
    device.synchronize()
    assert device.download(y).min() > 0.5
