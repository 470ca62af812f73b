"""Training loop shared by source and transfer. All randomness of a step follows from its number, so resuming is exact.

A run's folder holds its last two states, each complete or absent, and `progress.csv`.
"""

from __future__ import annotations

import csv
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from l2p_export.training.loop.distributed import ALONE, ProcessGroup, gathered, without_exchange
from l2p_export.training.loop.masters import (
    Weights,
    clip_gradients,
    drop_gradients,
    move,
    take_gradients,
    trained_weights,
    whole_averages,
)
from l2p_export.training.loop.settings import locked_folder
from l2p_export.training.loop.states import latest_state, save_state
from l2p_runtime.errors import ArtifactError, CancelledError, HostError, L2PError, UsageError
from l2p_runtime.files import write_text
from l2p_runtime.noise import checked_seed

if TYPE_CHECKING:
    from l2p_runtime.progress import Reporter

PROGRESS_NAME = "progress.csv"
COLUMNS = ("step", "samples", "loss", "gradient_norm", "learning_rate", "seconds")

CPU = torch.device("cpu")

LOSS_DECAY = 0.98
"""Decay of the printed loss: a running mean over about 50 steps."""


class StoppedError(L2PError):
    """SIGTERM stopped the run after its state was saved."""

    exit_code = 143


