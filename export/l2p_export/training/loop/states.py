"""Saved states of a training run: weights, EMA and optimizer moments as safetensors, numbers as JSON.

A state is a folder such as `step-00001200`. It is written to a temporary folder and renamed, so it is complete or
absent. Its tensors are whole and float32 for any number of ranks, so any number of ranks can resume from it.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from l2p_export.training.loop.distributed import ALONE, ProcessGroup, part_for
from l2p_export.training.loop.masters import Weights, whole_tensors, write_back
from l2p_export.training.loop.settings import differing_settings
from l2p_runtime.errors import ArtifactError, HostError, UsageError
from l2p_runtime.files import atomic_folder, sweep_partials
from l2p_runtime.tensorfile import header_bytes, open_tensorfile

if TYPE_CHECKING:
    from l2p_runtime.tensorfile import TensorFile

KEPT_STATES = 2
KINDS = ("weights", "averaged", "first_moment", "second_moment")
_STATE_NAME = re.compile(r"step-(\d{8})")
_GO_BACK = "remove `{}`; the run resumes from the state before it"
_TENSORS, _NUMBERS = "state.safetensors", "state.json"


@dataclass(frozen=True, slots=True)
class SavedState:
    """A state on disk; tensors are read when it is loaded.

    Attributes:
        step: optimizer steps so far.
        seconds: training time so far.
        settings: settings of the run.
    """

    folder: Path
    step: int
    seconds: float
    settings: dict[str, Any]

    def require(self, settings: Mapping[str, Any], steps: int) -> None:
        """Refuse to resume with other settings; only the numbers of steps and cooldown steps may differ.

        Raises:
            UsageError: settings differ, or the run is past `steps`.
        """
        differing = differing_settings(_comparable(self.settings), _comparable(settings))
        if differing:
            raise UsageError(
                f"`{self.folder.parent}` holds a run of other settings: {'; '.join(differing)}",
                hint="give the settings it began with, or another folder",
            )
        if steps < self.step:
            raise UsageError(
                f"`{self.folder.parent}` is at step {self.step}, past the {steps} that are asked for",
                hint="ask for more steps, or give another folder",
            )

    def load(self, weights: Weights) -> None:
        """Load weights, EMA and moments; each rank takes its shard of each tensor.

        Raises:
            ArtifactError: the state is damaged, or of another model.
        """
        try:
            file = open_tensorfile(self.folder / _TENSORS)
        except ArtifactError as error:
            raise ArtifactError(str(error), hint=_GO_BACK.format(self.folder)) from error
        unknown = sorted(file.tensors.keys() - {f"{kind}.{name}" for kind in KINDS for name in weights.masters})
        if unknown:
            raise _foreign(self.folder, f"has a tensor `{unknown[0]}` that this model has not")
        optimizer = weights.optimizer
        names = {id(master): name for name, master in weights.masters.items()}
        order = [names[id(master)] for group in optimizer.param_groups for master in group["params"]]
        moments = optimizer.state_dict()
        with torch.no_grad():
            for index, name in enumerate(order):
                like = weights.parameters[name]
                current, averaged, first, second = (self._read(file, f"{kind}.{name}", like) for kind in KINDS)
                weights.masters[name].copy_(current)
                weights.averaged[name].copy_(averaged)
                step = torch.tensor(float(self.step))
                # In the memory format of the master: fused steps refuse moments in another.
                first, second = (torch.empty_like(weights.masters[name]).copy_(part) for part in (first, second))
                moments["state"][index] = {"step": step, "exp_avg": first, "exp_avg_sq": second}
        optimizer.load_state_dict(moments)
        write_back(weights)

    def _read(self, file: TensorFile, name: str, like: Tensor) -> Tensor:
        info = file.tensors.get(name)
        if info is None:
            raise _foreign(self.folder, f"has no tensor `{name}`")
        if info.shape != tuple(like.shape) or info.dtype != "F32":
            found = f"{info.dtype} {list(info.shape)}"
            raise _foreign(self.folder, f"has `{name}` as {found}, expected F32 {list(like.shape)}")
        return part_for(torch.from_numpy(np.array(file.read(name))), like)


def save_state(
    folder: Path, step: int, seconds: float, settings: Mapping[str, Any], weights: Weights, ranks: ProcessGroup = ALONE
) -> None:
    """Write a state and delete all but the last two. Every rank must call this; rank 0 writes.

    Raises:
        HostError: the state cannot be written; earlier states are kept.
    """
    if not ranks.is_rank_zero:
        if ranks.is_sharded:
            for _ in whole_tensors(weights):
                pass
        return
    final = folder / f"step-{step:08}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Leftovers of a killed process; only one process writes here at a time.
        sweep_partials(folder)
        with atomic_folder(final) as partial:
            _write_tensors(partial / _TENSORS, weights)
            numbers = {"step": step, "seconds": seconds, "settings": dict(settings)}
            (partial / _NUMBERS).write_text(json.dumps(numbers, indent=1), encoding="utf-8")
    except OSError as error:
        raise HostError(
            f"cannot save the training state in `{folder}`: {error.strerror or error}",
            hint="free disk space and run the same command again; the states before it are kept",
        ) from error
    for old in _states(folder)[:-KEPT_STATES]:
        shutil.rmtree(old, ignore_errors=True)


def latest_state(folder: Path) -> SavedState | None:
    """The last complete state of a folder, or None.

    Raises:
        ArtifactError: its numbers are damaged.
    """
    states = _states(folder)
    if not states:
        return None
    path = states[-1] / _NUMBERS
    try:
        numbers = json.loads(path.read_text(encoding="utf-8"))
        return SavedState(states[-1], int(numbers["step"]), float(numbers["seconds"]), dict(numbers["settings"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(
            f"`{path}` is no training state: {error}",
            hint=_GO_BACK.format(states[-1]),
        ) from error


def _write_tensors(path: Path, weights: Weights) -> None:
    """Write tensors one by one, so that memory holds no second copy of the state."""
    # In the order of `whole_tensors`.
    shapes = {name: tuple(parameter.shape) for name, parameter in weights.parameters.items()}
    entries = [(f"{kind}.{name}", "F32", shape) for name, shape in shapes.items() for kind in KINDS]
    header, _ = header_bytes(entries, {"format": "pt"})
    # The caller syncs the folder with its files.
    with path.open("wb") as file:
        file.write(header)
        for _, tensor in whole_tensors(weights):
            file.write(tensor.numpy().reshape(-1).data)


def _states(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _STATE_NAME.fullmatch(path.name) and path.is_dir())


def _comparable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings after a JSON round trip, without the length of the run."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(settings)))
    schedule = plain.get("schedule")
    if isinstance(schedule, dict):
        plain["schedule"] = {key: value for key, value in schedule.items() if key not in ("steps", "cooldown_steps")}
    return plain


def _foreign(folder: Path, what: str) -> ArtifactError:
    return ArtifactError(
        f"`{folder}` {what}", hint=f"it is damaged, or of another model; remove `{folder}` or give another folder"
    )
