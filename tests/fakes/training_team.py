"""One of the processes that `torchrun` starts for a test: it trains as told and writes down how each run ended.

    PYTHONPATH=tests torchrun --nproc-per-node 2 tests/fakes/training_team.py FOLDER

FOLDER holds a source and a corpus; each run's states and adapters go beside them.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fakes.sources import tiny_spec
from l2p_export.training.corpus.corpus import open_corpus
from l2p_export.training.loop.distributed import ProcessGroup, averaging_gradients, joined, shard_across
from l2p_export.training.loop.loop import Schedule, generator, train_weights
from l2p_export.training.loop.masters import trained_weights
from l2p_export.training.source.folder import open_source
from l2p_export.training.transfer.spec import PLAIN, TrainingOptions
from l2p_export.training.transfer.train import transfer
from l2p_runtime.errors import L2PError
from l2p_runtime.progress import Silent

TRANSFERS: dict[str, tuple[bool, TrainingOptions, dict[str, Any]]] = {
    "ddp": (False, PLAIN, {"micro_batches": 2}),
    "fsdp": (True, PLAIN, {"micro_batches": 2}),
    "fsdp-cpu": (True, TrainingOptions(trunk_storage="bfloat16", optimizer_device="cpu"), {"checkpointing": True}),
    "ddp-cpu": (False, TrainingOptions(trunk_storage="bfloat16", optimizer_device="cpu"), {"micro_batches": 2}),
    # Each goes on from a state that one process wrote.
    "ddp-goes-on": (False, PLAIN, {}),
    "fsdp-goes-on": (True, PLAIN, {}),
}
"""Name to: cut over processes, means, changes of the spec."""

STEPS = 4
SCHEDULE = Schedule(steps=6, batch=8, learning_rate=0.01, warmup_steps=1, save_every=3)


def main(root: Path) -> None:
    """Run everything."""
    torch.set_num_threads(1)
    ends = {}
    with joined("cpu") as ranks:
        for name, (is_cut, options, changes) in TRANSFERS.items():
            spec = tiny_spec(STEPS, save_every=2, **changes)
            mine = replace(ranks, is_sharded=is_cut)
            paths = root / f"{name}.safetensors", root / name
            transfer(open_source(root / "source"), open_corpus(root / "corpus"), spec, *paths, Silent(),
                     options=options, ranks=mine)  # fmt: skip
            if ranks.is_rank_zero and "goes-on" not in name:
                shutil.copytree(root / name / "step-00000002", root / f"{name}-by-one" / "step-00000002")
        for is_cut in (False, True):
            for what in ("signal", "nan", "fine"):
                name = f"{what}-{'fsdp' if is_cut else 'ddp'}"
                ends[name] = _toy(root / name, replace(ranks, is_sharded=is_cut), what)
    (root / f"ends-{ranks.rank}.json").write_text(json.dumps(ends))


def _toy(folder: Path, ranks: ProcessGroup, what: str) -> dict[str, Any]:
    """A model of one layer; at step 4 only the last process gets a signal, or a loss that is NaN."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1))
    if ranks.is_sharded:
        shard_across(model, [], [], ranks)
    weights = trained_weights(model, 0.0, 0.99)
    called = averaging_gradients(model, ranks)
    spoil: dict[str, Callable[[Tensor], Tensor]] = {"signal": _signalled, "nan": lambda value: value * math.nan}

    def loss(step: int, micro: int) -> Tensor:
        x = torch.randn(SCHEDULE.batch, 5, generator=generator(step))[ranks.rank :: ranks.size]
        value: Tensor = (called(x) - x.square().sum(dim=1, keepdim=True)).square().mean()
        return spoil[what](value) if step == 4 and ranks.rank == ranks.size - 1 and what in spoil else value

    settings = {"schedule": asdict(SCHEDULE)}
    more: dict[str, Any] = {"title": "toy", "ranks": ranks, "called": called}
    try:
        averaged = train_weights(weights, loss, SCHEDULE, folder, settings, Silent(), **more)
    except L2PError as error:
        return {"error": type(error).__name__, "says": str(error)}
    return {"averaged": sorted(averaged)}


def _signalled(value: Tensor) -> Tensor:
    os.kill(os.getpid(), signal.SIGTERM)
    return value


if __name__ == "__main__":
    main(Path(sys.argv[1]))
