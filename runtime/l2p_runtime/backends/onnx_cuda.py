"""ONNX Runtime on an NVIDIA GPU: runs ONNX graphs on every card that CUDA 13 knows, data-centre ones too."""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2p_runtime.backends import Array, Backend
from l2p_runtime.backends.onnx import GraphSession, Place, make_options, require_provider
from l2p_runtime.errors import HostError, InternalError, UnsupportedError
from l2p_runtime.onnx_library import import_onnxruntime

if TYPE_CHECKING:
    from l2p_runtime.backends.cuda import CudaDevice
    from l2p_runtime.contract import NetworkSpec

PRIORITY = 10
_PROVIDER = "CUDAExecutionProvider"
_EXTRA = "pip install 'l2p-export[gpu]'"
_INSTALL = f"pip uninstall onnxruntime, then {_EXTRA}: both packages have one import name"
_LIBRARIES = "install CUDA 13 and cuDNN 9: pip install 'onnxruntime-gpu[cuda,cudnn]'"

HEAVY_OPERATORS = frozenset(
    {"Attention", "Conv", "Gemm", "MatMul", "MaxPool", "RMSNormalization", "ReduceMean", "Resize", "Softmax"}
)
"""Operators over all pixels or tokens, which must not be left on the CPU, as version 1.24 left `Attention`
(microsoft/onnxruntime #28025); others there compute shapes."""

# One `Identity` on a float32 [1]: what a session needs to show whether the provider loads.
_PROBE = (
    b'\x08\x08:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01pZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01'
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x11"
)


def open_device(device: int) -> Backend:
    """Open a GPU.

    Raises:
        HostError: no driver or no GPU; ONNX Runtime is not installed, or cannot use CUDA.
        UsageError: no GPU of that index.
    """
    from l2p_runtime.backends.cuda import open_cuda

    cuda = open_cuda(device, _EXTRA)
    try:
        onnxruntime = import_onnxruntime(_EXTRA)
        _require_cuda(onnxruntime, cuda)
    except BaseException:
        cuda.close()
        raise
    return Backend(
        name="onnx-cuda",
        identity=f"onnxruntime {onnxruntime.__version__} on {cuda.capability}",
        device=cuda,
        load=functools.partial(OnnxCudaEngine, cuda),
    )


class OnnxCudaEngine:
    """One ONNX graph in one ONNX Runtime session on a GPU; implements `Engine`."""

    def __init__(self, device: CudaDevice, graph: Path, weights: Path, spec: NetworkSpec) -> None:
        """Load an ONNX graph; its weights are on the device afterwards.

        Raises:
            ArtifactError: ONNX Runtime refuses the file, or its inputs and outputs are not the spec's.
            UnsupportedError: ONNX Runtime would compute some of it on the CPU.
            HostError: the device has not enough memory, or ONNX Runtime would not use it.
        """
        ort = import_onnxruntime()
        self.spec = spec
        self._device = device
        self._weight_bytes = weights.stat().st_size
        options = make_options(ort)
        # Weights beside the arena, so that all of it can be given back after a run.
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        advice = "use another --plan: for bfloat16, some operators have no kernel in ONNX Runtime"
        self._session = GraphSession(graph, spec, options, {_PROVIDER: _provider_options(device)}, advice)
        # ONNX Runtime runs what the provider has no kernel for on the CPU, and does not say so.
        elsewhere = sorted(self._session.operators_beside(_PROVIDER) & HEAVY_OPERATORS)
        if elsewhere:
            self._session.close()
            raise UnsupportedError(
                f"ONNX Runtime has no CUDA kernel for {', '.join(elsewhere)} of `{graph.name}` and would use the CPU",
                hint="use another --plan, or a newer onnxruntime-gpu",
            )
        self._options = ort.RunOptions()
        # Activations of one network at a time: each session has an arena of its own, which would keep them.
        self._options.add_run_config_entry("memory.enable_memory_arena_shrinkage", f"gpu:{device.index}")

    def run(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """Run on the device's stream, and wait for it.

        Args:
            inputs: contiguous arrays of the device, of the spec's dtypes.
            outputs: likewise, of the shapes that follow from the inputs; they are written.

        Raises:
            UsageError: inputs of shapes that the network does not take.
            HostError: out of memory, or the GPU failed.
            ArtifactError: the graph does not take these inputs.
            InternalError: an array of another dtype or layout, or the engine is closed.
        """
        self._session.run(inputs, outputs, self._place, self._options)

    def memory_bytes(self) -> int:
        """Bytes of the weights; none once closed."""
        return self._weight_bytes if self._session.is_open else 0

    def close(self) -> None:
        """Give the weights back; a second time does nothing."""
        self._session.close()

    def _place(self, array: Any) -> Place:
        if not array.is_contiguous:
            raise InternalError(f"a buffer of shape {list(array.shape)} is not contiguous")
        return "cuda", self._device.index, array.dtype, array.shape, array.address


def _provider_options(device: CudaDevice) -> dict[str, str]:
    return {
        "device_id": str(device.index),
        # In order with the kernels and copies of the device, with no waiting between them.
        "user_compute_stream": str(device.stream),
        # By default the arena grows by powers of two.
        "arena_extend_strategy": "kSameAsRequested",
        # By default every algorithm is timed for every new shape, with all the memory that it may want.
        "cudnn_conv_algo_search": "HEURISTIC",
        # By default float32 matrix products round their inputs to 10 bits; float32 in a plan means exact inputs.
        "use_tf32": "0",
    }


def _require_cuda(onnxruntime: Any, device: CudaDevice) -> None:
    """ONNX Runtime has a CUDA provider, and it loads.

    Raises:
        HostError: it has not, or does not.
    """
    available = onnxruntime.get_available_providers()
    if _PROVIDER not in available:
        raise HostError(
            f"ONNX Runtime {onnxruntime.__version__} has {', '.join(available)}, wanted {_PROVIDER}", hint=_INSTALL
        )
    # It finds the CUDA libraries of pip packages; what it cannot load it prints, on the stdout that is for data.
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        onnxruntime.preload_dlls()
    try:
        options = make_options(onnxruntime)
        providers = [(_PROVIDER, _provider_options(device))]
        session = onnxruntime.InferenceSession(_PROBE, options, providers=providers, enable_fallback=0)
        require_provider(session.get_providers(), _PROVIDER)
    except Exception as error:
        told = " ".join(f"{error} {printed.getvalue()}".split())
        raise HostError(f"ONNX Runtime {onnxruntime.__version__} cannot use CUDA: {told}", hint=_LIBRARIES) from error
