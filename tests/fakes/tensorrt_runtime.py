"""The runtime half of TensorRT and TensorRT for RTX over host memory, so that engines can be run without a GPU.

`FakeLibrary` stands in for the modules `tensorrt_rtx` and `tensorrt`. Its engine files are small JSON that names an
ONNX graph and optimization profiles; a launch runs that graph with ONNX Runtime on the CPU, at the addresses that it
was given, which are host addresses with `fakes.cuda`. Answers are those of the real libraries: None, False or 0 and a
line in the log. What would crash or corrupt memory there fails here: no current context, no or too little device
memory, shapes outside of the profile, memory that is not allocated or not aligned.
"""

from __future__ import annotations

import ctypes
import enum
import json
import math
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from fakes.cuda import CUresult, FakeDriver
from fakes.tensorrt_types import DataType, ILogger, Severity
from l2p_runtime.contract import EngineProfile, EngineRecord, InputShapes, NetworkSpec, Range, split_dim

RTX_VERSION = "1.7.1.116"
WEIGHT_BYTES = 4096
_ALIGNMENT = 256
_SCRIBBLE = 0xA5
_OK = CUresult.CUDA_SUCCESS
_TYPES = {"tensor(float)": "FLOAT", "tensor(float16)": "HALF", "tensor(int64)": "INT64", "tensor(bool)": "BOOL"}
_NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64, "BOOL": np.bool_}


class TensorIOMode(enum.Enum):
    NONE = 0
    INPUT = 1
    OUTPUT = 2


class TensorLocation(enum.Enum):
    DEVICE = 0
    HOST = 1


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC = 0
    ON_PROFILE_CHANGE = 1
    USER_MANAGED = 2


class EngineStat(enum.Enum):
    TOTAL_WEIGHTS_SIZE = 0
    STRIPPED_WEIGHTS_SIZE = 1


class LayerInformationFormat(enum.Enum):
    ONELINE = 0
    JSON = 1


class FakeLibrary:
    """A library on the GPU of a fake driver.

    Attributes:
        calls: how often each function was called.
        profiles: optimization profiles that contexts switched to, in order.
        ran: names of the graphs that ran.
        alive: engines and contexts that exist now.
    """

    ILogger: Any = ILogger
    DataType = DataType
    TensorIOMode = TensorIOMode
    TensorLocation = TensorLocation
    ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy
    EngineStat = EngineStat
    LayerInformationFormat = LayerInformationFormat

    def __init__(self, driver: FakeDriver, version: str = RTX_VERSION) -> None:
        self.__version__ = version
        self.driver = driver
        self.calls: Counter[str] = Counter()
        self.profiles: list[int] = []
        self.ran: list[str] = []
        self.alive: Counter[str] = Counter()
        self._failures: dict[str, tuple[Any, str]] = {}

    def fail(self, call: str, answer: Any, says: str = "Error Code 1: it was made to fail") -> None:
        """Have a call give an answer and log a line instead of doing anything; an exception as answer is raised."""
        self._failures[call] = answer, says

    def heal(self) -> None:
        """Undo `fail`."""
        self._failures.clear()

    def Runtime(self, logger: Any) -> Any:  # noqa: N802 - NVIDIA's name
        assert logger.ready
        # Without a driver the real one returns an object, and the process crashes at its end.
        assert self.driver.retained, "a Runtime is made before the device was opened"
        # Nor does the real one keep its logger alive.
        self._logger = weakref.ref(logger)
        failed, answer = self.failing("Runtime")
        return answer if failed else Runtime(self)

    def failing(self, call: str) -> tuple[bool, Any]:
        """Count a call; whether it was made to fail, and what it answers then."""
        self.calls[call] += 1
        if call not in self._failures:
            return False, None
        answer, says = self._failures[call]
        if says:
            self.say(says)
        if isinstance(answer, BaseException):
            raise answer
        return True, answer

    def say(self, text: str, severity: Severity = Severity.ERROR) -> None:
        logger = self._logger()
        assert logger is not None, "the logger was dropped while its library is used"
        logger.log(severity, text)

    def refuse(self, answer: Any, text: str) -> Any:
        """Log why, and answer."""
        self.say(f"Error Code 3: API Usage Error ({text})")
        return answer

    def allocated(self, *ranges: tuple[int, int]) -> bool:
        """Whether ranges of address and size lie in memory of the device."""
        stream = next(iter(self.driver.streams))
        return self.driver._refusal(stream, *ranges) is _OK


