"""Makes the precision plans of a build: from measurements, from a file, or by name; and checks their ranges.

ONNX Runtime on the CPU computes float16 ONNX graphs in float32 between casts, so comparisons there show no overflow.
Therefore values are measured in torch float32, and compared with the range of float16.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2p_calib.layout import layer_of, layer_of_point
from l2p_calib.plans.file import PlanFile, check_digests, plan_to_bytes
from l2p_calib.plans.float8 import float8_plan
from l2p_calib.plans.float16 import FLOAT16_MAX, HEADROOM, Measurement, largest, measured_plan, overflows
from l2p_calib.plans.plan import MEASURED, PLANS, NamedPlan, PrecisionPlan
from l2p_calib.statistics.ranges import (
    NetworkStatistics,
    Statistics,
    merge_networks,
    network_statistics,
    require_usable,
    statistics_to_bytes,
)
from l2p_calib.statistics.torch_hooks import counting
from l2p_engines.store.stages import StageOutput, StageRunner, named_by_content
from l2p_export.proof.cases import Case, case_inputs, small_cases
from l2p_export.tensors.digests import WeightDigests
from l2p_export.toolchain import toolchain
from l2p_runtime.bundle import file_digest
from l2p_runtime.contract import BasePrecision, FileRecord, LedgerEntry, PlanRef, ranges_comparison
from l2p_runtime.contract.codec import from_json
from l2p_runtime.errors import ArtifactError, ParityError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

    from l2p_export.checkpoint.loading import LoadedModel
    from l2p_export.families import Model, Networks
    from l2p_export.proof.reference import References
    from l2p_export.tensors.sources import TensorSource
    from l2p_runtime.progress import Reporter

TIMES = (0.02, 0.35, 0.65, 0.98)
"""Timesteps of the call that is measured in addition to the proof's cases. They are one batch, since every call has to
read all weights, however small its image."""

CASE = "ranges"
"""Name of the case under which the ledger compares measured values with the range of float16."""

_TIMES_CASE = "timesteps"


@dataclass(frozen=True, slots=True)
class ResolvedPlan:
    """A final plan, from which ONNX graphs can be exported.

    Attributes:
        file: the whole plan in the bundle; None for a plan that its name defines completely.
        ledger: entries that compare measured values with the range of float16.
    """

    plan: PrecisionPlan
    file: FileRecord | None = None
    ledger: tuple[LedgerEntry, ...] = ()

    @property
    def ref(self) -> PlanRef:
        """Its record in the manifest."""
        return replace(self.plan.ref, file=self.file.path if self.file else None)


@dataclass(frozen=True, slots=True)
class PrecisionRequest:
    """The plans that a build was asked for.

    Attributes:
        plans: plans by name, before anything is measured.
        files: whole plans, read from files.
        statistics: earlier measurements, in addition to those of the build; None without any.
    """

    plans: tuple[NamedPlan, ...]
    files: tuple[PlanFile, ...] = ()
    statistics: Statistics | None = None


@dataclass(frozen=True, slots=True)
class _Facts:
    ledger: tuple[LedgerEntry, ...]
    plan: PrecisionPlan


def make_plans(
    run: StageRunner, asked: PrecisionRequest, digests: WeightDigests, references: References, reporter: Reporter
) -> tuple[ResolvedPlan, ...]:
    """The final plans of a build, in the order they were asked for.

    Raises:
        ArtifactError: a plan or statistics are of other weights, or a network makes NaN or Inf in float32.
        ParityError: measured values exceed a plan's dtypes.
    """
    by_network = network_digests(digests)
    for file in asked.files:
        check_digests(file, by_network)
    measuring = _Measuring(asked, by_network, references, reporter)
    wanted: tuple[NamedPlan | PlanFile, ...] = (*asked.plans, *asked.files)
    return tuple(_make_plan(run, item, measuring) for item in wanted)


def plain_plan(model: Networks, base: BasePrecision, name: str | None = None) -> PrecisionPlan:
    """The plan of a base for a model, before anything is measured; its name is that of its base by default."""
    named = replace(PLANS[base], name=name or base)
    return named.of(model.layout(spec.name) for spec in model.networks)


def float32_products(model: Networks, plan: PrecisionPlan) -> tuple[str, ...]:
    """Linear layers that a plan computes in float32, without those that multiply one row per image."""
    return tuple(
        layer
        for spec in model.networks
        for tensor, rows in model.operations(spec.name).linear_layers.items()
        if rows != "call" and plan.carrier(layer := layer_of(tensor)) == "float32"
    )


def network_digests(digests: WeightDigests) -> dict[str, str]:
    """Network to the digest that identifies it in plans and statistics; the trunk's is the trunk digest."""
    return {name: digests.trunk_sha256 if name == "trunk" else digest for name, digest in digests.groups}


