"""Saved states when the disk is full, the process is killed, or a file is damaged."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fakes.toys import SCHEDULE, run, state_names, tensors
from l2p_export.training.loop.masters import Weights, drop_gradients, move, take_gradients, trained_weights
from l2p_export.training.loop.states import latest_state, save_state
from l2p_runtime.errors import ArtifactError, HostError
from l2p_runtime.files import is_partial_of


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """The folder of an uninterrupted run."""
    run(tmp_path / "whole")
    return tmp_path / "whole"


def test_a_full_disk_keeps_the_states_before(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, real = tmp_path / "full", os.fsync

    def full(handle: int) -> None:
        if (folder / "step-00000004").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(HostError, match=r"cannot save the training state .* No space left on device") as failed:
        run(folder)
    assert failed.value.exit_code == 3
    assert "states before it are kept" in failed.value.hint
    assert state_names(folder) == ["step-00000004"]
    monkeypatch.undo()
    run(folder, seed=1)
    assert all(tensors(folder)[name].equal(tensor) for name, tensor in tensors(whole).items())


def test_moments_lie_in_memory_as_their_weights_do(tmp_path: Path) -> None:
    """Fused steps of AdamW refuse others: a head on a GPU keeps channels last."""

    def weights_of(seed: int) -> Weights:
        torch.manual_seed(seed)
        module = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return trained_weights(module, 0.01, 0.99, on_cpu=True)

    def step(weights: Weights, seed: int) -> None:
        torch.manual_seed(seed)
        for parameter in weights.parameters.values():
            parameter.grad = torch.randn_like(parameter)
        take_gradients(weights)
        move(weights, 0.9)
        drop_gradients(weights)

    whole, resumed = weights_of(1), weights_of(2)
    step(whole, 3)
    save_state(tmp_path, 1, 0.0, {}, whole)
    state = latest_state(tmp_path)
    assert state is not None
    state.load(resumed)
    for each in (whole, resumed):
        step(each, 4)
    for name, master in whole.masters.items():
        assert resumed.masters[name].equal(master)
        moments = resumed.optimizer.state[resumed.masters[name]]
        assert moments["exp_avg"].stride() == moments["exp_avg_sq"].stride() == master.stride()


@pytest.mark.parametrize("moment", ["numbers", "rename"])
def test_a_kill_while_saving_leaves_the_state_before(tmp_path: Path, whole: Path, moment: str) -> None:
    folder = tmp_path / "killed"
    child = os.fork()
    if child == 0:
        _die_while_saving(folder, moment)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert any(is_partial_of(path.name, "step-00000008") for path in folder.iterdir())
    state = latest_state(folder)
    assert state is not None
    assert state.step == 4
    run(folder, seed=1)
    assert state_names(folder) == ["step-00000008", "step-00000009"]
    assert not any(is_partial_of(path.name) for path in folder.iterdir())
    assert all(tensors(folder)[name].equal(tensor) for name, tensor in tensors(whole).items())


def _die_while_saving(folder: Path, moment: str) -> None:
    """In a process of its own: killed in the middle of its second save."""

    real_write, real_rename = Path.write_text, Path.rename

    def die() -> None:
        if (folder / "step-00000004").exists():
            os.kill(os.getpid(), signal.SIGKILL)

    def write(path: Path, text: str, encoding: str) -> int:
        die()
        return real_write(path, text, encoding)

    def rename(path: Path, target: Path) -> Path:
        die()
        return real_rename(path, target)

    if moment == "numbers":
        Path.write_text = write  # type: ignore[method-assign, assignment]
    else:
        Path.rename = rename  # type: ignore[method-assign, assignment]
    try:
        run(folder)
    finally:
        os._exit(0)


def _cut_off(state: Path) -> None:
    data = (state / "state.safetensors").read_bytes()
    (state / "state.safetensors").write_bytes(data[:-8])


def _without_a_tensor(state: Path) -> None:
    found = load_file(state / "state.safetensors")
    found.pop("second_moment.first.bias")
    save_file(found, state / "state.safetensors")


def _of_another_model(state: Path) -> None:
    found = load_file(state / "state.safetensors")
    save_file(found | {"averaged.first.bias": torch.zeros(7)}, state / "state.safetensors")


def _with_an_unknown_tensor(state: Path) -> None:
    found = load_file(state / "state.safetensors")
    save_file(found | {"weights.third.bias": torch.zeros(7)}, state / "state.safetensors")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_cut_off, "the file has"),
        (_without_a_tensor, "has no tensor `second_moment.first.bias`"),
        (_of_another_model, "has `averaged.first.bias` as F32 [7], expected F32 [6]"),
        (_with_an_unknown_tensor, "has a tensor `weights.third.bias` that this model has not"),
        (lambda state: (state / "state.safetensors").unlink(), "cannot read"),
        (lambda state: (state / "state.json").write_text("{"), "is no training state"),
        (lambda state: (state / "state.json").write_text("[]"), "is no training state"),
        (lambda state: (state / "state.json").write_text('{"step": "x"}'), "is no training state"),
        (lambda state: (state / "state.json").unlink(), "is no training state"),
    ],
)
def test_a_damaged_state_is_named(whole: Path, damage: Callable[[Path], object], says: str) -> None:
    """Without it, the run goes on from the state before."""
    last = whole / "step-00000009"
    expected = tensors(whole)
    damage(last)
    with pytest.raises(ArtifactError) as refused:
        run(whole)
    assert says in str(refused.value)
    assert str(whole) in str(refused.value)
    shutil.rmtree(last)
    run(whole)
    assert all(tensors(whole)[name].equal(tensor) for name, tensor in expected.items())


def test_states_of_the_safetensors_library_are_read(whole: Path) -> None:
    """Tensors may lie in any order."""
    path = whole / "step-00000009" / "state.safetensors"
    save_file(load_file(path), path)
    run(whole, replace(SCHEDULE, steps=10))
    assert json.loads((whole / "step-00000010" / "state.json").read_text())["step"] == 10
