"""Process groups of a run under `torchrun`: ranks, gradient averaging (DDP), sharding and gathering (FSDP2).

Without torchrun's environment variables a run is one process, and no process group is started.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from l2p_runtime.errors import HostError, UsageError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

SHARDINGS = ("none", "fsdp")

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Rank 0 writes states and adapters of many gigabytes while the other ranks wait for it.
_PATIENCE = timedelta(hours=2)


@dataclass(frozen=True, slots=True)
class ProcessGroup:
    """This process among those of a run.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
        local_size: number of processes on this machine.
        device: device of this process.
        is_sharded: weights, gradients and moments are sharded across ranks instead of replicated.
    """

    rank: int = 0
    size: int = 1
    local_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    is_sharded: bool = False

    @property
    def is_rank_zero(self) -> bool:
        """True for the one process that writes files and messages."""
        return self.rank == 0


ALONE = ProcessGroup()
"""One process on the CPU."""


@contextmanager
def joined(device: str | None = None, sharding: str = "none") -> Iterator[ProcessGroup]:
    """Join the process group that torchrun started, or run as a single process without torchrun.

    Args:
        device: `cpu`, `cuda` or `cuda:1`; None for CUDA if there is a GPU. With several processes, each takes the GPU
            of its local rank.
        sharding: `none`: each rank holds everything, gradients are averaged (DDP); `fsdp`: weights, gradients and
            moments are sharded across ranks (FSDP2).

    Raises:
        UsageError: a device or sharding that does not fit the number of processes.
        HostError: no such GPU, or the process group cannot be initialized.
    """
    if sharding not in SHARDINGS:
        raise UsageError(f"the sharding is {sharding!r}, expected {' or '.join(SHARDINGS)}")
    numbers = {name: os.environ.get(name, "") for name in _VARIABLES}
    size = int(numbers["WORLD_SIZE"] or 1) if all(numbers.values()) else 1
    if size == 1:
        if sharding == "fsdp":
            raise UsageError(
                "there is only one process, so weights cannot be sharded across ranks",
                hint="start several: torchrun --nproc-per-node 2 -m l2p_export train transfer ..., or --sharding none",
            )
        yield ProcessGroup(device=chosen_device(device, 0))
        return
    if device is not None and device.startswith("cuda:"):
        raise UsageError(f"--device is {device}, for {size} processes", hint="give cuda; each takes its own GPU")
    chosen = chosen_device(device, int(numbers["LOCAL_RANK"]))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    rank = int(numbers["RANK"])
    _start_group(chosen)
    try:
        yield ProcessGroup(rank, size, local_size, chosen, is_sharded=sharding == "fsdp")
    finally:
        torch.distributed.destroy_process_group()


def gathered(ranks: ProcessGroup, values: Sequence[float]) -> list[list[float]]:
    """All-gather values: one list per rank, in the order of ranks, the same on each rank."""
    if ranks.size == 1:
        return [list(values)]
    own = torch.tensor(values, dtype=torch.float64, device=ranks.device)
    rows = [torch.empty_like(own) for _ in range(ranks.size)]
    torch.distributed.all_gather(rows, own)
    return [row.tolist() for row in rows]


def shard_across(
    model: nn.Module, blocks: Sequence[nn.Module], kept_whole: Sequence[nn.Module], ranks: ProcessGroup
) -> None:
    """Shard the parameters of `model` across ranks in place (FSDP2): each block by itself, then the rest.

    Args:
        model: model to shard; equal on every rank, float32.
        blocks: parts that are gathered, used and freed one after the other.
        kept_whole: parts whose parameters stay replicated on every rank.
        ranks: the process group.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    ignored = {parameter for part in kept_whole for parameter in part.parameters()}
    for part in kept_whole:
        part.to(ranks.device)
    for block in blocks:
        fully_shard(block, mesh=mesh, ignored_params=ignored)
    fully_shard(model, mesh=mesh, ignored_params=ignored)


def averaging_gradients(model: nn.Module, ranks: ProcessGroup) -> nn.Module:
    """Wrap `model` so that gradients are averaged over ranks; call the result in place of `model`."""
    if ranks.size == 1 or ranks.is_sharded:
        return model
    return nn.parallel.DistributedDataParallel(
        model,
        # All ranks made the same weights from the same seed and files.
        init_sync=False,
        forward_sync_buffers=False,
        gradient_as_bucket_view=True,
    )


def without_exchange(model: nn.Module, *, when: bool) -> AbstractContextManager[None]:
    """Context of all micro batches but the last: their gradients accumulate locally, without all-reduce."""
    if when and isinstance(model, nn.parallel.DistributedDataParallel):
        return model.no_sync()
    return nullcontext()


def is_cut(tensor: Tensor) -> bool:
    """True for a tensor that is sharded across ranks."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def own_part(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor, in the same memory; the whole tensor if it is not sharded."""
    if not is_cut(tensor):
        return tensor.detach()
    cut: DTensor = tensor  # type: ignore[assignment]
    with torch.no_grad():
        part: Tensor = cut.to_local()
    return part.detach()


def part_for(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's shard of a tensor that every rank has whole, sharded as `like` is."""
    if not is_cut(like):
        return whole
    from torch.distributed.tensor import distribute_tensor

    cut: DTensor = like  # type: ignore[assignment]
    moved = whole.to(cut.device)
    return own_part(distribute_tensor(moved, cut.device_mesh, cut.placements, src_data_rank=None))


def made_whole(part: Tensor, like: Tensor) -> Tensor:
    """Gather the shards of all ranks into the whole tensor; every rank must call this for the same tensors."""
    if not is_cut(like):
        return part
    from torch.distributed.tensor import DTensor

    cut: DTensor = like  # type: ignore[assignment]
    local = part.to(cut.device)
    return DTensor.from_local(
        local, cut.device_mesh, cut.placements, run_check=False, shape=cut.shape, stride=cut.stride()
    ).full_tensor()


def chosen_device(wanted: str | None, local_rank: int = 0) -> torch.device:
    """The device of one process: the requested one, or by default a GPU if there is one.

    Raises:
        UsageError: no such kind of device.
        HostError: no such GPU.
    """
    if wanted is None:
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise UsageError(f"--device is {wanted!r}, expected cpu, cuda or cuda:0") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device is {wanted!r}, expected cpu, cuda or cuda:0")
    if device.type == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", local_rank if device.index is None else device.index)
    count = torch.cuda.device_count()
    if device.index >= count:
        raise HostError(
            f"there is no GPU {device.index}; torch sees {count}",
            hint="start as many processes as there are GPUs, or give --device cpu",
        )
    torch.cuda.set_device(device)
    return device


def _start_group(device: torch.device) -> None:
    try:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise HostError(
            f"the processes of this run did not find each other: {error}", hint="start them with torchrun"
        ) from error