def weight_peaks(tensors: Mapping[str, TensorSource], names: Sequence[str]) -> dict[str, float]:
    """Name of each tensor to its maximum magnitude."""
    import numpy as np

    return {name: max((float(np.abs(chunk).max()) for chunk in tensors[name].chunks()), default=0.0) for name in names}


def network_points(model: Model, network: str) -> tuple[str, ...]:
    """Names of the points that are measured in a network."""
    return tuple(point.name for point in model.layout(network).points)


def _make_plan(run: StageRunner, asked: NamedPlan | PlanFile, measuring: _Measuring) -> ResolvedPlan:
    file = asked if isinstance(asked, PlanFile) else None
    plan = asked.plan if isinstance(asked, PlanFile) else _unmeasured(asked, measuring)
    if plan.default != "float16" and file is None:
        return ResolvedPlan(plan)
    inputs = {
        "plan": plan,
        "file": file,
        "is_measured": file is None and asked.base in MEASURED,
        "networks": measuring.digests,
        "cases": measuring.references.cases,
        "times": TIMES,
        "headroom": HEADROOM,
        "statistics": statistics_to_bytes(measuring.asked.statistics).decode() if measuring.asked.statistics else "",
        "tools": toolchain(),
    }

    def make(work: Path) -> StageOutput:
        measurements = measuring.measurements() if plan.default == "float16" else ()
        whole = file
        if isinstance(asked, NamedPlan) and inputs["is_measured"]:
            whole = (float8_plan if asked.float8 else measured_plan)(asked, measurements)
        chosen = whole.plan if whole is not None else plan
        facts = _Facts(_judge(chosen, measurements), chosen)
        if whole is None:
            return StageOutput(facts=facts)
        written = work / "plan"
        # The stage syncs its files before it is recorded.
        written.write_bytes(plan_to_bytes(whole))
        digest = file_digest(written)
        return StageOutput("plans", ((named_by_content(written, f"{plan.name}.json", digest), digest),), facts)

    stage = run("plan", plan.name, inputs, make)
    facts = from_json(_Facts, stage.facts)
    return ResolvedPlan(facts.plan, stage.files[0] if stage.files else None, facts.ledger)


def _unmeasured(asked: NamedPlan, measuring: _Measuring) -> PrecisionPlan:
    return plain_plan(measuring.references.loaded.model, asked.base, asked.name)


class _Measuring:
    """Measures all networks once, when the first plan needs it."""

    def __init__(
        self, asked: PrecisionRequest, digests: Mapping[str, str], references: References, reporter: Reporter
    ) -> None:
        self.asked, self.digests, self.references = asked, digests, references
        self._reporter = reporter
        self._found: tuple[Measurement, ...] | None = None

    def measurements(self) -> tuple[Measurement, ...]:
        if self._found is None:
            self._found = self._measure()
        return self._found

    def _measure(self) -> tuple[Measurement, ...]:
        loaded = self.references.loaded
        given = _given(self.asked, loaded.model, self.digests)
        own = self._run(loaded) if self.references.cases else {}
        if not own and not given:
            self._reporter.note(
                "this machine has too little memory to measure the values that float16 has to hold; branches get their "
                "usual scales and nothing else is checked: give --statistics"
            )
        found = []
        for spec in loaded.model.networks:
            parts = [part[spec.name] for part in (own, given) if spec.name in part]
            names = tuple(loaded.model.network_shapes(spec.name))
            peaks = weight_peaks(loaded.checkpoint.tensors, names)
            statistics = merge_networks(parts) if parts else None
            found.append(Measurement(loaded.model.layout(spec.name), self.digests[spec.name], peaks, statistics))
        return tuple(found)

    def _run(self, loaded: LoadedModel) -> dict[str, NetworkStatistics]:
        own: dict[str, NetworkStatistics] = {}

        @contextmanager
        def observe(network: str, module: nn.Module) -> Iterator[None]:
            with counting(module, network_points(loaded.model, network)) as counters:
                yield
                own[network] = network_statistics(network, self.digests[network], counters)

        inputs = timestep_inputs(loaded.model, small_cases(loaded.model.spec)[0])
        self.references.observed({_TIMES_CASE: inputs}, observe)
        return own


