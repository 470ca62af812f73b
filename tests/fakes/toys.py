"""A model of two layers to train in milliseconds, and what its run leaves behind."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from l2p_export.training.loop.loop import PROGRESS_NAME, Loss, Schedule, generator, train
from l2p_export.training.loop.states import latest_state
from l2p_runtime.progress import Silent

SCHEDULE = Schedule(steps=9, batch=8, learning_rate=0.01, warmup_steps=3, cooldown_steps=3, save_every=4, seed=2)


class Toy(nn.Module):
    """Four numbers to one; the last layer is frozen."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 4, bias=False)
            torch.manual_seed(9)
            self.frozen = nn.Linear(4, 1)
        self.frozen.requires_grad_(requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.frozen(self.second(torch.tanh(self.first(x))))
        return made


def toy_loss(model: Toy, schedule: Schedule, at: Mapping[int, Callable[[Tensor], Tensor]] | None = None) -> Loss:
    """Its samples follow from the step; `at` changes the loss of a step."""

    def loss(step: int, micro: int) -> Tensor:
        x = torch.randn(schedule.batch, 4, generator=generator(schedule.seed, step))
        part = x[micro :: schedule.micro_batches]
        value: Tensor = (model(part) - part.square().sum(dim=1, keepdim=True)).square().mean()
        change = (at or {}).get(step)
        return value if change is None else change(value)

    return loss


def run(
    folder: Path,
    schedule: Schedule = SCHEDULE,
    at: Mapping[int, Callable[[Tensor], Tensor]] | None = None,
    seed: int = 0,
    **more: Any,
) -> Mapping[str, Tensor]:
    model = Toy(seed)
    settings = {"stage": "toy", "schedule": asdict(schedule)}
    return train(model, toy_loss(model, schedule, at), schedule, folder, settings, Silent(), title="toy", **more)


def kill_self(signum: int) -> Callable[[Tensor], Tensor]:
    def change(value: Tensor) -> Tensor:
        os.kill(os.getpid(), signum)
        return value

    return change


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of the last state."""
    state = latest_state(folder)
    assert state is not None
    return {name: tensor.clone() for name, tensor in load_file(state.folder / "state.safetensors").items()}


def progress(folder: Path) -> list[dict[str, str]]:
    with (folder / PROGRESS_NAME).open(encoding="utf-8") as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def state_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())
