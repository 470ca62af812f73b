"""ONNX Runtime on the CPU: runs every ONNX graph of a bundle unchanged. Shares code with its CUDA backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from l2p_runtime.backends import Array, Backend, require_arrays
from l2p_runtime.backends.host import HostDevice
from l2p_runtime.backends.host_kernels import threads_asked
from l2p_runtime.backends.onnx_memory import release_memory, use_native_allocator
from l2p_runtime.errors import ArtifactError, HostError, InternalError, L2PError, UnsupportedError
from l2p_runtime.onnx_library import ERRORS_ONLY, import_onnxruntime

if TYPE_CHECKING:
    from l2p_runtime.contract import NetworkSpec

PRIORITY = 0
_PROVIDER = "CPUExecutionProvider"
PACKED_BYTES_MAX = 256 << 20
"""Weights up to this size are packed when a network is loaded, which makes its convolutions up to twice as fast."""

# Measured with version 1.31: the library and its threads take 20 MiB after a few sessions, freed tensors below 1 MiB up
# to 5, a session 1 to 4 beside its weights.
LIBRARY_BYTES = 26 << 20
_SESSION_BYTES = 4 << 20
_WIDENED = 3
"""Weights in 16 or 8 bits are folded and packed in float32 too."""

Place: TypeAlias = tuple[str, int, Any, tuple[int, ...], int]
"""What ONNX Runtime wants to know of an array: device, index, dtype, shape, address."""

_REBUILD = "build the bundle again"


def open_device(device: int) -> Backend:
    """Open the CPU; the device number has no meaning here.

    Raises:
        HostError: ONNX Runtime is not installed.
    """
    del device
    onnxruntime = import_onnxruntime()
    return Backend(
        name="onnx",
        identity=f"onnxruntime {onnxruntime.__version__}",
        device=HostDevice(),
        load=OnnxEngine,
        runs_fused=True,
        library_bytes=LIBRARY_BYTES,
        held_bytes=held_bytes,
        release_memory=release_memory,
    )


def held_bytes(weight_bytes: int, is_float32: bool) -> int:
    """Bytes that a network takes while it is loaded: its weights as they are packed, and its session.

    Measured on the demo's networks, of 0.3 to 11 MiB, in every plan; mapped weights take only their own.
    """
    if weight_bytes > PACKED_BYTES_MAX:
        return weight_bytes + _SESSION_BYTES
    return weight_bytes * (1 if is_float32 else _WIDENED) + _SESSION_BYTES


class OnnxEngine:
    """One ONNX graph in one ONNX Runtime session; implements `Engine`."""

    def __init__(self, graph: Path, weights: Path, spec: NetworkSpec) -> None:
        """Load an ONNX graph and the weights that it points into.

        Raises:
            ArtifactError: ONNX Runtime refuses the file, or its inputs and outputs are not the spec's.
            HostError: ONNX Runtime would run it elsewhere than on the CPU.
        """
        ort = import_onnxruntime()
        self._weight_bytes = weights.stat().st_size
        options = make_options(ort)
        # The arena grows by powers of two and keeps what it took: 4.9 GiB where the head needs 2.8 at 4096 px, and a
        # memory budget of 2 GiB became 3.3. The native allocator keeps no more than was in use at once.
        options.enable_cpu_mem_arena = False
        use_native_allocator(options)
        # A buffer that waits for another of its size is not freed: the trunk took 271 MiB at 16,416 tokens, and 106 so.
        options.enable_mem_reuse = False
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
        advice = "bfloat16 graphs need a GPU; on the CPU, use another --plan"
        self._session = GraphSession(graph, spec, options, {_PROVIDER: {}}, advice, **keywords)
        # Weights as they were before they were packed.
        release_memory()
        self.spec = spec

    def run(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """Run on contiguous host arrays, writing straight into `outputs`.

        Raises:
            UsageError: inputs of shapes that the network does not take.
            HostError: out of memory.
            ArtifactError: the graph does not take these inputs.
            InternalError: an array of another dtype or layout, or the engine is closed.
        """
        self._session.run(inputs, outputs, _place)

    def memory_bytes(self) -> int:
        """Bytes of the weights file; none when they are mapped, since their pages belong to the system."""
        return 0 if self._weight_bytes > PACKED_BYTES_MAX else self._weight_bytes

    def close(self) -> None:
        """Drop the session; a second time does nothing."""
        self._session.close()
        release_memory()


def make_options(ort: Any) -> Any:
    """Session options that every ONNX graph of a bundle needs."""
    options = ort.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    # ONNX Runtime's own rewriting of Q/DQ pairs breaks float8 graphs; others have none.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.intra_op_num_threads = threads_asked()
    return options


class GraphSession:
    """One ONNX graph in one session of ONNX Runtime, for the engines on the CPU and on a GPU."""

    # The session is nowhere but in this attribute, locals included: an error that somebody keeps refers to the frames
    # that it passed, and would keep the weights in memory after `close`.
    _session: Any

    def __init__(
        self,
        graph: Path,
        spec: NetworkSpec,
        options: Any,
        providers: Mapping[str, Mapping[str, str]],
        advice: str,
        **keywords: Any,
    ) -> None:
        """Open an ONNX graph on the provider that must run it.

        Args:
            graph: the `.onnx`.
            spec: inputs and outputs that it must have.
            options: of the session.
            providers: name to options; the first one must run it.
            advice: what to do about a graph that cannot run there.
            keywords: further ones of `InferenceSession`.

        Raises:
            ArtifactError: ONNX Runtime refuses the file, or its inputs and outputs are not the spec's.
            UnsupportedError: there is no way to run it there.
            HostError: out of memory, or ONNX Runtime would run it elsewhere.
        """
        ort = import_onnxruntime()
        self.spec = spec
        wanted = next(iter(providers))
        try:
            # With fallback it would try again on the CPU, and say so only on stdout.
            self._session = ort.InferenceSession(
                str(graph), options, providers=list(providers.items()), enable_fallback=0, **keywords
            )
        except Exception as error:
            raise _load_error(graph, str(error), wanted, advice) from error
        require_provider(self._session.get_providers(), wanted)
        for found, expected in (
            (self._session.get_inputs(), spec.inputs),
            (self._session.get_outputs(), spec.outputs),
        ):
            names, manifest = {value.name for value in found}, {value.name for value in expected}
            if names != manifest:
                self.close()
                raise ArtifactError(f"`{graph.name}` has {sorted(names)}, the manifest says {sorted(manifest)}")

    @property
    def is_open(self) -> bool:
        """Whether it was not closed."""
        return self._session is not None

    def operators_beside(self, provider: str) -> set[str]:
        """Operators that another provider runs; asked of sessions that record their graph's assignment."""
        parts = self._session.get_provider_graph_assignment_info()
        return {node.op_type for part in parts if part.ep_name != provider for node in part.get_nodes()}

    def run(
        self,
        inputs: Mapping[str, Array],
        outputs: Mapping[str, Array],
        place: Callable[[Any], Place],
        options: Any = None,
    ) -> None:
        """Run on arrays where they are.

        Args:
            inputs: arrays of the spec's shapes and dtypes.
            outputs: likewise; they are written.
            place: says where an array is.
            options: of this run.

        Raises:
            UsageError: inputs of shapes that the network does not take.
            HostError: out of memory, or the GPU failed.
            ArtifactError: the graph does not take these inputs.
            InternalError: an array of another dtype or layout, or the session is closed.
        """
        if self._session is None:
            raise InternalError(f"the engine of `{self.spec.name}` is closed")
        require_arrays(self.spec, inputs, outputs)
        read = {name: place(array) for name, array in inputs.items()}
        written = {name: place(array) for name, array in outputs.items()}
        try:
            self._run(read, written, options)
        except Exception as error:
            # These frames hold the session too.
            error.__traceback__ = None
            raise _run_error(self.spec.name, str(error)) from error

    def close(self) -> None:
        """Drop the session; a second time does nothing."""
        self._session = None

    def _run(self, read: Mapping[str, Place], written: Mapping[str, Place], options: Any) -> None:
        binding = self._session.io_binding()
        for name, place in read.items():
            binding.bind_input(name, *place)
        for name, place in written.items():
            binding.bind_output(name, *place)
        self._session.run_with_iobinding(binding, options)


