"""What every later stage is compared with: denoising calls in torch float32, network by network.

One network is in memory at a time, so this needs room for the largest network and not for the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from l2p_export.tensors import read_tensor
from l2p_export.verification import network_inputs
from l2p_runtime.contract import NETWORKS

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

    from l2p_export.loading import LoadedModel

    Tensors = Mapping[str, NDArray[Any]]


def run_reference(
    loaded: LoadedModel, cases: Mapping[str, Tensors], advance: Callable[[int], None]
) -> dict[str, dict[str, NDArray[Any]]]:
    """Run every case through the torch networks in float32.

    Args:
        loaded: the checkpoint.
        cases: case name to inputs, from `verification.case_inputs`.
        advance: told 1 after each network and case.

    Returns:
        Case name to its inputs and, as `network.output`, what each network made.
    """
    import torch

    results = {name: dict(inputs) for name, inputs in cases.items()}
    for spec in loaded.model.networks:
        module = torch_network(loaded, spec.name)
        for case in results.values():
            inputs = {
                name: torch.from_numpy(value.copy()) for name, value in network_inputs(spec.name, case, case).items()
            }
            with torch.no_grad():
                made = module(**inputs)
            values = made if isinstance(made, tuple) else (made,)
            case |= {f"{spec.name}.{out.name}": v.numpy() for out, v in zip(spec.outputs, values, strict=True)}
            advance(1)
    return results


def torch_network(loaded: LoadedModel, network: str) -> nn.Module:
    """One network in torch float32 with the checkpoint's weights."""
    import torch

    with torch.device("meta"):
        module = loaded.model.module(network, lambda layer: torch.float32)
    tensors = loaded.checkpoint.tensors
    module.load_state_dict({n: torch.from_numpy(read_tensor(tensors[n])) for n in module.state_dict()}, assign=True)
    return module


def largest_network_bytes(loaded: LoadedModel) -> int:
    """Float32 bytes of the largest network's weights."""
    import torch

    sizes: list[int] = []
    for network in NETWORKS:
        with torch.device("meta"):
            module = loaded.model.module(network, lambda layer: torch.float32)
        sizes.append(4 * sum(math.prod(value.shape) for value in module.state_dict().values()))
    return max(sizes)