class Runtime:
    def __init__(self, library: FakeLibrary) -> None:
        self.library = library

    def deserialize_cuda_engine(self, serialized: Any) -> Any:
        library, driver = self.library, self.library.driver
        failed, answer = library.failing("deserialize_cuda_engine")
        if failed:
            return answer
        library.say("Loaded engine size: 0 MiB", Severity.INFO)
        try:
            facts = json.loads(bytes(serialized))
        except ValueError:
            text = "header.magicTag == kEXPECTED_MAGIC_TAG failed. Trying to load an engine created with incompatible"
            return library.refuse(None, f"Serialization assertion {text} serialization version")
        capability = f"sm{driver.cuDeviceGetAttribute(75, 0)[1]}{driver.cuDeviceGetAttribute(76, 0)[1]}"
        if facts["version"] != library.__version__ or facts["capability"] not in (capability, "portable"):
            return library.refuse(None, "The engine plan file is not compatible with this version or device")
        stream = next(iter(driver.streams))
        status, address = driver.cuMemAllocAsync(facts["weight_bytes"], stream)
        if status is not _OK:
            return library.refuse(None, f"Cuda Runtime ({status.name.removeprefix('CUDA_ERROR_')})")
        return Engine(self, facts, address, stream)


class Engine:
    """`ICudaEngine`; gives its weights back when nothing refers to it."""

    def __init__(self, runtime: Runtime, facts: Mapping[str, Any], address: int, stream: int) -> None:
        self.library = runtime.library
        # As the real bindings do: an engine keeps its runtime alive, a context its engine.
        self.runtime = runtime
        self.facts = facts
        self.session = ort.InferenceSession(facts["graph"], providers=["CPUExecutionProvider"])
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = {value.name: value for value in self.session.get_outputs()}
        self.tensors: dict[str, Any] = {**self.inputs, **self.outputs}
        self.profiles: list[dict[str, list[list[int]]]] = facts["profiles"]
        self.num_io_tensors = len(self.tensors)
        self.num_optimization_profiles = len(self.profiles)
        self.streamable_weights_size = int(facts.get("streamable_bytes", 0))
        self.weight_streaming_budget_v2 = self.streamable_weights_size
        self.library.alive["engines"] += 1
        weakref.finalize(self, _drop_engine, self.library, address, stream)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[_TYPES[self.tensors[name].type]]

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation[self.facts.get("locations", {}).get(name, "DEVICE")]

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> Any:
        failed, answer = self.library.failing("get_device_memory_size_for_profile_v2")
        if failed:
            return answer
        return self.scratch_bytes({name: shapes[2] for name, shapes in self.profiles[profile_index].items()})

    def get_engine_stat(self, stat: EngineStat) -> Any:
        failed, answer = self.library.failing("get_engine_stat")
        return answer if failed else self.facts["weight_bytes"]

    def get_weight_streaming_automatic_budget(self) -> int:
        assert not self.library.alive["contexts"], "too late: a context is there"
        return int(self.facts["streaming_budget_bytes"])

    def create_execution_context(self, strategy: ExecutionContextAllocationStrategy) -> Any:
        failed, answer = self.library.failing("create_execution_context")
        return answer if failed else Context(self, strategy)

    def create_engine_inspector(self) -> Any:
        failed, answer = self.library.failing("create_engine_inspector")
        return answer if failed else Inspector(self)

    def output_shapes(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
        """Shapes of the outputs, from the symbols in the graph."""
        sizes: dict[str, int] = {}
        for name, value in self.inputs.items():
            for dim, size in zip(value.shape, shapes[name], strict=True):
                factor, symbol = split_dim(dim)
                sizes[symbol] = size // factor
        return {
            name: tuple(factor * sizes.get(symbol, 1) for factor, symbol in map(split_dim, value.shape))
            for name, value in self.outputs.items()
        }

    def scratch_bytes(self, shapes: Mapping[str, Sequence[int]]) -> int:
        """Activations that these shapes take: a made-up multiple of what goes in and out."""
        if self.facts["needs_no_scratch"]:
            return 0
        volumes = map(math.prod, [*shapes.values(), *self.output_shapes(shapes).values()])
        return -(-sum(volumes) * 12 // _ALIGNMENT) * _ALIGNMENT


class Context:
    """`IExecutionContext`."""

    def __init__(self, engine: Engine, strategy: ExecutionContextAllocationStrategy) -> None:
        self.engine = engine
        self.library = engine.library
        self.strategy = strategy
        self.active_optimization_profile = 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.memory: tuple[int, int] | None = None
        self.asked = False
        self.library.alive["contexts"] += 1
        weakref.finalize(self, _drop_context, self.library)

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> Any:
        failed, answer = self.library.failing("set_optimization_profile_async")
        if failed:
            return answer
        if not 0 <= profile_index < self.engine.num_optimization_profiles:
            return self.library.refuse(False, f"there is no profile {profile_index}")
        if stream_handle not in self.library.driver.streams:
            return self.library.refuse(False, "no such stream")
        self.library.profiles.append(profile_index)
        self.active_optimization_profile = profile_index
        self.shapes, self.memory, self.asked = {}, None, False
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> Any:
        assert type(shape) in (tuple, list)
        failed, answer = self.library.failing("set_input_shape")
        if failed:
            return answer
        ranges = self.engine.profiles[self.active_optimization_profile].get(name)
        if ranges is None or len(shape) != len(ranges[0]):
            return self.library.refuse(False, f"no input {name} of {len(shape)} dimensions")
        low, _, high = ranges
        if not all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True)):
            text = f"{name}: {list(shape)} is not within profile {self.active_optimization_profile}"
            return self.library.refuse(False, text)
        self.shapes[name] = tuple(shape)
        self.asked = False
        return True

    def get_tensor_shape(self, name: str) -> Any:
        failed, answer = self.library.failing("get_tensor_shape")
        if failed:
            return answer
        if self.shapes.keys() != self.engine.inputs.keys():
            return (-1,) * len(self.engine.tensors[name].shape)
        return {**self.shapes, **self.engine.output_shapes(self.shapes)}[name]

    def update_device_memory_size_for_shapes(self) -> Any:
        failed, answer = self.library.failing("update_device_memory_size_for_shapes")
        self.asked = True
        if failed:
            return answer
        if self.shapes.keys() != self.engine.inputs.keys():
            return self.library.refuse(0, "not all input shapes are set")
        return self.engine.scratch_bytes(self.shapes)

    def set_device_memory(self, memory: int, size: int) -> None:
        failed, _ = self.library.failing("set_device_memory")
        if failed:
            return
        if not memory or memory % _ALIGNMENT or size < self.engine.scratch_bytes(self.shapes):
            self.library.refuse(None, f"setDeviceMemoryV2: {size} bytes at {memory:#x} will not do")
            return
        self.memory = memory, size

    def set_tensor_address(self, name: str, memory: int) -> Any:
        failed, answer = self.library.failing("set_tensor_address")
        if failed:
            return answer
        if name not in self.engine.tensors or memory % _ALIGNMENT:
            return self.library.refuse(False, f"{name} at {memory:#x}")
        self.addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> Any:
        failed, answer = self.library.failing("execute_async_v3")
        if failed:
            return answer
        reason = self._refusal(stream_handle)
        if reason:
            return self.library.refuse(False, f"enqueueV3: {reason}")
        if self.memory is not None:
            ctypes.memset(self.memory[0], _SCRIBBLE, self.memory[1])
        inputs = {name: self._view(name) for name in self.engine.inputs}
        try:
            made = self.engine.session.run(list(self.engine.outputs), inputs)
        except Exception as error:  # noqa: BLE001 - whatever it is, it goes to the log
            return self.library.refuse(False, f"enqueueV3: {error}")
        for name, values in zip(self.engine.outputs, made, strict=True):
            self._view(name)[...] = values
        self.library.ran.append(Path(self.engine.facts["graph"]).name)
        return True

    def _refusal(self, stream: int) -> str:
        if stream not in self.library.driver.streams or not self.library.driver.current:
            return "no such stream, or no context is current"
        if self.shapes.keys() != self.engine.inputs.keys() or self.addresses.keys() != self.engine.tensors.keys():
            return "not all shapes and addresses are set"
        needed = self.engine.scratch_bytes(self.shapes)
        if self.strategy is ExecutionContextAllocationStrategy.USER_MANAGED and needed:
            if self.memory is None or not (self.asked or not hasattr(self, "update_device_memory_size_for_shapes")):
                return "noDeviceMemory"
            if self.memory[1] < needed or not self.library.allocated(self.memory):
                return f"{needed} bytes of device memory are needed, {self.memory} is there"
        ranges = [(address, self._bytes(name)) for name, address in self.addresses.items()]
        return "" if self.library.allocated(*ranges) else "illegal address"

    def _bytes(self, name: str) -> int:
        itemsize = np.dtype(_NUMPY[_TYPES[self.engine.tensors[name].type]]).itemsize
        return int(math.prod(self.get_tensor_shape(name)) * itemsize)

    def _view(self, name: str) -> Any:
        buffer = (ctypes.c_uint8 * self._bytes(name)).from_address(self.addresses[name])
        dtype = _NUMPY[_TYPES[self.engine.tensors[name].type]]
        return np.ctypeslib.as_array(buffer).view(dtype).reshape(self.get_tensor_shape(name))