def require_provider(found: Sequence[str], wanted: str) -> None:
    """A session runs where it is meant to: ONNX Runtime leaves out a provider that does not load, without an error.

    Args:
        found: the session's providers, in order.
        wanted: what it was asked for.

    Raises:
        HostError: it does not.
    """
    if not found or found[0] != wanted:
        raise HostError(
            f"ONNX Runtime was asked for {wanted} and gave {', '.join(found) or 'none'}",
            hint="its messages above say which library it lacks",
        )


def _load_error(graph: Path, text: str, provider: str, advice: str) -> L2PError:
    where = provider.removesuffix("ExecutionProvider")
    if "NOT_IMPLEMENTED" in text or "Could not find an implementation" in text:
        return UnsupportedError(f"ONNX Runtime has no way to run `{graph.name}` on the {where}", hint=advice)
    if _lacks_memory(text):
        return HostError(f"out of memory for `{graph.name}`: {text}", hint="set a memory budget")
    return ArtifactError(f"ONNX Runtime refuses `{graph.name}`: {text}", hint=_REBUILD)


def _run_error(network: str, text: str) -> L2PError:
    if _lacks_memory(text):
        return HostError(f"out of memory in `{network}`: {text}", hint="set a memory budget")
    if any(name in text for name in ("CUDA", "CUDNN", "CUBLAS")):
        return HostError(f"the GPU failed in `{network}`: {text}", hint="start again in a new process")
    return ArtifactError(f"ONNX Runtime fails in `{network}`: {text}", hint=_REBUILD)


def _lacks_memory(text: str) -> bool:
    return "alloc" in text or "out of memory" in text.lower()


def _place(array: Any) -> Place:
    if not array.flags.c_contiguous:
        raise InternalError(f"a buffer of shape {array.shape} is not contiguous")
    return "cpu", 0, array.dtype, array.shape, array.ctypes.data
