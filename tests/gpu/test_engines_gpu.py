"""Engines on the GPU of this machine, against ONNX Runtime on the CPU.

    make test-gpu

Engines are built here for the GPU that is there. What a machine lacks, a library or a GPU that it supports, is skipped;
a library that is there and fails is a failure.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from conftest import Bundles
from l2p_engines.builders.builder import build_engine
from l2p_engines.builders.gpus import Gpu, gpus
from l2p_engines.builders.request import EngineRequest, EngineSpec
from l2p_engines.builders.shapes import engine_profiles
from l2p_engines.builders.trt import library_version
from l2p_runtime.backends import Backend, Engine, open_backend
from l2p_runtime.backends.trt_engine import TrtEngine
from l2p_runtime.bundle import Bundle, open_bundle
from l2p_runtime.contract import CAPABILITIES, NETWORKS, EngineBackend, EngineRecord, NetworkSpec, Target
from l2p_runtime.errors import ArtifactError, UsageError

pytestmark = pytest.mark.gpu

THRESHOLDS = {"fp32": 1e-4, "fp16": 2e-2}
"""Largest relative error against the float32 graph. Float32 sums in another order; TF32 is off in both."""

SIZES = (
    {"B": 1, "h": 3, "w": 2, "t": 1, "s": 64, "r": 3},
    {"B": 1, "h": 8, "w": 5, "t": 2, "s": 128, "r": 8},
    {"B": 1, "h": 1, "w": 1, "t": 1, "s": 64, "r": 1},
)
"""Of the profile's sizes, the last two near its corners."""

Opener = Callable[[str], Engine]
"""A network's name to its engine."""


@pytest.fixture(scope="module")
def gpu() -> Gpu:
    found = gpus()
    if not found:
        pytest.skip("no NVIDIA GPU")
    return found[0]


@pytest.fixture(scope="module")
def bundle(bundles: Bundles) -> Bundle:
    return open_bundle(bundles.path("tiny-16"))