@dataclass(frozen=True, slots=True)
class Schedule:
    """Length, batch size and optimizer settings of a training run.

    Attributes:
        steps: optimizer steps.
        batch: samples per step.
        learning_rate: of AdamW, after the warm-up.
        warmup_steps: steps over which the learning rate rises from 0.
        cooldown_steps: last steps, over which it falls to 0.
        weight_decay: of AdamW; only for matrices.
        beta2: of AdamW.
        clip: maximum gradient norm.
        ema: decay of the EMA of the weights, which starts at the first step.
        micro_batches: parts in which a process computes its samples of a step; gradients accumulate.
        save_every: steps between saved states.
        seed: source of all randomness.
    """

    steps: int
    batch: int
    learning_rate: float
    warmup_steps: int = 100
    cooldown_steps: int = 0
    weight_decay: float = 0.01
    beta2: float = 0.99
    clip: float = 1.0
    ema: float = 0.999
    micro_batches: int = 1
    save_every: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            UsageError: names the one that is wrong.
        """
        for name in ("steps", "batch", "micro_batches", "save_every"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}, expected 1 or more")
        if not 0 < self.learning_rate < math.inf:
            raise UsageError(f"the learning rate is {self.learning_rate}, expected a positive number")
        for name in ("warmup_steps", "cooldown_steps"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} is {getattr(self, name)}, expected 0 or more")
        if not 0 <= self.ema < 1:
            raise UsageError(f"ema is {self.ema}, expected 0 up to 1")
        checked_seed(self.seed)
        if self.batch % self.micro_batches:
            raise UsageError(f"{self.batch} samples do not split into {self.micro_batches} equal parts")

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        cool = min(1.0, (self.steps - step) / max(1, self.cooldown_steps)) if self.cooldown_steps else 1.0
        return self.learning_rate * warm * cool


Loss = Callable[[int, int], Tensor]
"""(step, micro batch) to the mean loss over its samples."""

OnSave = Callable[[int, Mapping[str, Tensor]], None]
"""(step, EMA weights), after each saved state, on the rank that writes it."""


def train(
    module: nn.Module,
    loss: Loss,
    schedule: Schedule,
    folder: Path,
    settings: Mapping[str, Any],
    report: Reporter,
    *,
    title: str,
    on_save: OnSave = lambda step, averaged: None,
) -> Mapping[str, Tensor]:
    """Train the parameters of `module` that require a gradient; resumes from the folder's last state if it has one.

    Args:
        module: module to train, in float32, on its device.
        loss: loss of a micro batch; its samples must follow only from the step's number.
        schedule: length, batch size and optimizer settings.
        folder: folder of states and `progress.csv`.
        settings: settings of the run; resuming with other settings is refused, except for more steps.
        report: gets steps and loss.
        title: name of the run.
        on_save: called with the EMA weights after each saved state.

    Returns:
        The EMA of the trained weights by name, float32.

    Raises:
        ArtifactError: the loss or a gradient is NaN or Inf; the folder keeps the last good state.
        HostError: the folder cannot be written, or another run works in it.
        UsageError: the folder's state was made with other settings.
        StoppedError: SIGTERM; the state was saved.
        CancelledError: SIGINT; the state was saved.
    """
    weights = trained_weights(module, schedule.weight_decay, schedule.beta2)
    return train_weights(weights, loss, schedule, folder, settings, report, title=title, on_save=on_save)


def train_weights(
    weights: Weights,
    loss: Loss,
    schedule: Schedule,
    folder: Path,
    settings: Mapping[str, Any],
    report: Reporter,
    *,
    title: str,
    on_save: OnSave = lambda step, averaged: None,
    ranks: ProcessGroup = ALONE,
    called: nn.Module | None = None,
) -> Mapping[str, Tensor]:
    """As `train`, in one process of a group. All processes must call this with the same arguments; they stop together.

    Args:
        weights: trained weights.
        loss: loss of this process's samples.
        schedule: as for `train`; `batch` counts the samples of all processes.
        folder: a folder that every process can read; rank 0 writes.
        settings: as for `train`, without the number of processes.
        report: gets steps and loss.
        title: name of the run.
        on_save: called on rank 0.
        ranks: the process group.
        called: the module that the loss calls, if it averages gradients over ranks (DDP).

    Returns:
        The EMA of the trained weights by name. If they are sharded across ranks, only rank 0 gets them.

    Raises:
        As `train`.
    """
    with ExitStack() as stack:
        if ranks.is_rank_zero:
            stack.enter_context(locked_folder(folder, busy=f"another run is training in `{folder}`"))
        stopped = stack.enter_context(_stop_signals())
        step, seconds = _resume(folder, weights, settings, schedule.steps, ranks)
        saved_step = step
        write = _progress_writer(folder, step, stack) if ranks.is_rank_zero else _write_nothing
        tell = stack.enter_context(report.phases(title))
        started, mean_loss = time.monotonic() - seconds, math.nan

        def save() -> None:
            nonlocal saved_step
            if saved_step == step:
                return
            save_state(folder, step, time.monotonic() - started, settings, weights, ranks)
            saved_step = step
            averaged = whole_averages(weights, ranks)
            if ranks.is_rank_zero:
                on_save(step, averaged)

        while step < schedule.steps:
            rate = schedule.rate(step)
            for group in weights.optimizer.param_groups:
                group["lr"] = rate
            value, norm, stop = _gradients(loss, step, schedule, weights, ranks, called, stopped)
            if not (math.isfinite(value) and math.isfinite(norm)):
                # No weight has changed in this step, so this saves the last good state.
                save()
                raise ArtifactError(
                    f"{title}: at step {step} the loss is {value} and the gradient norm {norm}",
                    hint=f"the weights before it are kept in `{folder}`; look at the data, or lower the learning rate",
                )
            move(weights, min(schedule.ema, (step + 1) / (step + 11)))
            step += 1
            mean_loss = value if math.isnan(mean_loss) else LOSS_DECAY * mean_loss + (1 - LOSS_DECAY) * value
            elapsed = time.monotonic() - started
            write((step, step * schedule.batch, value, norm, rate, round(elapsed, 2)))
            tell(step / schedule.steps, f"step {step}, loss {mean_loss:.4f}")
            if step % schedule.save_every == 0 or step == schedule.steps or stop:
                save()
            if stop and step < schedule.steps:
                kind = CancelledError if stop == signal.SIGINT else StoppedError
                raise kind(f"{title}: stopped at step {step}", hint="the same command resumes from there")
        return whole_averages(weights, ranks)


def generator(*numbers: int, device: torch.device = CPU) -> torch.Generator:
    """A random generator seeded by a sequence of numbers: seed, step, and micro batch or sample.

    Its values depend only on the numbers and the kind of device.
    """
    import numpy as np

    (state,) = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state) & (2**63 - 1))


def _gradients(
    loss: Loss,
    step: int,
    schedule: Schedule,
    weights: Weights,
    ranks: ProcessGroup,
    called: nn.Module | None,
    stopped: Callable[[], int],
) -> tuple[float, float, int]:
    """Compute clipped gradients of one step.

    Returns:
        Mean loss and gradient norm over all ranks, and the signal that any of them received, or 0.
    """
    drop_gradients(weights)
    value = 0.0
    copied = any(master is not weights.parameters[name] for name, master in weights.masters.items())
    for micro in range(schedule.micro_batches):
        # Gradients that are copied away after each micro batch must be averaged before.
        apart = not copied and micro + 1 < schedule.micro_batches
        with nullcontext() if called is None else without_exchange(called, when=apart):
            part = loss(step, micro) / schedule.micro_batches
            part.backward()  # type: ignore[no-untyped-call]
        take_gradients(weights)
        value += float(part.detach())
    norm = clip_gradients(weights, schedule.clip, ranks)
    rows = gathered(ranks, [value, norm, stopped()])
    # The norm already covers the gradients of all ranks; the maximum is NaN or Inf if any is.
    norms = [row[1] for row in rows]
    worst = math.nan if any(map(math.isnan, norms)) else max(norms)
    return sum(row[0] for row in rows) / len(rows), worst, int(max(row[2] for row in rows))


def _resume(
    folder: Path, weights: Weights, settings: Mapping[str, Any], steps: int, ranks: ProcessGroup
) -> tuple[int, float]:
    """Load the folder's last state; returns step and seconds so far, or zeros."""
    saved = latest_state(folder)
    found = {int(row[0]) for row in gathered(ranks, [-1 if saved is None else saved.step])}
    if len(found) > 1:
        raise HostError(
            f"the processes see different states in `{folder}`: {', '.join(f'step {step}' for step in sorted(found))}",
            hint="put the folder of states on a disk that all machines share",
        )
    if saved is None:
        return 0, 0.0
    saved.require(settings, steps)
    saved.load(weights)
    return saved.step, saved.seconds


