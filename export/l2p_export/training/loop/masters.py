"""Trained weights in the places where they stand: the module, the optimizer's float32 masters, and their average.

Each process works on its own part of each tensor; where nothing is cut over processes, a part is the whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from l2p_export.training.loop.distributed import ProcessGroup, gathered, is_cut, made_whole, own_part


@dataclass(frozen=True, slots=True)
class Weights:
    """What is trained.

    Attributes:
        parameters: of the module, by name, on the device that computes.
        masters: float32, what the optimizer moves: the memory of the parameters, or copies of it on the CPU.
        averaged: exponential averages of the masters, beside them.
        optimizer: of the masters, with its moments beside them.
    """

    parameters: Mapping[str, nn.Parameter]
    masters: Mapping[str, nn.Parameter]
    averaged: Mapping[str, Tensor]
    optimizer: torch.optim.AdamW


def trained_weights(
    module: nn.Module,
    weight_decay: float,
    beta2: float,
    *,
    on_cpu: bool = False,
    narrow: bool = False,
) -> Weights:
    """Masters, averages and AdamW for the parameters of `module` that require a gradient.

    Args:
        module: what is trained, in float32.
        weight_decay: of AdamW; matrices only.
        beta2: of AdamW.
        on_cpu: keep masters, averages and moments in the CPU's memory.
        narrow: with `on_cpu`: leave the module BF16 matrices, which are what autocast would make of them.
    """
    parameters = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    if on_cpu:
        masters = {name: _copy_on_cpu(parameter) for name, parameter in parameters.items()}
        for parameter in parameters.values() if narrow else ():
            if parameter.ndim >= 2:
                parameter.data = parameter.data.to(torch.bfloat16)
    else:
        masters = {
            name: nn.Parameter(own_part(parameter)) if is_cut(parameter) else parameter
            for name, parameter in parameters.items()
        }
    averaged = {name: master.detach().clone() for name, master in masters.items()}
    is_fused = on_cpu or any(master.device.type == "cuda" for master in masters.values())
    return Weights(parameters, masters, averaged, _optimizer(masters, weight_decay, beta2, is_fused=is_fused))


def take_gradients(weights: Weights) -> None:
    """Add what a backward pass left in the module to the masters' gradients."""
    for name, parameter in weights.parameters.items():
        master, gradient = weights.masters[name], parameter.grad
        if master is parameter or gradient is None:
            continue
        # DDP reuses the memory of whole gradients.
        part = own_part(gradient).to(master.device, torch.float32, copy=not is_cut(gradient))
        master.grad = part if master.grad is None else master.grad.add_(part)
        parameter.grad = None


def drop_gradients(weights: Weights) -> None:
    """Forget gradients of module and masters."""
    for parameter in (*weights.parameters.values(), *weights.masters.values()):
        parameter.grad = None


def clip_gradients(weights: Weights, largest: float, ranks: ProcessGroup) -> float:
    """Scale gradients so that their norm over all processes' parts is at most `largest`; the norm before."""
    gradients = [master.grad for master in weights.masters.values() if master.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if ranks.is_sharded:
        squares = gathered(ranks, [float(norm) ** 2])
        norm = torch.tensor(sum(row[0] for row in squares) ** 0.5, dtype=torch.float32)
    nn.utils.clip_grads_with_norm_(list(weights.masters.values()), largest, norm)
    return float(norm)


@torch.no_grad()
def move(weights: Weights, kept: float) -> None:
    """One step of the optimizer, written back to the module, and into the averages, which keep the share `kept`."""
    weights.optimizer.step()
    write_back(weights)
    # All at once: tensor by tensor, a GPU waits for the small ones to be asked for.
    averages = [weights.averaged[name] for name in weights.masters]
    current = [master.detach() for master in weights.masters.values()]
    get_ema_multi_avg_fn(kept)(averages, current, None)  # type: ignore[no-untyped-call]


@torch.no_grad()
def write_back(weights: Weights) -> None:
    """Copy masters of their own memory into the module."""
    for name, master in weights.masters.items():
        part = own_part(weights.parameters[name])
        if part.data_ptr() != master.data_ptr():
            part.copy_(master)


def whole_tensors(weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """Everything that a state holds, as `KIND.NAME` and the whole float32 tensor on the CPU, tensor by tensor.

    Where weights are cut over processes, every process must walk through all of it.
    """
    moments = weights.optimizer.state
    for name, master in weights.masters.items():
        like, of_master = weights.parameters[name], moments[master]
        yield f"weights.{name}", _whole(master, like)
        yield f"averaged.{name}", _whole(weights.averaged[name], like)
        yield f"first_moment.{name}", _whole(of_master["exp_avg"], like)
        yield f"second_moment.{name}", _whole(of_master["exp_avg_sq"], like)


def whole_averages(weights: Weights, ranks: ProcessGroup) -> Mapping[str, Tensor]:
    """Averaged weights by name; cut ones are gathered on the CPU of the first process, and the others get none."""
    if not ranks.is_sharded:
        return weights.averaged
    whole = {}
    for name, averaged in weights.averaged.items():
        tensor = _whole(averaged, weights.parameters[name])
        if ranks.is_rank_zero:
            whole[name] = tensor
    return whole


def _whole(part: Tensor, like: Tensor) -> Tensor:
    return made_whole(part.detach(), like).to("cpu").contiguous()


def _copy_on_cpu(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(own_part(parameter).to("cpu", torch.float32, copy=True))


def _optimizer(
    masters: Mapping[str, nn.Parameter], weight_decay: float, beta2: float, *, is_fused: bool
) -> torch.optim.AdamW:
    matrices = [master for master in masters.values() if master.ndim >= 2]
    others = [master for master in masters.values() if master.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    # Fused steps make no copies of the weights on the way.
    return torch.optim.AdamW(groups, betas=(0.9, beta2), fused=is_fused or None)