def timestep_inputs(model: Model, case: Case) -> dict[str, NDArray[Any]]:
    """The inputs of one case at the timesteps `TIMES`, as a batch: noise first, nearly a picture last."""
    import numpy as np

    single = case_inputs(model.spec, case, seed=0)
    picture = np.tanh(case_inputs(model.spec, case, seed=1)["image"])
    times = np.asarray(TIMES, np.float32)
    share = times[:, np.newaxis, np.newaxis, np.newaxis]
    batched = {name: np.repeat(single[name], len(times), axis=0) for name in ("prompt_embeds", "caption_mask")}
    image = share * picture + (1 - share) * single["image"]
    return {**single, **batched, "image": image.astype(np.float32), "time": times}


def _given(asked: PrecisionRequest, model: Model, digests: Mapping[str, str]) -> dict[str, NetworkStatistics]:
    """Statistics of this model's networks from the given file.

    Query, key and value must be in them if a plan needs their scales; files of earlier versions lack these.

    Raises:
        ArtifactError: they are of other networks, or lack points.
    """
    statistics = asked.statistics
    if statistics is None:
        return {}
    found = {name: item for name, sha256 in digests.items() if (item := statistics.of(name, sha256)) is not None}
    if not found:
        have = ", ".join(f"{item.network} {item.sha256[:16]}" for item in statistics.networks[:6]) or "nothing"
        raise ArtifactError(
            f"the statistics are of other networks: they hold {have}; the checkpoint has trunk {digests['trunk'][:16]}",
            hint="calibrate a bundle of this checkpoint",
        )
    for name, item in found.items():
        layout = model.layout(name)
        inputs = [part.layer for attention in layout.attentions for part in attention.inputs]
        is_rounded = any("attention" in plan.float8 for plan in asked.plans)
        points = network_points(model, name)
        optional = [] if is_rounded else [point for point in points if layer_of_point(point) in inputs]
        require_usable(item, set(points).difference(optional), optional)
    return found


def _judge(plan: PrecisionPlan, measurements: Sequence[Measurement]) -> tuple[LedgerEntry, ...]:
    """Entries that compare measured values with the range of float16.

    Raises:
        ParityError: a value exceeds it.
    """
    entries = []
    beyond: list[str] = []
    for item in measurements:
        comparison, network = ranges_comparison(plan.name), item.layout.network
        if item.statistics is None:
            entries.append(LedgerEntry(comparison, network, CASE, "not run", "nothing was measured of it"))
            continue
        beyond += [f"{point} ({peak:.3g})" for point, peak in overflows(plan, item)]
        point, peak = largest(plan, item)
        told = f"{peak:.3g} at {point} is the most of {item.statistics.calls} calls" if point else "nothing in float16"
        entries.append(LedgerEntry(comparison, network, CASE, "passed", f"{told}; float16 holds {FLOAT16_MAX:.0f}"))
    if beyond:
        shown = ", ".join(beyond[:4]) + (f" and {len(beyond) - 4} more" if len(beyond) > 4 else "")
        raise ParityError(
            f"plan `{plan.name}` overflows: float16 holds {FLOAT16_MAX:.0f}, and in float32 {shown} are more",
            hint="--precision fp16 scales and raises what needs it; bf16 and fp32 hold it as it is",
        )
    return tuple(entries)
