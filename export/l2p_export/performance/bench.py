"""Measures seconds and memory of a bundle's networks on this machine, beside the minimum time of its card."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2p_engines.forecast.calls import CallSize, border_bytes, forward_flops
from l2p_engines.forecast.cards import Card, find_card
from l2p_engines.forecast.fitting import Bound, step_bounds
from l2p_export.families.costs import network_costs
from l2p_export.graphs.stored import bundle_model
from l2p_runtime import Pipeline
from l2p_runtime.backends import Backend, Engine
from l2p_runtime.contract import NETWORKS, arithmetic
from l2p_runtime.errors import UsageError
from l2p_runtime.networks import open_plan
from l2p_runtime.noise import normal_noise
from l2p_runtime.requests import check_size

if TYPE_CHECKING:
    from l2p_runtime.backends import Array, Device
    from l2p_runtime.bundle import Bundle
    from l2p_runtime.contract import ModelSpec, NetworkSpec
    from l2p_runtime.progress import Reporter

STEP = "step"
"""Name of the whole denoising call among the networks. It includes the caption network, which runs once per prompt."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one network, all its stripes together, or of the whole call.

    Attributes:
        seconds: one value per run, in order.
        bound: minimum time that the card allows; None if that is unknown.
    """

    network: str
    seconds: tuple[float, ...]
    bound: Bound | None = None

    @property
    def median(self) -> float:
        """Median of the seconds."""
        return statistics.median(self.seconds)


@dataclass(frozen=True, slots=True)
class Bench:
    """The result of a measurement.

    Attributes:
        backend: name and version of the backend that ran the networks.
        device: the GPU's name, or the host's.
        load_seconds: from opening the bundle to networks that are ready.
        peak_bytes: maximum memory in use: of the device on a GPU, resident memory of the process on the host.
        networks_stay: whether all networks were in memory at once; if not, the times of a step include loading them.
    """

    backend: str
    device: str
    plan: str
    call: CallSize
    load_seconds: float
    timings: tuple[Timing, ...]
    peak_bytes: int
    networks_stay: bool


def bench(
    bundle: Bundle,
    backend: str,
    plan: str | None,
    size_px: tuple[int, int],
    caption_tokens: int,
    runs: int,
    reporter: Reporter,
    *,
    memory_budget_bytes: int | None = None,
    card: Card | None = None,
) -> Bench:
    """Time denoising calls on seeded noise, after one call that is not counted.

    Args:
        bundle: the bundle to run.
        backend: a backend by name, or `auto`.
        plan: precision plan; the first that runs if None.
        size_px: height and width.
        caption_tokens: number of caption tokens before padding.
        runs: number of calls to time.
        reporter: shows the calls.
        memory_budget_bytes: as in `Pipeline.open`.
        card: card whose peak figures bound the times; found by the GPU's name if None.

    Raises:
        UsageError: a size or caption that the model or its engines do not take, or no run.
        HostError: nothing runs here, or the call does not fit.
    """
    if runs < 1:
        raise UsageError(f"runs is {runs}, expected 1 or more")
    model = bundle.manifest.model
    _check_call(model, size_px, caption_tokens)
    opened = open_plan(bundle, backend, 0, plan)
    clock = _Clock(opened.backend.device)
    image = normal_noise(0, rows=(0, size_px[0]), cols=(0, size_px[1]))[None]
    embeds = normal_noise(1, channels=1, rows=(0, caption_tokens), cols=(0, model.caption_width))[0]
    steps: list[float] = []
    taken: list[dict[str, float]] = []
    clock.start_memory()
    started = time.perf_counter()
    with Pipeline.on_backend(replace(opened, backend=_timed(opened.backend, clock)), memory_budget_bytes) as pipe:
        load_seconds = time.perf_counter() - started
        with reporter.task(f"{opened.plan} on {opened.backend.name}", runs + 1, "calls") as advance:
            for _ in range(runs + 1):
                clock.seconds = dict.fromkeys(NETWORKS, 0.0)
                begun = time.perf_counter()
                pipe.denoise(image, 0.5, embeds)
                steps.append(time.perf_counter() - begun)
                taken.append(clock.seconds)
                advance(1)
        stays = pipe.keeps_networks
    call = CallSize(*size_px, model.padded(caption_tokens))
    device = opened.backend.device
    bounds = _bounds(bundle, opened.plan, call, card or _card_of(device))
    networks = [Timing(n, tuple(run[n] for run in taken[1:]), bounds.get(n)) for n in NETWORKS]
    whole = Timing(STEP, tuple(steps[1:]), _total(bounds))
    gpu = getattr(device, "gpu_name", device.name)
    return Bench(
        opened.backend.identity, gpu, opened.plan, call, load_seconds, (*networks, whole), clock.peak_bytes(), stays
    )


def check_bench(
    bundle: Bundle,
    backend: str,
    plan: str | None,
    size_px: tuple[int, int],
    caption_tokens: int,
    *,
    memory_budget_bytes: int | None = None,
) -> str:
    """Refuse what `bench` would, before anything is loaded; the plan that it would run.

    Raises:
        UsageError: a size or caption that the model or its engines do not take.
        HostError: nothing runs here, or the call does not fit.
    """
    model = bundle.manifest.model
    grid = _check_call(model, size_px, caption_tokens)
    opened = open_plan(bundle, backend, 0, plan)
    try:
        Pipeline.check_call(opened, grid, model.padded(caption_tokens), memory_budget_bytes)
    finally:
        opened.backend.device.close()
    return opened.plan


def _check_call(model: ModelSpec, size_px: tuple[int, int], caption_tokens: int) -> tuple[int, int]:
    """The token grid of a call."""
    grid = check_size(model, *size_px)
    if not 1 <= caption_tokens <= model.caption_tokens_max:
        raise UsageError(f"the caption has {caption_tokens} tokens, expected 1 to {model.caption_tokens_max}")
    return grid


class _Clock:
    """Measures the seconds of each network in one call, and the maximum memory in use."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self._free_bytes = self._least_free_bytes = 0
        self._on_host = device.name == "cpu"

    def start_memory(self) -> None:
        self._free_bytes = self._least_free_bytes = self.device.available_bytes()
        if self._on_host:
            # Resets the kernel's peak of resident memory.
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def note(self, network: str, seconds: float) -> None:
        self.seconds[network] = self.seconds.get(network, 0.0) + seconds
        if not self._on_host:
            self._least_free_bytes = min(self._least_free_bytes, self.device.available_bytes())

    def peak_bytes(self) -> int:
        if not self._on_host:
            return self._free_bytes - self._least_free_bytes
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


