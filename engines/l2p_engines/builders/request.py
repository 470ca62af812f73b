"""Request, progress and result of one engine build, as they pass between the worker process and its parent.

All of them are plain data, since they travel as JSON.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from l2p_engines.builders.targets import require_dtypes
from l2p_engines.builders.trt import EngineSettings, require_settings
from l2p_runtime.contract import EngineBackend, EngineProfile, NetworkSpec, Target
from l2p_runtime.errors import UsageError


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """Everything that decides an engine, except its ONNX graph and the exact version of the library.

    Attributes:
        network: inputs and outputs that the ONNX graph must have.
        plan: name of the precision plan.
        target: what the engine runs on.
        profiles: one optimization profile each.
        dtypes: dtypes that the ONNX graph computes in, as `float16`.
        settings: how the engine is built.
    """

    network: NetworkSpec
    plan: str
    target: Target
    profiles: tuple[EngineProfile, ...]
    dtypes: tuple[str, ...] = ()
    settings: EngineSettings = field(default_factory=EngineSettings)

    def __post_init__(self) -> None:
        require_dtypes(self.target, self.dtypes)
        require_settings(self.target.backend, self.settings)
        names = tuple(spec.name for spec in self.network.inputs)
        if not self.profiles:
            raise UsageError(f"an engine of `{self.network.name}` needs a profile")
        for profile in self.profiles:
            found = tuple(shapes.name for shapes in profile.inputs)
            if found != names:
                raise UsageError(
                    f"a profile has inputs {', '.join(found)}; `{self.network.name}` takes {', '.join(names)}"
                )
            # The libraries only warn of a shape that the graph cannot take, and build anyway.
            for at in ("min", "opt", "max"):
                self.network.sizes({shapes.name: getattr(shapes, at) for shapes in profile.inputs})

    @property
    def label(self) -> str:
        """Name for messages: `head.fp16.rtx1.7-sm89`."""
        return f"{self.network.name}.{self.plan}.{self.target.spelling}"


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One engine to build.

    Attributes:
        spec: network, plan, target, profiles and settings.
        graph: the `.onnx`; its weights lie in the same folder.
        weight_bytes: bytes of these weights.
        timings: kernel timings that TensorRT reads and writes; None without.
    """

    spec: EngineSpec
    graph: Path
    weight_bytes: int
    timings: Path | None = None

    def __post_init__(self) -> None:
        require_timings(self.spec.target.backend, self.timings)


def require_timings(backend: EngineBackend, timings: Path | None) -> None:
    """Refuse a timing cache where it has no meaning.

    Raises:
        UsageError: the backend times nothing.
    """
    if timings is not None and backend == "rtx":
        raise UsageError(
            "TensorRT for RTX times no kernels while it builds, and has no timing cache",
            hint="leave --timing-cache out, or build for a target of backend tensorrt",
        )


@dataclass(frozen=True, slots=True)
class BuildProgress:
    """Progress of a build.

    Attributes:
        phase: the library's name of the current phase; phases and their number differ between versions.
        depth: 0 for the outermost phase.
        step: steps of this phase that are done.
        steps: steps of this phase; 0 when unknown.
        fraction: of the whole, from 0 to 1, never falling; steps are not of equal length.
    """

    phase: str
    depth: int
    step: int
    steps: int
    fraction: float


@dataclass(frozen=True, slots=True)
class EngineBuilt:
    """A finished engine.

    Attributes:
        sha256: of the file, hashed while it was written.
        size_bytes: of the file.
        seconds: from the start of its process to its end.
        peak_memory_bytes: maximum anonymous memory of its process, without the weights that it maps.
        library_version: in full, `1.7.1.116`.
        profiles: as the library gave them back.
        warnings: the warnings of the library's log, each once.
    """

    sha256: str
    size_bytes: int
    seconds: float
    peak_memory_bytes: int
    library_version: str
    profiles: tuple[EngineProfile, ...]
    warnings: tuple[str, ...] = ()
