"""ONNX Runtime on the CPU: runs every graph of a bundle as it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2p_runtime.backends import Array, Backend
from l2p_runtime.backends.host import HostDevice
from l2p_runtime.errors import ArtifactError, HostError, InternalError, UnsupportedError

if TYPE_CHECKING:
    from l2p_runtime.contract import NetworkSpec

PRIORITY = 0
_PROVIDER = "CPUExecutionProvider"
PACKED_BYTES_MAX = 256 << 20
"""Weights up to this size are packed when a network is loaded, which makes its convolutions up to twice as fast."""

_REBUILD = "build the bundle again"


def open_device(device: int) -> Backend:
    """Open the CPU; the device number has no meaning here.

    Raises:
        HostError: ONNX Runtime is not installed.
    """
    del device
    try:
        import onnxruntime
    except ImportError as error:
        raise HostError(f"ONNX Runtime cannot be imported: {error}", hint="pip install 'l2p-export[cpu]'") from error
    return Backend("onnx", f"onnxruntime {onnxruntime.__version__}", HostDevice(), OnnxEngine)


class OnnxEngine:
    """One graph in one ONNX Runtime session; implements `Engine`."""

    def __init__(self, graph: Path, weights: Path, spec: NetworkSpec) -> None:
        """Load a graph and the weights that it points into.

        Raises:
            ArtifactError: ONNX Runtime refuses the file, or its inputs and outputs are not the spec's.
            HostError: ONNX Runtime would run it elsewhere than on the CPU.
        """
        import onnxruntime as ort

        self._weight_bytes = weights.stat().st_size
        options = ort.SessionOptions()
        options.log_severity_level = 3
        # The arena grows by powers of two and keeps what it took: 4.9 GiB where the head needs 2.8 at 4096 px, and a
        # memory budget of 2 GiB became 3.3. Without it, page faults cost up to a second per 4 Mpx on two cores.
        options.enable_cpu_mem_arena = False
        # ONNX Runtime's own rewriting of Q/DQ pairs breaks float8 graphs; others have none.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        keywords: dict[str, Any] = {}
        if self._weight_bytes > PACKED_BYTES_MAX:
            # Large weights stay in their file, mapped: packing, folding and planning ahead each make copies of them.
            # One session of 1.4 GB in float16 took 4.3 GB and 20 s to open; so it takes 0.2 GB and opens at once.
            options.add_session_config_entry("session.disable_prepacking", "1")
            options.enable_mem_pattern = False
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
            # In this order a weight that has to be widened to float32 is widened just before it is used.
            options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
            keywords["disabled_optimizers"] = ["ConstantFolding"]
        try:
            self._session = ort.InferenceSession(str(graph), options, providers=[_PROVIDER], **keywords)
        except Exception as error:
            if "NOT_IMPLEMENTED" in str(error) or "Could not find an implementation" in str(error):
                raise UnsupportedError(
                    f"ONNX Runtime has no way to run `{graph.name}` on the CPU",
                    hint="bfloat16 graphs need a GPU; on the CPU, use another --plan",
                ) from error
            raise ArtifactError(f"ONNX Runtime refuses `{graph.name}`: {error}", hint=_REBUILD) from error
        if self._session.get_providers() != [_PROVIDER]:
            raise HostError(f"ONNX Runtime chose {self._session.get_providers()}, expected {_PROVIDER}")
        for found, wanted in (
            ({value.name for value in self._session.get_inputs()}, {value.name for value in spec.inputs}),
            ({value.name for value in self._session.get_outputs()}, {value.name for value in spec.outputs}),
        ):
            if found != wanted:
                raise ArtifactError(f"`{graph.name}` has {sorted(found)}, the manifest says {sorted(wanted)}")
        self.spec = spec

    def run(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """Run on contiguous host arrays, writing straight into `outputs`.

        Raises:
            HostError: out of memory.
            ArtifactError: the graph does not take these inputs.
        """
        binding = self._session.io_binding()
        for tensor in self.spec.inputs:
            binding.bind_input(tensor.name, *_place(inputs[tensor.name]))
        for tensor in self.spec.outputs:
            binding.bind_output(tensor.name, *_place(outputs[tensor.name]))
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            if "alloc" in str(error):
                raise HostError(f"out of memory in `{self.spec.name}`: {error}", hint="set a memory budget") from error
            raise ArtifactError(f"ONNX Runtime fails in `{self.spec.name}`: {error}", hint=_REBUILD) from error

    def memory_bytes(self) -> int:
        """Bytes of the weights file; none when they are mapped, since their pages belong to the system."""
        return 0 if self._weight_bytes > PACKED_BYTES_MAX else self._weight_bytes

    def close(self) -> None:
        """Drop the session."""
        self._session = None


def _place(array: Any) -> tuple[str, int, Any, tuple[int, ...], int]:
    """What ONNX Runtime wants to know of a buffer: device, index, dtype, shape, address."""
    if not array.flags.c_contiguous:
        raise InternalError(f"a buffer of shape {array.shape} is not contiguous")
    return "cpu", 0, array.dtype, array.shape, array.ctypes.data
