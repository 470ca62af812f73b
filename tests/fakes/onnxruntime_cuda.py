"""ONNX Runtime with a CUDA provider over host memory: sessions that were asked for CUDA run on the CPU, at addresses of
`fakes.cuda`, and say that they run on CUDA. All else is the real one's.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import onnxruntime

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


class FakeOnnxRuntime:
    """Stands in for the module `onnxruntime` of the package `onnxruntime-gpu`.

    Attributes:
        compiled: whether the package has a CUDA provider at all.
        loads: whether that provider finds its libraries; where it does not, sessions quietly run on the CPU.
        on_cpu: operators that the provider has no kernel for.
        sessions: of every CUDA session: its options and the provider's.
        fails: what a run raises.
    """

    def __init__(self, *, compiled: bool = True, loads: bool = True, on_cpu: frozenset[str] = frozenset()) -> None:
        self.compiled = compiled
        self.loads = loads
        self.on_cpu = on_cpu
        self.sessions: list[tuple[Any, dict[str, str]]] = []
        self.fails: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(onnxruntime, name)

    def get_available_providers(self) -> list[str]:
        return [CUDA, CPU] if self.compiled else [CPU]

    def preload_dlls(self) -> None:
        print("Failed to load libcublasLt.so.13" if not self.loads else "")  # noqa: T201 - as the real one does

    def InferenceSession(self, graph: Any, options: Any, *, providers: Any, **keywords: Any) -> Any:  # noqa: N802
        name, settings = providers[0]
        if name != CUDA:
            return onnxruntime.InferenceSession(graph, options, providers=providers, **keywords)
        # Else the real one tries again on the CPU when it fails.
        assert keywords["enable_fallback"] == 0
        self.sessions.append((options, settings))
        return _Session(self, onnxruntime.InferenceSession(graph, options, providers=[CPU], **keywords), settings)


class _Session:
    def __init__(self, library: FakeOnnxRuntime, real: Any, settings: dict[str, str]) -> None:
        self.library, self.real, self.settings = library, real, settings

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def get_providers(self) -> list[str]:
        return [CUDA, CPU] if self.library.loads else [CPU]

    def get_provider_graph_assignment_info(self) -> list[Any]:
        nodes = [node for part in self.real.get_provider_graph_assignment_info() for node in part.get_nodes()]
        left = [node for node in nodes if node.op_type in self.library.on_cpu | {"Shape"}]
        taken = [node for node in nodes if node not in left]
        return [
            SimpleNamespace(ep_name=CUDA, get_nodes=lambda: taken),
            SimpleNamespace(ep_name=CPU, get_nodes=lambda: left),
        ]

    def io_binding(self) -> Any:
        return _Binding(self.real.io_binding(), int(self.settings["device_id"]))

    def run_with_iobinding(self, binding: _Binding, options: Any) -> None:
        device = self.settings["device_id"]
        assert options.get_run_config_entry("memory.enable_memory_arena_shrinkage") == f"gpu:{device}"
        if self.library.fails is not None:
            raise self.library.fails
        self.real.run_with_iobinding(binding.real)


class _Binding:
    def __init__(self, real: Any, device_id: int) -> None:
        self.real, self.device_id = real, device_id

    def bind_input(self, name: str, device: str, index: int, *place: Any) -> None:
        assert (device, index) == ("cuda", self.device_id)
        self.real.bind_input(name, "cpu", 0, *place)

    def bind_output(self, name: str, device: str, index: int, *place: Any) -> None:
        assert (device, index) == ("cuda", self.device_id)
        self.real.bind_output(name, "cpu", 0, *place)
