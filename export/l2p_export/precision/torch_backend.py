"""Backend that runs a bundle's float32 networks in torch, for the runtime's pipeline.

Unlike other backends, it allows changing what layers compute. Weights come from the bundle's own float32 ONNX graphs,
so no checkpoint is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from l2p_export.graphs.stored import published_places, read_published
from l2p_runtime.backends import Array, Backend, require_arrays
from l2p_runtime.backends.host import HostDevice
from l2p_runtime.errors import HostError
from l2p_runtime.memory import available_host_bytes
from l2p_runtime.tensorfile import open_tensorfile

if TYPE_CHECKING:
    from torch import nn

    from l2p_export.families import Model
    from l2p_runtime.contract import NetworkSpec


@dataclass
class TorchNetworks:
    """Networks that are loaded when they are first used, and then stay loaded.

    Attributes:
        model: their architecture.
        engines: loaded networks by name.
    """

    model: Model
    engines: dict[str, TorchEngine] = field(default_factory=dict)

    def backend(self) -> Backend:
        """The backend, for ONNX graphs of an fp32 plan."""
        import torch

        return Backend("torch", f"torch {torch.__version__}", HostDevice(), self._load)

    def _load(self, graph: Path, weights: Path, spec: NetworkSpec) -> TorchEngine:
        del graph
        if spec.name not in self.engines:
            self.engines[spec.name] = TorchEngine(torch_module(self.model, spec.name, weights), spec)
        return self.engines[spec.name]


class TorchEngine:
    """One network in torch float32 on the CPU; implements `Engine`."""

    def __init__(self, module: nn.Module, spec: NetworkSpec) -> None:
        self.module, self.spec, self._device = module, spec, HostDevice()

    def run(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """Run on host arrays and write into `outputs`."""
        import numpy as np
        import torch

        require_arrays(self.spec, inputs, outputs)
        # torch takes only writable arrays; those mapped from a file are read-only.
        given = {name: torch.from_numpy(np.require(value, requirements="W")) for name, value in inputs.items()}
        with torch.no_grad():
            made = self.module(**given)
        values = made if isinstance(made, tuple) else (made,)
        for out, value in zip(self.spec.outputs, values, strict=True):
            self._device.copy(outputs[out.name], value.numpy())

    def memory_bytes(self) -> int:
        """Bytes of its weights."""
        return sum(value.nbytes for value in self.module.state_dict().values())

    def close(self) -> None:
        """Do nothing: `TorchNetworks` keeps the network."""


def torch_module(model: Model, network: str, weights: Path) -> nn.Module:
    """One network in torch with the weights of its float32 ONNX graph.

    Raises:
        HostError: there is too little free memory for them.
        ArtifactError: the file is damaged.
    """
    import numpy as np
    import torch

    file = open_tensorfile(weights)
    needed, free = sum(info.size_bytes for info in file.tensors.values()), available_host_bytes()
    if needed > free:
        raise HostError(
            f"`{network}` takes {needed:,} bytes in torch float32, {free:,} are free",
            hint="sweep a smaller model of the same layers, or where there is more memory",
        )
    with torch.device("meta"):
        module = model.module(network, lambda layer: torch.float32)
    state = {
        name: torch.from_numpy(np.array(read_published(file, place), np.float32, order="C"))
        for name, place in published_places(file).items()
    }
    module.load_state_dict(state, assign=True)
    return module.eval()
