"""The build half of TensorRT 11, and of TensorRT for RTX, with no GPU: what a build asks for is recorded.

`FakeBuilds` stands in for the modules `tensorrt` and `tensorrt_rtx`. Every graph parses to the network that it was
made with, and every engine is the same few bytes. Answers are those of the real libraries, and so are failures, which a
test asks for by name: None, -1 or False, and a line in the log. What would crash there fails here: a logger or writer
whose base was not initialized, or one that was dropped.
"""

from __future__ import annotations

import enum
import weakref
from dataclasses import dataclass, field
from typing import Any

from fakes.tensorrt_types import DataType, ILogger, Listener, Severity
from l2p_runtime.contract import NetworkSpec, TensorSpec, split_dim

CHUNKS = (b"an engine", b" of ", b"several writes" * 100)
Shape = tuple[int, ...]


class BuilderFlag(enum.Enum):
    TF32 = 7
    VERSION_COMPATIBLE = 13
    WEIGHT_STREAMING = 17


class ProfilingVerbosity(enum.Enum):
    LAYER_NAMES_ONLY = 0
    NONE = 1
    DETAILED = 2


class MemoryPoolType(enum.Enum):
    WORKSPACE = 0


class HardwareCompatibilityLevel(enum.Enum):
    NONE = 0
    AMPERE_PLUS = 1


class ComputeCapability(enum.Enum):
    SM89 = 89
    SM120 = 120


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1


class IProgressMonitor(Listener):
    def phase_start(self, name: str, parent: str | None, steps: int) -> None:
        raise NotImplementedError

    def step_complete(self, name: str, step: int) -> bool:
        raise NotImplementedError

    def phase_finish(self, name: str) -> None:
        raise NotImplementedError


class IStreamWriter(Listener):
    def write(self, data: bytes) -> int:
        raise NotImplementedError


@dataclass
class Tensor:
    """An input or output of a parsed graph."""

    name: str
    dtype: Any
    shape: Shape


@dataclass
class ParserError:
    """One of a parser's errors."""

    text: str
    node: str = ""

    def desc(self) -> str:
        return self.text

    def node_name(self) -> str:
        return self.node

    def node_operator(self) -> str:
        return "Add"


@dataclass
class Config:
    """`IBuilderConfig`: what a build sets, beside the libraries' own defaults."""

    library: FakeBuilds
    flags: set[BuilderFlag] = field(default_factory=lambda: {BuilderFlag.TF32})
    pools: dict[MemoryPoolType, int] = field(default_factory=dict)
    profiles: list[OptimizationProfile] = field(default_factory=list)
    capabilities: dict[int, ComputeCapability] = field(default_factory=dict)
    num_compute_capabilities: int = 0
    builder_optimization_level: int = 3
    hardware_compatibility_level: HardwareCompatibilityLevel = HardwareCompatibilityLevel.NONE
    profiling_verbosity: ProfilingVerbosity = ProfilingVerbosity.LAYER_NAMES_ONLY
    progress_monitor: Any = None
    timings: Any = None

    def set_flag(self, flag: BuilderFlag) -> None:
        self.flags.add(flag)

    def clear_flag(self, flag: BuilderFlag) -> None:
        self.flags.discard(flag)

    def set_memory_pool_limit(self, pool: MemoryPoolType, size: int) -> None:
        self.pools[pool] = size

    def get_memory_pool_limit(self, pool: MemoryPoolType) -> Any:
        return self.library.answer("get_memory_pool_limit", self.pools[pool])

    def set_compute_capability(self, capability: ComputeCapability, index: int) -> Any:
        self.capabilities[index] = capability
        return self.library.answer("set_compute_capability", index < self.num_compute_capabilities)

    def create_timing_cache(self, data: bytes) -> Any:
        return self.library.answer("create_timing_cache", TimingCache(bytes(data)))

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> Any:
        assert not ignore_mismatch
        if cache.data.startswith(b"another GPU"):
            return False
        self.timings = cache
        return True

    def get_timing_cache(self) -> Any:
        return self.timings

    def add_optimization_profile(self, profile: OptimizationProfile) -> Any:
        self.profiles.append(profile)
        return self.library.answer("add_optimization_profile", len(self.profiles) - 1)


@dataclass
class TimingCache:
    data: bytes

    def serialize(self) -> bytes:
        return self.data + b"+timed"


@dataclass
class OptimizationProfile:
    """`IOptimizationProfile`."""

    library: FakeBuilds
    shapes: dict[str, list[Shape]] = field(default_factory=dict)

    def set_shape(self, name: str, min: Shape, opt: Shape, max: Shape) -> None:  # noqa: A002 - NVIDIA's names
        self.shapes[name] = [min, opt, max]

    def get_shape(self, name: str) -> Any:
        tensor = next(tensor for tensor in self.library.inputs if tensor.name == name)
        return self.library.answer("get_shape", self.shapes[name] if -1 in tensor.shape else [])


