"""The proof in a bundle: graphs are run against torch float32, and small cases travel with their expected outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from l2p_calib.ledger import END_TO_END, require_passed, threshold_of
from l2p_engines.forecast.calls import CallSize, forward_flops, total_flops
from l2p_engines.store.stages import Made, StageRunner, named_by_content
from l2p_export.proof.compare import (
    CORNER_PIXELS_MAX,
    LEAST_FLOPS_MAX,
    LEAST_PIXELS_MAX,
    Case,
    case_inputs,
    compare_networks,
    corner_cases,
    graph_stage_name,
    least_case,
    not_run,
    small_cases,
)
from l2p_export.proof.reference import reference_bytes, run_reference
from l2p_export.proof.stored import write_case
from l2p_export.tensors.digests import toolchain
from l2p_runtime.bundle import file_digest
from l2p_runtime.contract import NETWORKS, FileRecord, GraphRecord, LedgerEntry, Profile, ReferenceCase
from l2p_runtime.contract.codec import from_json
from l2p_runtime.errors import UnsupportedError
from l2p_runtime.memory import available_host_bytes, call_memory

if TYPE_CHECKING:
    from typing import Any

    from numpy.typing import NDArray
    from torch import nn

    from l2p_export.checkpoint.loading import LoadedModel
    from l2p_runtime.backends import Backend, Engine
    from l2p_runtime.progress import Reporter


_ACTIVATION_COPIES = 2
"""Memory of a large case over what the runtime forecasts: torch took 1.3 to 1.5 times as much in the pixel head."""


@dataclass(frozen=True, slots=True)
class Proof:
    """What a bundle stores of its proof: cases, their files, and the ledger."""

    references: tuple[ReferenceCase, ...]
    files: tuple[FileRecord, ...]
    ledger: tuple[LedgerEntry, ...]


@dataclass(frozen=True, slots=True)
class _Facts:
    references: tuple[ReferenceCase, ...]
    ledger: tuple[LedgerEntry, ...]


class References:
    """The cases of a build, and what torch float32 makes of them: run once, to be measured and to be compared with."""

    def __init__(self, loaded: LoadedModel, profiles: Sequence[Profile], reporter: Reporter) -> None:
        self.loaded, self._reporter = loaded, reporter
        self.cases, self.too_large = _choose(loaded, profiles)
        self._results: dict[str, dict[str, NDArray[Any]]] | None = None

    def results(self) -> dict[str, dict[str, NDArray[Any]]]:
        """Case name to inputs and, as `network.output`, outputs."""
        if self._results is None:
            self._results = self._run({})
        return self._results

    def observed(
        self,
        more: Mapping[str, Mapping[str, NDArray[Any]]],
        observe: Callable[[str, nn.Module], AbstractContextManager[object]],
    ) -> None:
        """Run all cases, and others that are given by their inputs, in a context for each network."""
        results = self._run(more, observe)
        self._results = {name: case for name, case in results.items() if name not in more}

    def _run(
        self,
        more: Mapping[str, Mapping[str, NDArray[Any]]],
        observe: Callable[[str, nn.Module], AbstractContextManager[object]] = lambda network, module: nullcontext(),
    ) -> dict[str, dict[str, NDArray[Any]]]:
        model = self.loaded.model
        inputs = {case.name: case_inputs(model.spec, case, seed) for seed, case in enumerate(self.cases)} | dict(more)
        calls = len(inputs) * len(model.networks)
        with self._reporter.stage("reference in torch float32", calls, "calls") as advance:
            return run_reference(self.loaded, inputs, advance, observe)


def prove(
    run: StageRunner,
    references: References,
    graphs: Sequence[GraphRecord],
    files: Mapping[str, FileRecord],
    backend: Backend,
    reporter: Reporter,
) -> Proof:
    """Compare every graph with torch float32 and store small cases, and the least call that each profile holds.

    Args:
        run: keeps stages.
        references: cases and what is expected of them.
        graphs: of every network and plan.
        files: path to record of the graphs' files.
        backend: runs the graphs.
        reporter: shows the calls.

    Raises:
        ParityError: a comparison is over its threshold.
    """
    plans = list(dict.fromkeys(record.plan for record in graphs))
    loaded, cases, too_large = references.loaded, references.cases, references.too_large
    inputs = {
        "graphs": [[record, files[record.graph].sha256, files[record.weights].sha256] for record in graphs],
        "cases": cases,
        "left": [[reason, left] for reason, left in too_large],
        "thresholds": {plan: [threshold_of(plan, network) for network in (*NETWORKS, END_TO_END)] for plan in plans},
        "backend": backend.identity,
        "tools": toolchain(),
    }

    def make(work: Path) -> Made:
        ledger = [
            entry
            for plan in plans
            for reason, left in too_large
            for entry in not_run(graph_stage_name(plan), left, reason)
        ]
        if not cases:
            return Made(facts=_Facts((), tuple(ledger)))
        results = references.results()
        for plan in plans:
            of_plan = {record.network: record for record in graphs if record.plan == plan}
            ledger += _compare(run, loaded, plan, of_plan, files, backend, results, reporter)
        require_passed(ledger)
        stored, made = _store(cases, results, work, loaded.model.spec.patch_px)
        return Made("reference", tuple(made), _Facts(tuple(stored), tuple(ledger)))

    stage = run("proof", " ".join(plans), inputs, make)
    facts = from_json(_Facts, stage.facts)
    return Proof(facts.references, stage.files, facts.ledger)


def _compare(
    run: StageRunner,
    loaded: LoadedModel,
    plan: str,
    graphs: Mapping[str, GraphRecord],
    files: Mapping[str, FileRecord],
    backend: Backend,
    references: Mapping[str, Mapping[str, NDArray[Any]]],
    reporter: Reporter,
) -> list[LedgerEntry]:
    networks = {spec.name: spec for spec in loaded.model.networks}

    def load(network: str) -> Engine:
        record = graphs[network]
        return backend.load(run.path(files[record.graph]), run.path(files[record.weights]), networks[network])

    stage = graph_stage_name(plan)
    with reporter.stage(f"ledger {plan}", len(references) * len(networks), "calls") as advance:
        try:
            return compare_networks(stage, plan, networks, references, load, backend.device, advance)
        except UnsupportedError as error:
            return not_run(stage, list(references), str(error))


def _choose(loaded: LoadedModel, profiles: Sequence[Profile]) -> tuple[list[Case], list[tuple[str, list[str]]]]:
    """Cases that this machine runs, and the names of the others with the reason."""
    spec, available = loaded.model.spec, available_host_bytes()
    least = [least_case(spec, profile) for profile in profiles]
    corners = [case for profile in profiles for case in corner_cases(spec, profile)]
    # The ledger tells cases apart by name. Of two that have one size, the one that is stored comes first and stays.
    cases: dict[str, Case] = {}
    for case in (*small_cases(spec), *least, *corners):
        cases.setdefault(case.name, case)
    needed = reference_bytes(loaded.model)
    if needed > available:
        # The figure of the moment stays out of the reason: it would make each build another one.
        reason = f"a block in float32 takes about {needed:,} bytes here, more than are free"
        return [], [(reason, list(cases))]
    chosen: list[Case] = []
    left: dict[str, list[str]] = {}
    for case in cases.values():
        reason = _too_large(loaded, case, available)
        if reason:
            left.setdefault(reason, []).append(case.name)
        else:
            chosen.append(case)
    return chosen, list(left.items())


def _too_large(loaded: LoadedModel, case: Case, available_bytes: int) -> str:
    """Why a case is more than a build should run; empty where it is not."""
    spec = loaded.model.spec
    pixels = case.rows * case.columns * spec.patch_px**2
    if pixels <= CORNER_PIXELS_MAX:
        return ""
    most = LEAST_PIXELS_MAX if case.stored else CORNER_PIXELS_MAX
    if pixels > most:
        return f"larger than the {most:,} pixels that a build runs in torch"
    weights = {name: loaded.model.network_shapes(name) for name in NETWORKS}
    call = CallSize(case.rows * spec.patch_px, case.columns * spec.patch_px, case.caption_tokens)
    flops = total_flops(forward_flops(spec, weights, call).values()).total
    if flops > LEAST_FLOPS_MAX:
        return f"takes {flops / 1e12:.1f} TFLOP, a build spends {LEAST_FLOPS_MAX / 1e12:.0f} on a large case in torch"
    need = call_memory(spec, 1, case.rows, case.columns, spec.padded(case.caption_tokens))
    needed = need.buffers_bytes + _ACTIVATION_COPIES * max(need.tokens_bytes, case.rows * need.head_row_bytes)
    if needed > available_bytes:
        return f"takes about {needed:,} bytes in float32 here, more than are free"
    return ""


def _store(
    cases: Sequence[Case], references: Mapping[str, Mapping[str, NDArray[Any]]], work: Path, patch_px: int
) -> tuple[list[ReferenceCase], list[tuple[Path, str]]]:
    stored, files = [], []
    for seed, case in enumerate(cases):
        if not case.stored:
            continue
        partial = work / case.name
        write_case(partial, references[case.name], seed)
        digest = file_digest(partial)
        path = named_by_content(partial, f"{case.name}.safetensors", digest)
        size = (case.rows * patch_px, case.columns * patch_px)
        stored.append(ReferenceCase(case.name, f"reference/{path.name}", *size, case.caption_tokens))
        files.append((path, digest))
    return stored, files
