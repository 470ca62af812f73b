"""Trained weights: the module's parameters, float32 master weights of the optimizer, and their EMA.

Each process works on its own shard of each tensor. Without sharding, a shard is the whole tensor.
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
    """Trained weights and their optimizer.

    Attributes:
        parameters: of the module, by name, on the compute device.
        masters: float32 master weights, which the optimizer updates: the parameters' own memory, or copies on the CPU.
        averaged: EMA of the masters, on the same device.
        optimizer: of the masters, with its moments on the same device.
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
    """Make masters, EMA and AdamW for the parameters of `module` that require a gradient.

    Args:
        module: module to train, in float32.
        weight_decay: of AdamW; only for matrices.
        beta2: of AdamW.
        on_cpu: keep masters, EMA and moments in host memory.
        narrow: with `on_cpu`: convert the module's matrices to BF16, as autocast would do.
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
    """Move the module's gradients of a backward pass to the masters, added to theirs."""
    for name, parameter in weights.parameters.items():
        master, gradient = weights.masters[name], parameter.grad
        if master is parameter or gradient is None:
            continue
        # DDP reuses the memory of whole gradients.
        part = own_part(gradient).to(master.device, torch.float32, copy=not is_cut(gradient))
        master.grad = part if master.grad is None else master.grad.add_(part)
        parameter.grad = None


def drop_gradients(weights: Weights) -> None:
    """Clear the gradients of module and masters."""
    for parameter in (*weights.parameters.values(), *weights.masters.values()):
        parameter.grad = None


def clip_gradients(weights: Weights, largest: float, ranks: ProcessGroup) -> float:
    """Clip gradients to the norm `largest`, computed over all ranks' shards; returns the norm before clipping."""
    gradients = [master.grad for master in weights.masters.values() if master.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if ranks.is_sharded:
        squares = gathered(ranks, [float(norm) ** 2])
        norm = torch.tensor(sum(row[0] for row in squares) ** 0.5, dtype=torch.float32)
    nn.utils.clip_grads_with_norm_(list(weights.masters.values()), largest, norm)
    return float(norm)


@torch.no_grad()
def move(weights: Weights, kept: float) -> None:
    """Take an optimizer step, write the masters back to the module, and update the EMA with decay `kept`."""
    weights.optimizer.step()
    write_back(weights)
    # All tensors at once: one by one, a GPU would wait for the launches of small kernels.
    averages = [weights.averaged[name] for name in weights.masters]
    current = [master.detach() for master in weights.masters.values()]
    get_ema_multi_avg_fn(kept)(averages, current, None)  # type: ignore[no-untyped-call]


@torch.no_grad()
def write_back(weights: Weights) -> None:
    """Copy masters into the module, unless they share its memory."""
    for name, master in weights.masters.items():
        part = own_part(weights.parameters[name])
        if part.data_ptr() != master.data_ptr():
            part.copy_(master)


def whole_tensors(weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors of a state one by one: `KIND.NAME` and the whole float32 tensor on the CPU.

    With sharded weights, every rank must iterate over all of them.
    """
    moments = weights.optimizer.state
    for name, master in weights.masters.items():
        like, of_master = weights.parameters[name], moments[master]
        yield f"weights.{name}", _whole(master, like)
        yield f"averaged.{name}", _whole(weights.averaged[name], like)
        yield f"first_moment.{name}", _whole(of_master["exp_avg"], like)
        yield f"second_moment.{name}", _whole(of_master["exp_avg_sq"], like)


def whole_averages(weights: Weights, ranks: ProcessGroup) -> Mapping[str, Tensor]:
    """EMA weights by name. Sharded ones are gathered on the CPU of rank 0; the other ranks get an empty mapping."""
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
    # Fused steps make no temporary copies of the weights.
    return torch.optim.AdamW(groups, betas=(0.9, beta2), fused=is_fused or None)
