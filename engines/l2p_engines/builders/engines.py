"""Engines of a bundle: the options of a build, checks of resources, and the build of each engine."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from l2p_engines.builders.builder import build_memory_bytes
from l2p_engines.builders.readback import read_back
from l2p_engines.builders.request import BuildProgress, EngineSpec, require_timings
from l2p_engines.builders.shapes import HeadBudget, engine_profiles, stripe_rows
from l2p_engines.builders.stage import GraphToBuild, Meter, engine_record, engine_stage, is_built
from l2p_engines.builders.targets import parse_targets, require_dtypes, require_float32_products
from l2p_engines.builders.trt import EngineSettings, load_library, require_settings
from l2p_engines.forecast.calls import ENGINE_KERNEL_BYTES
from l2p_runtime.contract import (
    EngineBackend,
    EngineRecord,
    FileRecord,
    GraphRecord,
    LedgerEntry,
    ModelSpec,
    NetworkSpec,
    Profile,
    Target,
    engine_backend,
)
from l2p_runtime.errors import HostError, UsageError
from l2p_runtime.memory import available_host_bytes

if TYPE_CHECKING:
    from l2p_engines.store.stages import StageRunner
    from l2p_runtime.progress import Reporter

HEAD_BYTES = 4 << 30
"""Device memory of one stripe of the pixel head where nothing else is asked for: a 4096 px image in one, 8192 px in
three, on a card of 12 GiB beside the trunk's float16 weights when networks take turns."""


