"""The training loop on a model of two layers: resuming, stopping, failing, and what is left behind each time."""

from __future__ import annotations

import errno
import math
import shutil
import signal
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fakes.toys import SCHEDULE, Toy, kill_self, progress, run, state_names, tensors
from l2p_engines.store.locks import locked
from l2p_export.training.loop.loop import PROGRESS_NAME, StoppedError, generator
from l2p_export.training.loop.masters import move, take_gradients, trained_weights
from l2p_export.training.loop.settings import LOCK_NAME
from l2p_export.training.loop.states import latest_state
from l2p_runtime.errors import ArtifactError, CancelledError, HostError, L2PError, UsageError


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """The folder of an uninterrupted run."""
    run(tmp_path / "whole")
    return tmp_path / "whole"


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("signum", "kind", "code"), [(signal.SIGTERM, StoppedError, 143), (signal.SIGINT, CancelledError, 130)]
)
def test_a_stopped_run_goes_on_exactly(
    tmp_path: Path, whole: Path, signum: int, kind: type[L2PError], code: int
) -> None:
    """Weights, averages, moments and progress are bit-equal to those of a run that was never stopped."""
    folder, before = tmp_path / "stopped", signal.getsignal(signum)
    with pytest.raises(kind, match="stopped at step 6") as stopped:
        run(folder, at={5: kill_self(signum)})
    assert stopped.value.exit_code == code
    assert signal.getsignal(signum) is before
    assert state_names(folder) == ["step-00000004", "step-00000006"]
    averaged = run(folder, seed=1)
    expected, found = tensors(whole), tensors(folder)
    assert expected.keys() == found.keys()
    assert len(found) == 4 * 3
    assert all(found[name].equal(tensor) for name, tensor in expected.items())
    assert all(averaged[name].equal(expected[f"averaged.{name}"]) for name in averaged)
    assert progress(folder) == progress(whole)


def test_a_finished_run_is_not_run_again(whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file() and path.parent != whole}
    averaged = run(whole, at={step: kill_self(signal.SIGTERM) for step in range(20)}, seed=1)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())
    assert all(averaged[name].equal(tensors(whole)[f"averaged.{name}"]) for name in averaged)


def test_averages_are_those_of_the_weights(whole: Path, tmp_path: Path) -> None:
    """The share that is kept grows from 1/11, so that early weights fade."""
    seen: list[dict[str, Tensor]] = []

    def remember(step: int, averaged: Mapping[str, Tensor]) -> None:
        found = tensors(tmp_path / "each")
        seen.append({name: found[f"weights.{name}"].clone() for name in averaged})

    run(tmp_path / "each", replace(SCHEDULE, save_every=1), on_save=remember)
    expected = {name: parameter.detach().clone() for name, parameter in Toy().named_parameters()}
    for step, current in enumerate(seen, 1):
        kept = min(SCHEDULE.ema, step / (step + 10))
        for name, value in current.items():
            expected[name] = expected[name] * kept + value * (1 - kept)
    for name in seen[0]:
        torch.testing.assert_close(tensors(whole)[f"averaged.{name}"], expected[name])
    assert len(seen) == SCHEDULE.steps


@pytest.mark.parametrize("parts", [2, 8])
def test_micro_batches_add_up_to_the_batch(tmp_path: Path, whole: Path, parts: int) -> None:
    run(tmp_path / "parts", replace(SCHEDULE, micro_batches=parts))
    for name, tensor in tensors(tmp_path / "parts").items():
        torch.testing.assert_close(tensor, tensors(whole)[name], rtol=1e-4, atol=1e-6)
    for found, expected in zip(progress(tmp_path / "parts"), progress(whole), strict=True):
        assert float(found["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-4)
        assert float(found["gradient_norm"]) == pytest.approx(float(expected["gradient_norm"]), rel=1e-4)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda value: value * math.nan, "the loss is nan"),
        (lambda value: value * math.inf, "the loss is inf"),
        # The loss is finite, its gradient is not.
        (lambda value: value + (value * 0).sqrt() * 0 + (value - value.detach()).abs().sqrt(), "gradient norm nan"),
    ],
)
def test_nan_stops_and_keeps_the_last_good_state(
    tmp_path: Path, whole: Path, change: Callable[[Tensor], Tensor], says: str
) -> None:
    folder = tmp_path / "bad"
    with pytest.raises(ArtifactError, match="at step 6") as failed:
        run(folder, at={6: change})
    assert says in str(failed.value)
    assert failed.value.exit_code == 4
    assert state_names(folder) == ["step-00000004", "step-00000006"]
    run(folder, seed=1)
    assert all(tensors(folder)[name].equal(tensor) for name, tensor in tensors(whole).items())