@pytest.fixture(scope="module", params=[("rtx", "fp32"), ("rtx", "fp16"), ("tensorrt", "fp16")], ids="-".join)
def built(
    request: pytest.FixtureRequest, gpu: Gpu, bundle: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> tuple[EngineBackend, str, dict[str, tuple[Path, EngineRecord]]]:
    """Engines of all networks, built for this GPU."""
    backend, plan = request.param
    module = {"rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}[backend]
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    if gpu.capability not in CAPABILITIES[backend]:
        pytest.skip(f"{backend} does not support {gpu.name} ({gpu.capability})")
    target = Target(backend, library_version(backend), gpu.capability)
    folder, manifest, engines = tmp_path_factory.mktemp(f"{backend}-{plan}"), bundle.manifest, {}
    sizes = {record.path: record.size_bytes for record in manifest.files}
    for network in NETWORKS:
        graph = manifest.graph(network, plan)
        network_spec = manifest.network(network)
        profiles = engine_profiles(network_spec, manifest.model, manifest.profiles)
        spec = EngineSpec(network_spec, plan, target, profiles, ("float16",) if plan == "fp16" else ("float32",))
        path = folder / f"{network}.engine"
        made = build_engine(EngineRequest(spec, bundle.path(graph.graph), sizes[graph.weights]), path)
        digests = {record.path: record.sha256 for record in manifest.files}
        engines[network] = (
            path,
            EngineRecord(
                network,
                plan,
                target.spelling,
                made.library_version,
                digests[graph.graph],
                digests[graph.weights],
                made.profiles,
                f"engines/{path.name}",
            ),
        )
    return backend, plan, engines


@pytest.fixture
def opened(
    built: tuple[EngineBackend, str, dict[str, tuple[Path, EngineRecord]]], bundle: Bundle
) -> Iterator[tuple[Backend, str, Opener]]:
    """The backend of those engines, and how it opens one."""
    name, plan, engines = built
    backend = open_backend(name)

    def open_engine(network: str) -> Engine:
        assert backend.load_engine is not None
        return backend.load_engine(*engines[network], bundle.manifest.network(network))

    yield backend, plan, open_engine
    backend.device.close()  # type: ignore[attr-defined]


@pytest.fixture
def reference(bundle: Bundle) -> Opener:
    """The float32 graphs on the CPU."""
    backend = open_backend("onnx")
    return lambda network: load(backend, bundle, network, "fp32")


@pytest.mark.parametrize("network", NETWORKS)
def test_engines_give_the_graphs_results(
    opened: tuple[Backend, str, Opener], reference: Opener, bundle: Bundle, network: str
) -> None:
    backend, plan, open_engine = opened
    compare(backend, open_engine(network), reference(network), bundle.manifest.network(network), THRESHOLDS[plan])


def test_engines_share_memory_and_give_it_back(opened: tuple[Backend, str, Opener], bundle: Bundle) -> None:
    backend, _, open_engine = opened
    device = backend.device
    # The library loads its own code with the first engine, which stays.
    open_engine("caption").close()
    before = device.available_bytes()
    engines = {network: open_engine(network) for network in NETWORKS}
    for _ in range(2):
        for network, engine in engines.items():
            run(backend, engine, bundle.manifest.network(network), SIZES[1])
    assert all(engine.memory_bytes() > 0 for engine in engines.values())
    for engine in engines.values():
        engine.close()
        engine.close()
    assert before - device.available_bytes() < 64 << 20


def test_sizes_that_no_profile_covers(opened: tuple[Backend, str, Opener], bundle: Bundle) -> None:
    backend, _, open_engine = opened
    engine, spec = open_engine("head"), bundle.manifest.network("head")
    with pytest.raises(UsageError, match="was not built for"):
        run(backend, engine, spec, {**SIZES[0], "r": 9})
    run(backend, engine, spec, SIZES[0])
    engine.close()


def test_damaged_engines_are_refused(
    built: tuple[EngineBackend, str, dict[str, tuple[Path, EngineRecord]]],
    opened: tuple[Backend, str, Opener],
    bundle: Bundle,
    tmp_path: Path,
) -> None:
    path, record = built[2]["tail"]
    backend, spec = opened[0], bundle.manifest.network("tail")
    assert backend.load_engine is not None
    content = path.read_bytes()
    for index, broken in enumerate((b"", b"no engine", content[: len(content) // 2])):
        damaged = tmp_path / f"{index}.engine"
        damaged.write_bytes(broken)
        with pytest.raises(ArtifactError, match=rf"`{index}\.engine`"):
            backend.load_engine(damaged, record, spec)


def test_layers_can_be_read(opened: tuple[Backend, str, Opener]) -> None:
    engine = opened[2]("tail")
    assert isinstance(engine, TrtEngine)
    layers = engine.layers()
    assert layers, "the inspector says nothing that can be read"
    assert all(layer.name for layer in layers)
    engine.close()


@pytest.mark.parametrize("plan", ["fp32", "fp16"])
def test_onnx_runtime_on_the_gpu_gives_the_graphs_results(
    gpu: Gpu, bundle: Bundle, reference: Opener, plan: str
) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime-gpu is not installed")
    backend = open_backend("onnx-cuda")
    for network in NETWORKS:
        engine = load(backend, bundle, network, plan)
        compare(backend, engine, reference(network), bundle.manifest.network(network), THRESHOLDS[plan])
    backend.device.close()  # type: ignore[attr-defined]


def load(backend: Backend, bundle: Bundle, network: str, plan: str) -> Engine:
    record = bundle.manifest.graph(network, plan)
    return backend.load(bundle.path(record.graph), bundle.path(record.weights), bundle.manifest.network(network))


def compare(backend: Backend, engine: Engine, reference: Engine, spec: NetworkSpec, threshold: float) -> None:
    """Run both at several sizes, there and back, and close both."""
    on_host = open_backend("onnx")
    for sizes in (*SIZES, SIZES[0]):
        found, wanted = run(backend, engine, spec, sizes), run(on_host, reference, spec, sizes)
        for name, values in wanted.items():
            assert np.isfinite(found[name]).all()
            error = np.linalg.norm(found[name] - values) / np.linalg.norm(values)
            assert error < threshold, (spec.name, name, sizes, error)
    engine.close()
    reference.close()


def run(backend: Backend, engine: Engine, spec: NetworkSpec, sizes: Mapping[str, int]) -> dict[str, NDArray[Any]]:
    device, rng = backend.device, np.random.default_rng(7)
    inputs: dict[str, Any] = {}
    for tensor in spec.inputs:
        shape = tensor.resolve(sizes)
        made = rng.random(shape) < 0.9 if tensor.dtype == "bool" else rng.random(shape, np.float32)
        inputs[tensor.name] = device.upload(made)
    outputs = {tensor.name: device.alloc(tensor.resolve(sizes), tensor.dtype) for tensor in spec.outputs}
    engine.run(inputs, outputs)
    device.synchronize()
    return {name: np.array(device.download(array)) for name, array in outputs.items()}