class Network:
    """`INetworkDefinition`: empty until a graph was parsed into it."""

    def __init__(self, library: FakeBuilds) -> None:
        self.library = library
        self.parser: weakref.ref[Parser] | None = None

    @property
    def num_inputs(self) -> int:
        return len(self.library.inputs) if self.parser else 0

    @property
    def num_outputs(self) -> int:
        return len(self.library.outputs) if self.parser else 0

    def get_input(self, index: int) -> Tensor:
        return self.library.inputs[index]

    def get_output(self, index: int) -> Tensor:
        return self.library.outputs[index]


class Parser:
    """`OnnxParser`, whose memory the network's weights are."""

    def __init__(self, library: FakeBuilds, network: Network) -> None:
        self.library, self.network = library, network
        self.errors: list[ParserError] = []

    @property
    def num_errors(self) -> int:
        return len(self.errors)

    def get_error(self, index: int) -> ParserError:
        return self.errors[index]

    def parse_from_file(self, path: str) -> Any:
        self.library.graphs.append(path)
        self.errors = list(self.library.parser_errors)
        self.network.parser = weakref.ref(self)
        return self.library.answer("parse_from_file", not self.errors)


class Builder:
    """`Builder`."""

    def __init__(self, library: FakeBuilds) -> None:
        self.library = library

    def create_network(self, flags: int) -> Any:
        assert flags == 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED
        return self.library.answer("create_network", Network(self.library))

    def create_builder_config(self) -> Any:
        self.library.config = Config(self.library)
        return self.library.answer("create_builder_config", self.library.config)

    def create_optimization_profile(self) -> Any:
        return self.library.answer("create_optimization_profile", OptimizationProfile(self.library))

    def build_serialized_network_to_stream(self, network: Network, config: Config, writer: Any) -> Any:
        assert writer.ready
        assert network.parser is not None
        assert network.parser() is not None, "the parser was dropped, and the network's weights with it"
        monitor = config.progress_monitor
        assert monitor.ready
        monitor.phase_start("Building engine", None, 2)
        monitor.phase_start("Computing profile costs", "Building engine", 4)
        for step in range(4):
            assert monitor.step_complete("Computing profile costs", step)
        monitor.phase_finish("Computing profile costs")
        assert monitor.step_complete("Building engine", 0)
        monitor.phase_finish("Building engine")
        answer = self.library.answer("build_serialized_network_to_stream", True)
        for chunk in self.library.chunks if answer else ():
            # The real ones go on as well, whatever a write answers.
            self.library.written.append(writer.write(chunk))
        return answer


class FakeBuilds:
    """A library.

    Attributes:
        calls: the functions that were called and may fail, in order.
        graphs: what was parsed.
        written: what each write answered.
        config: of the last build.
        inputs, outputs: of every graph.
        parser_errors: what a parser finds.
        warnings: what a parser warns of.
        chunks: what is written of an engine.
    """

    ILogger: Any = ILogger
    IProgressMonitor: Any = IProgressMonitor
    IStreamWriter: Any = IStreamWriter
    DataType = DataType
    BuilderFlag = BuilderFlag
    ProfilingVerbosity = ProfilingVerbosity
    MemoryPoolType = MemoryPoolType
    HardwareCompatibilityLevel = HardwareCompatibilityLevel
    ComputeCapability = ComputeCapability
    NetworkDefinitionCreationFlag = NetworkDefinitionCreationFlag

    def __init__(self, network: NetworkSpec, version: str = "11.4.0.106") -> None:
        self.__version__ = version
        self.inputs, self.outputs = ([_tensor(spec) for spec in part] for part in (network.inputs, network.outputs))
        self.calls: list[str] = []
        self.graphs: list[str] = []
        self.written: list[int] = []
        self.config: Config | None = None
        self.parser_errors: list[ParserError] = []
        self.chunks: tuple[bytes, ...] = CHUNKS
        self._logger: Any = lambda: None
        self._failures: dict[str, tuple[Any, tuple[tuple[Severity, str], ...]]] = {}

    def fail(self, call: str, answer: Any, *says: str, severity: Severity = Severity.ERROR) -> None:
        """Have a call log some lines and give an answer that is not its own."""
        self._failures[call] = answer, tuple((severity, line) for line in says)

    def Builder(self, logger: Any) -> Any:  # noqa: N802 - NVIDIA's names
        assert logger.ready
        self._logger = weakref.ref(logger)
        return self.answer("Builder", Builder(self))

    def OnnxParser(self, network: Network, logger: Any) -> Any:  # noqa: N802
        assert logger is self._logger()
        return self.answer("OnnxParser", Parser(self, network))

    def answer(self, call: str, own: Any) -> Any:
        """Count a call; its own answer, or the one that a test asked for."""
        self.calls.append(call)
        answer, says = self._failures.get(call, (own, ()))
        for severity, line in says:
            logger = self._logger()
            assert logger is not None, "the logger was dropped while its library is used"
            logger.log(severity, line)
        return answer


def _tensor(spec: TensorSpec) -> Tensor:
    dtype = {"float32": DataType.FLOAT, "float16": DataType.HALF, "bool": DataType.BOOL, "int64": DataType.INT64}
    shape = tuple(-1 if symbol else factor for factor, symbol in map(split_dim, spec.shape))
    return Tensor(spec.name, dtype[spec.dtype], shape)