class EnginePlan(Protocol):
    """The facts of a precision plan that an engine build needs."""

    @property
    def name(self) -> str:
        """Name of the plan, as manifests spell it."""

    @property
    def default(self) -> str:
        """Dtype of layers that no rule names."""

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Every dtype that it computes in."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """The engines that a build is asked for.

    Attributes:
        targets: what each ONNX graph is compiled for; none for a bundle of only ONNX graphs.
        settings: how engines are built.
        head_bytes: device memory that one stripe of the pixel head may take; None for `HEAD_BYTES`, or a whole head
            where the model's cannot be cut.
        timings: kernel timings that TensorRT reads and writes; None without.
    """

    targets: tuple[Target, ...] = ()
    settings: EngineSettings = field(default_factory=EngineSettings)
    head_bytes: int | None = None
    timings: Path | None = None


@dataclass(frozen=True, slots=True)
class Engines:
    """Finished engines, as the manifest describes them."""

    records: tuple[EngineRecord, ...] = ()
    files: tuple[FileRecord, ...] = ()
    ledger: tuple[LedgerEntry, ...] = ()


def parse_engine_options(
    backend: str,
    targets: str | None,
    settings: EngineSettings,
    head_bytes: int | None = None,
    timings: Path | None = None,
) -> EngineOptions:
    """Read the engine options of `build`.

    Args:
        backend: `auto`, which builds engines when targets are named; `onnx`; or an engine library.
        targets: as `rtx-sm89,rtx-sm120`; None for `portable` with rtx, and the GPU of this machine with tensorrt.
        settings: how engines are built.
        head_bytes: see `EngineOptions`.
        timings: see `EngineOptions`.

    Raises:
        UsageError: a target or setting that does not exist, or that the backend does not have.
        HostError: the backend's library is not installed.
    """
    if backend == "onnx" or (backend == "auto" and targets is None):
        if targets is not None or settings != EngineSettings() or head_bytes is not None or timings is not None:
            raise UsageError(
                "engine options were given, but no engine is built",
                hint="name what engines are for: --target rtx-sm89; and leave out --backend onnx",
            )
        return EngineOptions()
    this: EngineBackend = "rtx" if backend == "auto" else engine_backend(backend)
    parsed = parse_targets(targets if targets is not None else "this" if this == "tensorrt" else "portable", this)
    foreign = [target.spelling for target in parsed if backend not in ("auto", target.backend)]
    if foreign:
        raise UsageError(
            f"--backend {backend} does not build for {', '.join(foreign)}", hint="leave --backend out, or correct it"
        )
    for target in parsed:
        require_settings(target.backend, settings)
        require_timings(target.backend, timings)
    return EngineOptions(parsed, settings, head_bytes, timings)


def require_engines_possible(
    options: EngineOptions,
    model: ModelSpec,
    profiles: Sequence[Profile],
    plans: Sequence[EnginePlan],
    float32_products: Mapping[str, Sequence[str]],
) -> None:
    """Refuse engines that no build can make. Needs only profiles and plans.

    Args:
        options: targets and settings.
        model: the model.
        profiles: sizes that the engines take.
        plans: precision plans, before or after anything is measured.
        float32_products: plan to the linear layers over tokens that it computes in float32.

    Raises:
        UsageError: a target lacks a dtype or its matrix products, a profile does not fit the model, or the head cannot
            be cut to fit its budget.
    """
    for target, plan in itertools.product(options.targets, plans):
        require_dtypes(target, plan.dtypes)
        require_float32_products(target, plan.name, float32_products[plan.name])
        for profile in profiles:
            try:
                stripe_rows(model, profile, _head_budget(options, model, plan))
            except HostError as error:
                raise UsageError(f"profile `{profile.name}`: {error}", hint="raise --head-memory") from error


def require_engine_resources(
    options: EngineOptions, weight_bytes: Mapping[tuple[str, str], int], disk_bytes: int, where: str
) -> None:
    """Refuse engines that this machine has no room for, before anything is built.

    Args:
        options: targets and settings.
        weight_bytes: (network, plan) to the bytes of its weights, for engines that are not built yet.
        disk_bytes: free bytes of the disk that they are written to.
        where: name of that folder, for messages.

    Raises:
        HostError: says how much is needed and how much is free.
    """
    if not options.targets or not weight_bytes:
        return
    network, plan = max(weight_bytes, key=lambda key: weight_bytes[key])
    needed, free = build_memory_bytes(weight_bytes[network, plan]), available_host_bytes()
    if needed > free:
        raise HostError(
            f"building the engine of `{network}` in {plan} needs about {needed:,} bytes of memory, {free:,} are free",
            hint="build where there is more, or choose a --precision with smaller weights",
        )
    engines = len(options.targets) * (sum(weight_bytes.values()) + ENGINE_KERNEL_BYTES * len(weight_bytes))
    if engines > disk_bytes:
        raise HostError(
            f"`{where}` has {disk_bytes:,} bytes free, the engines need about {engines:,}",
            hint="choose another --out or --store, or fewer targets",
        )


def build_engines(
    run: StageRunner,
    options: EngineOptions,
    model: ModelSpec,
    profiles: Sequence[Profile],
    plans: Sequence[EnginePlan],
    graphs: Sequence[tuple[NetworkSpec, GraphRecord]],
    files: Mapping[str, FileRecord],
    reporter: Reporter,
) -> Engines:
    """Compile every ONNX graph for every target, one at a time. Engines that exist are not built again.

    Args:
        run: keeps stages.
        options: targets and settings.
        model: the model.
        profiles: sizes that the engines take.
        plans: precision plans of the ONNX graphs.
        graphs: each network with its ONNX graph under a plan.
        files: path to record, of all ONNX graphs and weights.
        reporter: shows where each build stands.

    Raises:
        HostError: too little memory or disk, or the library failed.
        ParityError: an engine does not store its ONNX graph's weights in their precision.
    """
    if not options.targets:
        return Engines()
    versions = {backend: load_library(backend).version for backend in {target.backend for target in options.targets}}
    by_name = {plan.name: plan for plan in plans}
    requests = []
    for target, (network, record) in itertools.product(options.targets, graphs):
        plan = by_name[record.plan]
        shapes = engine_profiles(network, model, profiles, _head_budget(options, model, plan))
        spec = EngineSpec(network, plan.name, target, shapes, plan.dtypes, options.settings)
        requests.append(
            GraphToBuild(spec, files[record.graph], files[record.weights], versions[target.backend], options.timings)
        )
    left = [item for item in requests if not is_built(run, item)]
    sizes = {(item.spec.network.name, item.spec.plan): item.weights.size_bytes for item in left}
    require_engine_resources(options, sizes, shutil.disk_usage(run.home.root).free, str(run.home.root))
    made = [(item, engine_stage(run, item, _meter(reporter))) for item in requests]
    return Engines(
        records=tuple(engine_record(item, stage) for item, stage in made),
        files=tuple({record.path: record for _, stage in made for record in stage.files}.values()),
        ledger=tuple(entry for item, stage in made for entry in _ledger(item, stage.files[0].size_bytes)),
    )


def _ledger(item: GraphToBuild, engine_bytes: int) -> Iterator[LedgerEntry]:
    spec = item.spec
    read = read_back(spec, item.weights.size_bytes, engine_bytes)
    yield read
    reason = "this build opened no engine; `l2p-export verify` runs it on a machine that has the GPU"
    yield LedgerEntry(read.comparison, spec.network.name, "outputs", "not run", reason)


def _head_budget(options: EngineOptions, model: ModelSpec, plan: EnginePlan) -> HeadBudget | None:
    if options.head_bytes is None and model.head.halo_rows is None:
        return None
    precision = "fp32" if plan.default == "float32" else "fp16"
    return HeadBudget(options.head_bytes if options.head_bytes is not None else HEAD_BYTES, precision)


def _meter(reporter: Reporter) -> Meter:
    @contextmanager
    def meter(title: str) -> Iterator[Callable[[BuildProgress], None]]:
        with reporter.phases(title) as tell:
            yield lambda progress: tell(progress.fraction, _doing(progress))

    return meter


def _doing(progress: BuildProgress) -> str:
    if not progress.steps:
        return progress.phase
    return f"{progress.phase}, {progress.step} of {progress.steps}"