@contextmanager
def _stop_signals() -> Iterator[Callable[[], int]]:
    """SIGTERM and SIGINT stop the run after its step; the second of a kind acts as usual. Yields the first, or 0."""
    caught: list[int] = []

    def note(number: int, frame: object) -> None:
        del frame
        caught.append(number)
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # only the main thread may set handlers
        before = {}
    try:
        yield lambda: caught[0] if caught else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _progress_writer(folder: Path, step: int, stack: ExitStack) -> Callable[[tuple[float, ...]], None]:
    """Make a function that appends a row to `progress.csv`, and to TensorBoard's events if it is installed."""
    path = folder / PROGRESS_NAME
    _trim_progress(path, step)
    board = _board(folder / "tensorboard", step)
    if board is not None:
        stack.callback(board.close)

    def write(row: tuple[float, ...]) -> None:
        new = not path.exists()
        try:
            with path.open("a", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                if new:
                    writer.writerow(COLUMNS)
                writer.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in row])
        except OSError as error:
            raise HostError(
                f"cannot write `{path}`: {error.strerror or error}",
                hint="free disk space and run the same command again; it resumes from the last saved state",
            ) from error
        if board is not None:
            for name, value in zip(COLUMNS[2:5], row[2:5], strict=True):
                board.add_scalar(name, value, int(row[0]))

    return write


def _write_nothing(row: tuple[float, ...]) -> None:
    del row


def _board(folder: Path, step: int) -> Any:
    """TensorBoard's writer, or None if it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    # Drops events of steps after the resumed state.
    return SummaryWriter(str(folder), purge_step=step + 1)


def _trim_progress(path: Path, step: int) -> None:
    """Drop the lines of steps after the resumed state."""
    if not path.exists():
        return
    header, *rows = path.read_text(encoding="utf-8").splitlines() or [",".join(COLUMNS)]
    kept = [row for row in rows if row.partition(",")[0].isdigit() and int(row.partition(",")[0]) <= step]
    write_text(path, "\n".join([header, *kept]) + "\n")
