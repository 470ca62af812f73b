"""Engines that TensorRT for RTX really compiles: each network, precision and kind of target, and what a build tells."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from conftest import Bundles
from l2p_engines.builders.builder import build_engine, build_memory_bytes
from l2p_engines.builders.request import BuildProgress, EngineBuilt, EngineRequest, EngineSpec
from l2p_engines.builders.shapes import engine_profiles
from l2p_engines.builders.trt import EngineSettings, library_version
from l2p_runtime.bundle import Bundle, open_bundle
from l2p_runtime.contract import (
    NETWORKS,
    EngineProfile,
    InputShapes,
    NetworkSpec,
    Profile,
    Range,
    Target,
    TensorSpec,
)
from l2p_runtime.errors import UsageError

SQUARE = Profile("square", 16, Range(16, 32, 128), Range(16, 32, 128))
WIDE = Profile("wide", 16, Range(16, 48, 64), Range(32, 96, 256), caption_tokens=Range(32, 64, 96))
KERNEL_BYTES_MAX = 12_000_000
"""More than any of these networks' kernels take."""


@dataclass(frozen=True)
class Workshop:
    """A bundle's graphs, and a folder that holds engines and nothing else."""

    bundle: Bundle
    folder: Path

    def request(
        self,
        network: str,
        plan: str = "fp16",
        capability: str = "sm89",
        profiles: Sequence[Profile] = (SQUARE,),
        dtypes: tuple[str, ...] = (),
        settings: EngineSettings | None = None,
    ) -> EngineRequest:
        manifest = self.bundle.manifest
        spec = next(spec for spec in manifest.networks if spec.name == network)
        record = next(graph for graph in manifest.graphs if (graph.network, graph.plan) == (network, plan))
        shapes = engine_profiles(spec, manifest.model, profiles)
        target = Target("rtx", library_version("rtx"), capability)
        return EngineRequest(
            EngineSpec(spec, plan, target, shapes, dtypes, settings or EngineSettings()),
            self.bundle.path(record.graph),
            self.bundle.path(record.weights).stat().st_size,
        )

    def build(self, request: EngineRequest) -> EngineBuilt:
        """Build an engine and check all that holds for any."""
        out, told = self.folder / f"{request.spec.label}.engine", list[BuildProgress]()
        built = build_engine(request, out, told.append)
        assert [path for path in self.folder.iterdir() if path != out] == []
        assert built.sha256 == hashlib.sha256(out.read_bytes()).hexdigest()
        assert built.size_bytes == out.stat().st_size
        assert built.profiles == request.spec.profiles
        assert built.library_version.startswith(f"{request.spec.target.library_version}.")
        assert 20_000_000 < built.peak_memory_bytes < build_memory_bytes(request.weight_bytes)
        assert 0 < built.seconds < 60
        assert len(set(built.warnings)) == len(built.warnings)
        fractions = [progress.fraction for progress in told]
        assert fractions == sorted(fractions)
        assert (fractions[0], fractions[-1]) == (0, 1)
        assert told[0].phase == "parsing graph"
        assert (told[-1].phase, told[-1].step) == ("writing engine", built.size_bytes)
        return built


@pytest.fixture(scope="module")
def bundle(bundles: Bundles) -> Bundle:
    return open_bundle(bundles.path("tiny-16"))


@pytest.fixture
def workshop(bundle: Bundle, tmp_path: Path) -> Workshop:
    (tmp_path / "engines").mkdir()
    return Workshop(bundle, tmp_path / "engines")


@pytest.mark.parametrize(("plan", "first"), [("fp32", 0), ("fp16", 1)])
@pytest.mark.parametrize("network", NETWORKS)
def test_every_network_is_compiled_in_either_precision(workshop: Workshop, network: str, plan: str, first: int) -> None:
    capability = ("sm89", "sm120", "portable")[(NETWORKS.index(network) + first) % 3]
    request = workshop.request(network, plan, capability)
    built = workshop.build(request)
    # Weights that were widened or narrowed would show.
    assert request.weight_bytes <= built.size_bytes < request.weight_bytes + KERNEL_BYTES_MAX


@pytest.mark.parametrize("network", ["tail", "head"])
def test_two_profiles_one_of_them_not_square_are_in_one_engine(workshop: Workshop, network: str) -> None:
    request = workshop.request(network, profiles=[SQUARE, WIDE])
    assert len(request.spec.profiles) == 2
    both = workshop.build(request)
    alone = workshop.build(workshop.request(network, profiles=[WIDE]))
    assert alone.profiles == both.profiles[1:]
    assert alone.size_bytes < both.size_bytes