class _TimedEngine:
    """An engine whose runs are timed until the device has finished; implements `Engine`."""

    def __init__(self, engine: Engine, clock: _Clock) -> None:
        self._engine, self._clock = engine, clock
        self.spec = engine.spec

    def run(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        self._clock.device.synchronize()
        begun = time.perf_counter()
        self._engine.run(inputs, outputs)
        self._clock.device.synchronize()
        self._clock.note(self.spec.name, time.perf_counter() - begun)

    def memory_bytes(self) -> int:
        return self._engine.memory_bytes()

    def close(self) -> None:
        self._engine.close()


def _timed(backend: Backend, clock: _Clock) -> Backend:
    def timed(load: Callable[..., Engine]) -> Callable[..., Engine]:
        def loaded(first: Path, second: Any, spec: NetworkSpec) -> Engine:
            return _TimedEngine(load(first, second, spec), clock)

        return loaded

    engines = timed(backend.load_engine) if backend.load_engine is not None else None
    return replace(backend, load=timed(backend.load), load_engine=engines)


def _card_of(device: Device) -> Card | None:
    try:
        return find_card(getattr(device, "gpu_name", ""))
    except UsageError:
        return None


def _bounds(bundle: Bundle, plan: str, call: CallSize, card: Card | None) -> dict[str, Bound]:
    """The minimum time of each network; empty without a card, or without ONNX graphs, whose weights are needed."""
    manifest = bundle.manifest
    precision = arithmetic(manifest.plan(plan).base)
    if card is None or not card.runs(precision) or not all(manifest.has_graph(network, plan) for network in NETWORKS):
        return {}
    sizes = {name: bundle.path(manifest.graph(name, plan).weights).stat().st_size for name in NETWORKS}
    flops = forward_flops(manifest.model, network_costs(bundle_model(bundle, plan)), call)
    return step_bounds(card, precision, flops, sizes, border_bytes(manifest.model, call))


def _total(bounds: Mapping[str, Bound]) -> Bound | None:
    if not bounds:
        return None
    computes = [bound.compute_seconds for bound in bounds.values()]
    compute = sum(value for value in computes if value is not None) if None not in computes else None
    return Bound(sum(b.seconds for b in bounds.values()), compute, sum(b.memory_seconds for b in bounds.values()))