def test_nan_at_the_first_step_leaves_no_state(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="at step 0"):
        run(tmp_path / "bad", at={0: lambda value: value * math.nan})
    assert state_names(tmp_path / "bad") == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"learning_rate": 0.02}, "schedule.learning_rate is 0.02, it began with 0.01"),
        ({"batch": 16, "seed": 4}, "schedule.batch is 16, it began with 8; schedule.seed is 4, it began with 2"),
        ({"steps": 8}, "is at step 9, past the 8 that are asked for"),
    ],
)
def test_other_settings_are_refused_by_name(whole: Path, change: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as refused:
        run(whole, replace(SCHEDULE, **change))
    assert says in str(refused.value)


def test_a_run_may_be_given_more_steps(whole: Path) -> None:
    """The cooldown moves to the new end."""
    longer = replace(SCHEDULE, steps=14, cooldown_steps=5)
    run(whole, longer)
    rows = progress(whole)
    assert [int(row["step"]) for row in rows] == list(range(1, 15))
    rates = [float(row["learning_rate"]) for row in rows]
    assert rates[:9] == pytest.approx([SCHEDULE.rate(step) for step in range(9)], rel=1e-5)
    assert rates[9:] == pytest.approx([longer.rate(step) for step in range(9, 14)], rel=1e-5)
    assert rates[9] == SCHEDULE.learning_rate
    state = latest_state(whole)
    assert state is not None
    assert state.step == 14


def test_a_disk_that_is_full_for_progress_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    def full(path: Path, *arguments: Any, **more: Any) -> Any:
        if path.name == PROGRESS_NAME:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, *arguments, **more)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(HostError, match=r"progress\.csv`: No space left on device"):
        run(tmp_path / "full")


def test_two_runs_do_not_share_a_folder(whole: Path) -> None:
    with locked(whole / LOCK_NAME), pytest.raises(HostError, match="another run is training in"):
        run(whole)


def test_progress_holds_no_step_twice(whole: Path) -> None:
    """A run that was killed after its last state has written steps that are taken again."""
    shutil.rmtree(whole / "step-00000009")
    with (whole / PROGRESS_NAME).open("a") as file:
        file.write("10,80,0.5")
    expected = [str(step) for step in range(1, 10)]
    run(whole)
    assert [row["step"] for row in progress(whole)] == expected


def test_scalars_go_to_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    boards: list[Any] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            self.folder, self.purge_step, self.is_closed = folder, purge_step, False
            self.rows: list[tuple[str, float, int]] = []
            boards.append(self)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            self.rows.append((name, value, step))

        def close(self) -> None:
            self.is_closed = True

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    with pytest.raises(StoppedError):
        run(tmp_path / "board", at={5: kill_self(signal.SIGTERM)})
    run(tmp_path / "board")
    assert [board.purge_step for board in boards] == [1, 7]
    assert all(board.is_closed and board.folder == str(tmp_path / "board" / "tensorboard") for board in boards)
    losses = [(step, value) for board in boards for name, value, step in board.rows if name == "loss"]
    rows = progress(tmp_path / "board")
    assert losses == [(int(row["step"]), pytest.approx(float(row["loss"]), rel=1e-5)) for row in rows]
    assert {name for board in boards for name, *_ in board.rows} == {"loss", "gradient_norm", "learning_rate"}


@pytest.mark.parametrize("name", ["steps", "batch", "micro_batches", "save_every"])
def test_schedules_count_from_one(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} is 0, expected 1 or more"):
        replace(SCHEDULE, **{name: 0})


@pytest.mark.parametrize("rate", [0.0, -1.0, math.inf, math.nan])
def test_learning_rates_are_positive(rate: float) -> None:
    with pytest.raises(UsageError, match="learning rate"):
        replace(SCHEDULE, learning_rate=rate)


@pytest.mark.parametrize(("name", "value"), [("warmup_steps", -1), ("cooldown_steps", -1), ("ema", 1.0), ("ema", -0.1)])
def test_schedules_stay_in_range(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"{name} is {value}, expected 0"):
        replace(SCHEDULE, **{name: value})


def test_batches_split_evenly() -> None:
    with pytest.raises(UsageError, match="8 samples do not split into 3 equal parts"):
        replace(SCHEDULE, micro_batches=3)


def test_matrices_alone_decay() -> None:
    weights = trained_weights(Toy(), 0.1, 0.99)
    decays = {id(p): group["weight_decay"] for group in weights.optimizer.param_groups for p in group["params"]}
    assert {name: decays[id(master)] for name, master in weights.masters.items()} == {
        "first.weight": 0.1,
        "first.bias": 0.0,
        "second.weight": 0.1,
    }


@pytest.mark.parametrize("narrow", [False, True])
def test_masters_on_the_cpu_move_like_weights(narrow: bool) -> None:
    """The module's matrices are the masters', rounded to BF16 where that is asked for; gradients add up in float32."""
    plain, copied = Toy(), Toy()
    weights = trained_weights(plain, 0.01, 0.99)
    masters = trained_weights(copied, 0.01, 0.99, on_cpu=True, narrow=narrow)
    for step in range(3):
        for name, parameter in plain.named_parameters():
            if not parameter.requires_grad:
                continue
            own = copied.get_parameter(name)
            gradients = [torch.randn(parameter.shape, generator=generator(step, part + 1)) for part in range(2)]
            gradients = [part.to(own.dtype).to(torch.float32) for part in gradients]
            parameter.grad = gradients[0] + gradients[1]
            weights.masters[name].grad = parameter.grad
        for part in range(2):
            for parameter in masters.parameters.values():
                drawn = torch.randn(parameter.shape, generator=generator(step, part + 1))
                parameter.grad = drawn.to(parameter.dtype)
            take_gradients(masters)
        for each in (weights, masters):
            for group in each.optimizer.param_groups:
                group["lr"] = 0.01
            move(each, 0.5)
        for master in masters.masters.values():
            master.grad = None
    for name, master in masters.masters.items():
        torch.testing.assert_close(master, weights.masters[name])
        torch.testing.assert_close(masters.averaged[name], weights.averaged[name])
        dtype = torch.bfloat16 if narrow and master.ndim == 2 else torch.float32
        assert masters.parameters[name].dtype == dtype
        assert masters.parameters[name].equal(master.to(dtype))
