"""Engines as stages: each is built once for its ONNX graph, target, shapes and settings, and read back."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TypeAlias

from l2p_engines.builders.builder import build_engine, build_memory_bytes
from l2p_engines.builders.readback import read_back
from l2p_engines.builders.request import BuildProgress, EngineBuilt, EngineRequest, EngineSpec
from l2p_engines.forecast.calls import ENGINE_KERNEL_BYTES
from l2p_engines.store.stages import Stage, StageOutput, StageRunner, find_stage, named_by_content, stage_key
from l2p_runtime.contract import EngineProfile, EngineRecord, FileRecord
from l2p_runtime.contract.codec import from_json

Meter: TypeAlias = Callable[[str], AbstractContextManager[Callable[[BuildProgress], None]]]
"""Title to a context that yields a function, which receives the progress of a build."""

_RECIPE = ("compiling.py", "trt.py", "readback.py")
"""The code that decides the content of an engine; when it changes, engines are built again."""


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """Facts of a finished engine, besides its file.

    Attributes:
        library_version: in full, `1.7.1.116`.
        profiles: as the library gave them back.
        warnings: of the library's log.
        seconds: duration of the build.
        peak_memory_bytes: maximum anonymous memory of its process.
        forecast_memory_bytes: the forecast of that.
    """

    library_version: str
    profiles: tuple[EngineProfile, ...]
    warnings: tuple[str, ...]
    seconds: float
    peak_memory_bytes: int
    forecast_memory_bytes: int


@dataclass(frozen=True, slots=True)
class GraphToBuild:
    """An ONNX graph and the engine to build from it.

    Attributes:
        library_version: of the installed library, in full.
        timings: kernel timings that TensorRT reads and writes; they decide how long a build takes, not what it is.
    """

    spec: EngineSpec
    graph: FileRecord
    weights: FileRecord
    library_version: str
    timings: Path | None = None

    @property
    def key(self) -> str:
        """Key of the engine's stage. It holds no plan or profile names: equal graphs and shapes share an engine."""
        return stage_key("engine", self.inputs)

    @property
    def inputs(self) -> dict[str, object]:
        """Everything that decides the content of the engine."""
        return {
            "graph": self.graph.sha256,
            "weights": self.weights.sha256,
            "target": self.spec.target,
            "library": self.library_version,
            "profiles": self.spec.profiles,
            "settings": self.spec.settings,
            "recipe": _recipe_digest(),
        }


def engine_stage(run: StageRunner, wanted: GraphToBuild, meter: Meter) -> Stage:
    """The engine of one ONNX graph as a stage; its one file is the engine, its facts are `EngineFacts`.

    Raises:
        ArtifactError: the graph is damaged, or another network's.
        UsageError: a profile, setting or dtype that the target cannot have.
        HostError: no library, no GPU where one is needed, too little disk or memory, or the library crashed.
        ParityError: the engine does not hold the graph's weights in the precision that it should.
    """
    spec = wanted.spec

    def make(work: Path) -> StageOutput:
        request = EngineRequest(spec, run.path(wanted.graph), wanted.weights.size_bytes, wanted.timings)
        with meter(f"engine `{spec.label}`") as progress:
            built = build_engine(request, work / "engine", progress)
            progress(BuildProgress(_summary(wanted, built), 0, 0, 0, 1.0))
        read_back(spec, wanted.weights.size_bytes, built.size_bytes)
        facts = EngineFacts(
            built.library_version,
            built.profiles,
            built.warnings,
            built.seconds,
            built.peak_memory_bytes,
            build_memory_bytes(wanted.weights.size_bytes),
        )
        path = named_by_content(work / "engine", f"{spec.label}.engine", built.sha256)
        return StageOutput("engines", ((path, built.sha256),), facts)

    return run("engine", spec.label, wanted.inputs, make)


def engine_record(wanted: GraphToBuild, stage: Stage) -> EngineRecord:
    """The record of a finished engine in a bundle."""
    facts, spec = engine_facts(stage), wanted.spec
    return EngineRecord(
        network=spec.network.name,
        plan=spec.plan,
        target=spec.target.spelling,
        library_version=facts.library_version,
        graph_sha256=wanted.graph.sha256,
        weights_sha256=wanted.weights.sha256,
        profiles=facts.profiles,
        engine=stage.files[0].path,
    )


def engine_facts(stage: Stage) -> EngineFacts:
    """The facts of a finished engine."""
    return from_json(EngineFacts, stage.facts)


def is_built(run: StageRunner, wanted: GraphToBuild) -> bool:
    """Whether the engine exists already."""
    return find_stage(run.home, wanted.key) is not None


def _summary(wanted: GraphToBuild, built: EngineBuilt) -> str:
    """Size and memory of an engine, each with its forecast."""
    forecast = wanted.weights.size_bytes + ENGINE_KERNEL_BYTES * len(wanted.spec.profiles)
    memory = build_memory_bytes(wanted.weights.size_bytes)
    return (
        f"{built.size_bytes / 1e6:,.1f} MB (forecast {forecast / 1e6:,.1f}), "
        f"{built.peak_memory_bytes / 1e6:,.0f} MB of memory (forecast {memory / 1e6:,.0f})"
    )


@functools.cache
def _recipe_digest() -> str:
    digest = hashlib.sha256()
    for name in _RECIPE:
        digest.update((resources.files("l2p_engines.builders") / name).read_bytes())
    return digest.hexdigest()[:16]
