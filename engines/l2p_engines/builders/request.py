"""What a build of one engine is asked for, tells and gives: all that passes between its process and the one it serves.

All of it is plain data, since it travels as JSON.
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
    """All that decides an engine but its graph and the exact version of the library.

    Attributes:
        network: inputs and outputs that the graph must have.
        plan: name of the precision plan.
        target: what it is to run on.
        profiles: one optimization profile each.
        dtypes: what the graph computes in, as `float16`.
        settings: how it is built.
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
            # The libraries only warn of a shape that the graph cannot take, and build all the same.
            for at in ("min", "opt", "max"):
                self.network.sizes({shapes.name: getattr(shapes, at) for shapes in profile.inputs})

    @property
    def label(self) -> str:
        """What people call it: `head.fp16.rtx1.7-sm89`."""
        return f"{self.network.name}.{self.plan}.{self.target.spelling}"


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One engine to be built.

    Attributes:
        spec: what decides it.
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
    """Where a build stands.

    Attributes:
        phase: what the library calls what it is doing; phases and their number differ between versions.
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
        peak_memory_bytes: most anonymous memory that its process held; weights that it maps are not among it.
        library_version: in full, `1.7.1.116`.
        profiles: as the library gave them back.
        warnings: what the library's log warned of, each once.
    """

    sha256: str
    size_bytes: int
    seconds: float
    peak_memory_bytes: int
    library_version: str
    profiles: tuple[EngineProfile, ...]
    warnings: tuple[str, ...] = ()
