"""What every later stage is compared with: denoising calls in torch float32, network by network.

One transformer block is in memory at a time, so this needs room for the largest block and not for the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from l2p_export.proof.compare import network_inputs
from l2p_export.tensors.sources import read_tensor
from l2p_runtime.contract import NETWORKS

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from l2p_export.checkpoint.loading import LoadedModel
    from l2p_export.families import Model
    from l2p_export.tensors.sources import TensorSource

    Tensors = Mapping[str, NDArray[Any]]

_WEIGHT_COPIES = 2
_ACTIVATION_BYTES = 256 << 20


def run_reference(
    loaded: LoadedModel,
    cases: Mapping[str, Tensors],
    advance: Callable[[int], None],
    observe: Callable[[str, nn.Module], AbstractContextManager[object]] = lambda network, module: nullcontext(),
) -> dict[str, dict[str, NDArray[Any]]]:
    """Run every case through the torch networks in float32.

    Args:
        loaded: the checkpoint.
        cases: case name to inputs, from `verification.case_inputs`.
        advance: told 1 after each network and case.
        observe: given each network's name and module, makes the context that all its cases run in.

    Returns:
        Case name to its inputs and, as `network.output`, what each network made.
    """
    import torch

    results = {name: dict(inputs) for name, inputs in cases.items()}
    for spec in loaded.model.networks:
        module = torch_network(loaded, spec.name)
        with observe(spec.name, module), torch.no_grad():
            for case in results.values():
                given = network_inputs(spec.name, case, case)
                made = module(**{name: torch.from_numpy(value.copy()) for name, value in given.items()})
                values = made if isinstance(made, tuple) else (made,)
                case |= {f"{spec.name}.{out.name}": v.numpy() for out, v in zip(spec.outputs, values, strict=True)}
                advance(1)
    return results


def torch_network(loaded: LoadedModel, network: str) -> nn.Module:
    """One network in torch float32; a transformer block has its weights only while it runs."""
    import torch

    with torch.device("meta"):
        module = loaded.model.module(network, lambda layer: torch.float32)
    blocks = loaded.model.blocks(network)
    for name in blocks:
        _fill_while_running(module.get_submodule(name), name, loaded.checkpoint.tensors)
    inside = tuple(f"{name}." for name in blocks)
    outer = [name for name in module.state_dict() if not name.startswith(inside)]
    module.load_state_dict(_weights(loaded.checkpoint.tensors, outer), assign=True, strict=False)
    return module


def reference_bytes(model: Model) -> int:
    """Host memory that the reference takes for small images, from shapes alone.

    A block's weights as read and as float32, beside what is outside of blocks, and what activations take.
    """
    most = 0
    for network in NETWORKS:
        blocks = model.blocks(network)
        sizes = dict.fromkeys((*blocks, ""), 0)
        for name, shape in model.network_shapes(network).items():
            block = next((block for block in blocks if name.startswith(f"{block}.")), "")
            sizes[block] += 4 * math.prod(shape)
        most = max(most, sizes[""] + max((sizes[block] for block in blocks), default=0))
    return _WEIGHT_COPIES * most + _ACTIVATION_BYTES


def _fill_while_running(block: nn.Module, prefix: str, tensors: Mapping[str, TensorSource]) -> None:
    names = list(block.state_dict())

    def fill(module: nn.Module, inputs: object) -> None:
        del inputs
        weights = _weights(tensors, [f"{prefix}.{name}" for name in names])
        module.load_state_dict({name: weights[f"{prefix}.{name}"] for name in names}, assign=True)

    def empty(module: nn.Module, inputs: object, output: object) -> None:
        del inputs, output
        module.to_empty(device="meta")

    block.register_forward_pre_hook(fill)
    block.register_forward_hook(empty)


def _weights(tensors: Mapping[str, TensorSource], names: Sequence[str]) -> dict[str, Tensor]:
    import torch

    return {name: torch.from_numpy(read_tensor(tensors[name])) for name in names}
