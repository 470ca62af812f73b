"""Every engine keeps the same contract: ONNX Runtime on the host, and what runs on a GPU over fakes of the libraries.

What the fakes cannot show, that the real libraries behave like them, is for `tests/gpu`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from conftest import Bundles
from fakes.cuda import fake_device, fake_driver
from fakes.onnxruntime_cuda import FakeOnnxRuntime
from fakes.tensorrt_runtime import WEIGHT_BYTES, FakeLibrary, write_engine
from l2p_engines.builders.shapes import engine_profiles
from l2p_runtime.backends import Backend, Engine, cuda, open_backend
from l2p_runtime.bundle import Bundle, open_bundle
from l2p_runtime.contract import NETWORKS, NetworkSpec
from l2p_runtime.denoiser import Denoiser, encode_caption, make_workspace, predict
from l2p_runtime.errors import InternalError, L2PError, UsageError
from l2p_runtime.policies import axis_frequencies
from l2p_runtime.stripes import plan_stripes

VERSIONS = {"rtx": "1.7.1.116", "tensorrt": "11.4.0.106"}
MODULES = {"rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
SIZES = {"B": 1, "h": 3, "w": 2, "t": 1, "s": 64, "r": 3}
"""Values of the symbols: 3 x 2 tokens, padded to 32, and 32 of the caption."""


@dataclass
class Kit:
    """A backend, and how it opens a bundle's networks.

    Attributes:
        library: the fake of an engine library; None for a backend that runs graphs.
    """

    backend: Backend
    bundle: Bundle
    folder: Path
    library: FakeLibrary | None = None

    def spec(self, network: str) -> NetworkSpec:
        return self.bundle.manifest.network(network)

    def open(self, network: str) -> Engine:
        manifest, spec = self.bundle.manifest, self.spec(network)
        record = manifest.graph(network, "fp32")
        graph, weights = self.bundle.path(record.graph), self.bundle.path(record.weights)
        if self.backend.load_engine is None:
            return self.backend.load(graph, weights, spec)
        assert self.backend.target is not None
        path = self.folder / f"{network}.engine"
        profiles = engine_profiles(spec, manifest.model, manifest.profiles)
        version = VERSIONS[self.backend.target.backend]
        spelling = self.backend.target.spelling
        engine = write_engine(path, graph, profiles, network=network, target=spelling, version=version)
        return self.backend.load_engine(path, engine, spec)

    def upload(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
        return {name: self.backend.device.upload(values) for name, values in arrays.items()}

    def outputs(self, network: str, sizes: Mapping[str, int] = SIZES) -> dict[str, Any]:
        alloc = self.backend.device.alloc
        return {out.name: alloc(out.resolve(sizes), out.dtype) for out in self.spec(network).outputs}

    def run(self, engine: Engine, network: str, sizes: Mapping[str, int] = SIZES) -> dict[str, NDArray[Any]]:
        device, outputs = self.backend.device, self.outputs(network, sizes)
        engine.run(self.upload(values(self.spec(network), sizes)), outputs)
        device.synchronize()
        return {name: np.array(device.download(array)) for name, array in outputs.items()}


def values(spec: NetworkSpec, sizes: Mapping[str, int]) -> dict[str, NDArray[Any]]:
    """Inputs of a network, the same for all backends."""
    rng = np.random.default_rng(7)
    made: dict[str, NDArray[Any]] = {}
    for tensor in spec.inputs:
        shape = tensor.resolve(sizes)
        made[tensor.name] = rng.random(shape) < 0.9 if tensor.dtype == "bool" else rng.random(shape, np.float32)
    return made


@pytest.fixture(scope="module")
def bundle(bundles: Bundles) -> Bundle:
    return open_bundle(bundles.path("tiny-16"))


@pytest.fixture(params=["onnx", "rtx", "tensorrt", "onnx-cuda"])
def kit(
    request: pytest.FixtureRequest, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Kit]:
    """One backend after the other."""
    name: str = request.param
    library = None
    if name != "onnx":
        device = fake_device()
        monkeypatch.setattr(cuda, "open_cuda", lambda index, install: device)
        if name == "onnx-cuda":
            monkeypatch.setitem(sys.modules, "onnxruntime", FakeOnnxRuntime())
        else:
            library = FakeLibrary(fake_driver(device), VERSIONS[name])
            monkeypatch.setitem(sys.modules, MODULES[name], library)
    made = Kit(open_backend(name), bundle, tmp_path, library)
    yield made
    if name != "onnx":
        device.close()
        assert not fake_driver(device).held_bytes
        assert not fake_driver(device).streams


@pytest.fixture(scope="module")
def expected(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, NDArray[Any]]]:
    """What ONNX Runtime on the CPU makes of every network."""
    kit = Kit(open_backend("onnx"), bundle, tmp_path_factory.mktemp("expected"))
    return {network: kit.run(kit.open(network), network) for network in NETWORKS}


@pytest.mark.parametrize("network", NETWORKS)
def test_the_same_results(kit: Kit, network: str, expected: dict[str, dict[str, NDArray[Any]]]) -> None:
    engine = kit.open(network)
    assert engine.spec == kit.spec(network)
    for _ in range(2):
        for name, found in kit.run(engine, network).items():
            np.testing.assert_allclose(found, expected[network][name], rtol=1e-5, atol=1e-5)
    engine.close()


def test_other_sizes_one_after_the_other(kit: Kit) -> None:
    engine = kit.open("head")
    alone: dict[int, NDArray[Any]] = {}
    for rows in (1, 4, 2, 4, 1):
        found = kit.run(engine, "head", {**SIZES, "r": rows})["prediction"]
        assert found.shape == (1, 3, 16 * rows, 32)
        np.testing.assert_array_equal(found, alone.setdefault(rows, found))
    engine.close()


def test_one_denoising_call_by_stripes(kit: Kit, bundle: Bundle) -> None:
    """Views that begin anywhere, buffers used in turn, stripes with halo: as on the host."""
    on_host = Kit(open_backend("onnx"), bundle, kit.folder)
    found, wanted = (denoise(which) for which in (kit, on_host))
    assert found.std() > 0
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def denoise(kit: Kit) -> NDArray[np.float32]:
    model, device = kit.bundle.manifest.model, kit.backend.device
    engines = {network: kit.open(network) for network in NETWORKS}
    denoiser = Denoiser(model, device, lambda network: nullcontext(engines[network]))
    rng = np.random.default_rng(3)
    image = rng.standard_normal((1, 3, 8 * 16, 3 * 16), dtype=np.float32)
    embeds = rng.standard_normal((5, model.caption_width), dtype=np.float32)
    condition = encode_caption(denoiser, [embeds], 8, 3, axis_frequencies(denoiser.model.rotary, (8, 3), "native"))
    stripes = plan_stripes(model.head, 8, 1, 7)
    assert len(stripes) > 1
    out = device.alloc(image.shape, "float32")
    time = device.upload(np.asarray([0.5], np.float32))
    predict(denoiser, device.upload(image), time, [condition], stripes, [make_workspace(denoiser, condition)], [out])
    device.synchronize()
    for engine in engines.values():
        engine.close()
    return np.array(device.download(out))


def test_wrong_inputs_and_outputs_are_refused(kit: Kit) -> None:
    engine, alloc = kit.open("trunk"), kit.backend.device.alloc
    inputs, outputs = kit.upload(values(kit.spec("trunk"), SIZES)), kit.outputs("trunk")
    width = inputs["tokens"].shape[2]
    wide = alloc((1, 64, 2 * width), "float32")
    wrong: list[tuple[dict[str, Any], dict[str, Any], type[L2PError]]] = [
        ({**inputs, "tokens": alloc((1, 32, width), "float32")}, outputs, UsageError),
        ({**inputs, "tokens": alloc((64, width), "float32")}, outputs, UsageError),
        ({**inputs, "rope_cos": alloc((64, 15), "float32")}, outputs, UsageError),
        ({name: inputs[name] for name in ("tokens", "modulation")}, outputs, InternalError),
        ({**inputs, "extra": wide}, outputs, InternalError),
        ({**inputs, "tokens": alloc((1, 64, width), "float16")}, outputs, InternalError),
        ({**inputs, "tokens": wide[:, :, :width]}, outputs, InternalError),
        (inputs, {"tokens_out": alloc((1, 63, width), "float32")}, InternalError),
        (inputs, {"tokens_out": alloc((1, 64, width), "float16")}, InternalError),
        (inputs, {"tokens_out": wide[:, :, :width]}, InternalError),
        (inputs, {}, InternalError),
    ]
    for given, written, kind in wrong:
        with pytest.raises(kind):
            engine.run(given, written)
    engine.run(inputs, outputs)
    engine.close()


def test_closing_twice_and_running_after_it(kit: Kit) -> None:
    engine = kit.open("tail")
    kit.run(engine, "tail")
    engine.close()
    engine.close()
    with pytest.raises(InternalError, match="the engine of `tail` is closed"):
        kit.run(engine, "tail")


def test_closing_gives_the_weights_back_even_while_an_error_is_kept(kit: Kit) -> None:
    engine = kit.open("tail")
    with pytest.raises(UsageError) as caught:
        engine.run(kit.upload(values(kit.spec("tail"), {**SIZES, "s": 63})) | {"modulation": np.zeros((2, 2))}, {})
    assert engine.memory_bytes() > 0
    engine.close()
    if kit.library is not None:
        assert engine.memory_bytes() == 0, caught
        assert +kit.library.alive == {}


@pytest.mark.parametrize("kit", ["rtx", "tensorrt"], indirect=True)
def test_networks_share_scratch_memory(kit: Kit) -> None:
    assert kit.library is not None
    driver = kit.library.driver
    engines = {network: kit.open(network) for network in NETWORKS}
    before = driver.held_bytes
    for network, engine in engines.items():
        kit.run(engine, network)
    need = {network: engine._scratch_bytes for network, engine in engines.items()}  # type: ignore[attr-defined]
    assert len(set(need.values())) > 1
    # The arrays of the runs are gone; what is left is the buffer of the network that needs the most.
    assert driver.held_bytes - before == max(need.values())
    for engine in engines.values():
        engine.close()
    assert driver.held_bytes - before == max(need.values()) - len(NETWORKS) * WEIGHT_BYTES
    kit.backend.device.available_bytes()
    assert driver.held_bytes == before - len(NETWORKS) * WEIGHT_BYTES