def test_settings_are_taken(workshop: Workshop) -> None:
    settings = EngineSettings(workspace_bytes=1 << 30, optimization_level=1, weight_streaming=True, tf32=True)
    workshop.build(workshop.request("tail", "fp32", settings=settings))


def test_an_engine_replaces_what_is_there(workshop: Workshop) -> None:
    request = workshop.request("tail")
    (workshop.folder / f"{request.spec.label}.engine").write_bytes(b"an older one")
    workshop.build(request)


def test_folders_may_have_any_name(workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = workshop.request("tail")
    folder = tmp_path / os.fsdecode(b"fold\xff r")
    folder.mkdir()
    for name in (request.graph.name, *(p.name for p in request.graph.parent.glob("tail.fp16.*.safetensors"))):
        shutil.copyfile(request.graph.parent / name, folder / name)
    monkeypatch.chdir(tmp_path)
    out = Path(folder.name) / "engine"
    built = build_engine(EngineRequest(request.spec, Path(folder.name) / request.graph.name, 0), out)
    assert hashlib.sha256((folder / "engine").read_bytes()).hexdigest() == built.sha256


def with_float8(source: Path, out: Path, *, external: bool) -> None:
    """Copy a graph with the inputs of every `MatMul` rounded to float8."""
    # onnx reads no weights that have hard links, which other tests make of the session's bundle.
    plain = Path(shutil.copytree(source.parent, out.parent / "plain"))
    model = onnx.load(plain / source.name)
    shutil.rmtree(plain)
    model.graph.initializer.append(numpy_helper.from_array(np.array(1 / 16, np.float16), "scale"))
    nodes = []
    kind = {"output_dtype": TensorProto.FLOAT8E4M3FN, "precision": TensorProto.FLOAT}
    for node in model.graph.node:
        for index, name in enumerate(node.input if node.op_type == "MatMul" else ()):
            rounded = f"{node.output[0]}.{index}"
            nodes += [
                helper.make_node("QuantizeLinear", [name, "scale"], [f"{rounded}.q"], **kind),
                helper.make_node("DequantizeLinear", [f"{rounded}.q", "scale"], [rounded]),
            ]
            node.input[index] = rounded
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, out, save_as_external_data=external, location="weights.bin", size_threshold=64)


@pytest.mark.parametrize(
    ("network", "external", "capability"),
    [
        ("caption", True, "sm120"),
        ("stem", True, "sm89"),
        ("trunk", True, "sm89"),
        ("tail", False, "portable"),
        ("tail", True, "sm120"),
    ],
)
def test_a_float8_graph_is_compiled_where_there_is_arithmetic_for_it(
    workshop: Workshop, tmp_path: Path, network: str, external: bool, capability: str
) -> None:
    plain = workshop.request(network, capability=capability, dtypes=("float16", "float8_e4m3fn"))
    graph = tmp_path / f"{network}.onnx"
    with_float8(plain.graph, graph, external=external)
    assert (tmp_path / "weights.bin").exists() == external
    workshop.build(EngineRequest(plain.spec, graph, plain.weight_bytes))


def test_a_float8_graph_is_refused_where_there_is_none(workshop: Workshop, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"rtx1\.7-sm86 does not compute in FP8"):
        workshop.request("trunk", capability="sm86", dtypes=("float16", "float8_e4m3fn"))
    plain = workshop.request("trunk", capability="sm86")
    with_float8(plain.graph, tmp_path / "trunk.onnx", external=False)
    with pytest.raises(UsageError, match="computes in fp8_e4m3, which sm86 has no arithmetic for") as caught:
        build_engine(EngineRequest(plain.spec, tmp_path / "trunk.onnx", 0), workshop.folder / "engine")
    assert "FP8 needs sm89" in caught.value.hint
    assert list(workshop.folder.iterdir()) == []


def test_what_the_library_warns_of_is_listed(workshop: Workshop, tmp_path: Path) -> None:
    values = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in "xyz"}
    nodes = [helper.make_node("Relu", ["x"], ["z"])]
    graph = helper.make_graph(nodes, "toy", [values["x"], values["y"]], [values["z"]])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "toy.onnx")
    inputs = tuple(TensorSpec(name, "float32", ("n", 4)) for name in "xy")
    network = NetworkSpec("toy", inputs, (TensorSpec("z", "float32", ("n", 4)),))
    profile = EngineProfile(tuple(InputShapes(name, (1, 4), (8, 4), (64, 4)) for name in "xy"))
    spec = EngineSpec(network, "fp32", Target("rtx", library_version("rtx"), "sm89"), (profile,))
    built = workshop.build(EngineRequest(spec, tmp_path / "toy.onnx", 0))
    assert "Unused Input: y" in built.warnings