class Inspector:
    """`EngineInspector`: with detail where the engine was built with it, else names alone.

    An engine whose facts have `layers` tells one layer for each: a list of what it says of its outputs.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def get_engine_information(self, format: LayerInformationFormat) -> str:  # noqa: A002 - NVIDIA's name
        assert format is LayerInformationFormat.JSON
        outputs = [{"Name": name, "Format/Datatype": "Row major linear FP32 format"} for name in self.engine.outputs]
        layer = {"Name": "all", "LayerType": "kgen", "Inputs": [], "Outputs": outputs}
        layers = [
            {"Name": f"layer {index}", "LayerType": "gemm", "Outputs": [{"Format/Datatype": told} for told in dtypes]}
            for index, dtypes in enumerate(self.engine.facts.get("layers", ()))
        ]
        return json.dumps({"Layers": (layers or [layer]) if self.engine.facts["detailed"] else ["all"], "Bindings": []})


def write_engine(
    path: Path,
    graph: Path,
    profiles: Sequence[EngineProfile],
    *,
    network: str,
    plan: str = "fp32",
    target: str = "rtx1.7-sm89",
    version: str = RTX_VERSION,
    **facts: Any,
) -> EngineRecord:
    """Write a fake engine of a graph and say what a bundle's manifest would; `facts` go into the file as they are."""
    content = {
        "graph": str(graph.resolve()),
        "version": version,
        "capability": target.rpartition("-")[2],
        "profiles": [{part.name: [part.min, part.opt, part.max] for part in profile.inputs} for profile in profiles],
        "weight_bytes": WEIGHT_BYTES,
        "needs_no_scratch": False,
        "detailed": True,
        **facts,
    }
    path.write_text(json.dumps(content))
    return EngineRecord(network, plan, target, version, "0" * 64, "0" * 64, tuple(profiles), f"engines/{path.name}")


def profile_of(spec: NetworkSpec, **ranges: tuple[int, int, int]) -> EngineProfile:
    """The optimization profile of a network from the range of each of its symbols."""
    spans = {symbol: Range(*ranges[symbol]) for symbol in spec.symbols()}
    low, mid, high = ({symbol: getattr(span, at) for symbol, span in spans.items()} for at in ("min", "opt", "max"))
    return EngineProfile(tuple(InputShapes(spec.name, *map(spec.resolve, (low, mid, high))) for spec in spec.inputs))


def _drop_engine(library: FakeLibrary, address: int, stream: int) -> None:
    library.alive["engines"] -= 1
    library.driver.cuMemFreeAsync(address, stream)


def _drop_context(library: FakeLibrary) -> None:
    library.alive["contexts"] -= 1
