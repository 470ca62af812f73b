"""Proves a build: compares its ONNX graphs with torch float32, and stores small cases with their expected outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from l2p_calib.ledger import END_TO_END, not_run, require_passed, threshold_of
from l2p_engines.store.stages import StageOutput, StageRunner, named_by_content
from l2p_export.proof.cases import (
    Case,
)
from l2p_export.proof.compare import compare_each, compare_networks
from l2p_export.proof.reference import References
from l2p_export.proof.stored import write_case
from l2p_export.toolchain import toolchain
from l2p_runtime.bundle import file_digest
from l2p_runtime.contract import (
    NETWORKS,
    BasePrecision,
    FileRecord,
    GraphRecord,
    LedgerEntry,
    ReferenceCase,
    fused_comparison,
    graph_comparison,
)
from l2p_runtime.contract.codec import from_json
from l2p_runtime.errors import UnsupportedError

if TYPE_CHECKING:
    from typing import Any

    from numpy.typing import NDArray

    from l2p_export.checkpoint.loading import LoadedModel
    from l2p_runtime.backends import Backend, Engine
    from l2p_runtime.progress import Reporter


@dataclass(frozen=True, slots=True)
class Proof:
    """The proof in a bundle: stored cases, their files, and the ledger."""

    references: tuple[ReferenceCase, ...]
    files: tuple[FileRecord, ...]
    ledger: tuple[LedgerEntry, ...]


@dataclass(frozen=True, slots=True)
class _Facts:
    references: tuple[ReferenceCase, ...]
    ledger: tuple[LedgerEntry, ...]


def prove(
    run: StageRunner,
    references: References,
    graphs: Sequence[GraphRecord],
    bases: Mapping[str, BasePrecision],
    files: Mapping[str, FileRecord],
    backend: Backend,
    reporter: Reporter,
) -> Proof:
    """Compare every ONNX graph with torch float32, and store the small cases and the minimum case of each profile.

    Args:
        run: runs the stage, or finds it.
        references: cases and their torch float32 outputs.
        graphs: ONNX graphs of every network and plan.
        bases: name of each plan to its base, which decides thresholds.
        files: path to record of the ONNX graphs' files.
        backend: runs the ONNX graphs.
        reporter: shows the calls.

    Raises:
        ParityError: a comparison is over its threshold.
    """
    plans = list(dict.fromkeys(record.plan for record in graphs))
    loaded, cases, too_large = references.loaded, references.cases, references.too_large
    inputs = {
        "graphs": [[record, *(files[path].sha256 for path in record.paths)] for record in graphs],
        "cases": cases,
        "left": [[reason, left] for reason, left in too_large],
        "thresholds": {
            plan: [threshold_of(bases[plan], network) for network in (*NETWORKS, END_TO_END)] for plan in plans
        },
        "backend": backend.identity,
        "tools": toolchain(),
    }

    def make(work: Path) -> StageOutput:
        ledger = [
            entry
            for plan in plans
            for reason, left in too_large
            for entry in not_run(graph_comparison(plan), left, reason)
        ]
        if not cases:
            return StageOutput(facts=_Facts((), tuple(ledger)))
        results = references.results()
        for plan in plans:
            of_plan = {record.network: record for record in graphs if record.plan == plan}
            ledger += _compare(run, loaded, plan, bases[plan], of_plan, files, backend, results, reporter)
            small = {case.name: results[case.name] for case in cases if case.stored}
            ledger += _compare_fused(run, loaded, plan, bases[plan], of_plan, files, backend, small, reporter)
        require_passed(ledger, bases)
        stored, made = _store(cases, results, work, loaded.model.spec.patch_px)
        return StageOutput("reference", tuple(made), _Facts(tuple(stored), tuple(ledger)))

    stage = run("proof", " ".join(plans), inputs, make)
    facts = from_json(_Facts, stage.facts)
    return Proof(facts.references, stage.files, facts.ledger)


def _compare(
    run: StageRunner,
    loaded: LoadedModel,
    plan: str,
    base: BasePrecision,
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

    comparison = graph_comparison(plan)
    with reporter.task(f"ledger {plan}", len(references) * len(networks), "calls") as advance:
        try:
            return compare_networks(comparison, base, networks, references, load, backend.device, advance)
        except UnsupportedError as error:
            return not_run(comparison, list(references), str(error))


def _compare_fused(
    run: StageRunner,
    loaded: LoadedModel,
    plan: str,
    base: BasePrecision,
    graphs: Mapping[str, GraphRecord],
    files: Mapping[str, FileRecord],
    backend: Backend,
    references: Mapping[str, Mapping[str, NDArray[Any]]],
    reporter: Reporter,
) -> list[LedgerEntry]:
    """Each fused graph on its own: another way to run a network, whose sequence is that of `_compare`."""
    networks = {spec.name: spec for spec in loaded.model.networks if graphs[spec.name].fused is not None}

    def load(network: str) -> Engine:
        record = graphs[network]
        return backend.load(run.path(files[record.fused or ""]), run.path(files[record.weights]), networks[network])

    comparison = fused_comparison(plan)
    with reporter.task(f"ledger {plan}, fused", len(references) * len(networks), "calls") as advance:
        try:
            return compare_each(comparison, base, networks, references, load, backend.device, advance)
        except UnsupportedError as error:
            return not_run(comparison, list(references), str(error))


def _store(
    cases: Sequence[Case], references: Mapping[str, Mapping[str, NDArray[Any]]], work: Path, patch_px: int
) -> tuple[list[ReferenceCase], list[tuple[Path, str]]]:
    stored, files = [], []
    for seed, case in enumerate(cases):
        if not case.stored:
            continue
        written = work / case.name
        write_case(written, references[case.name], seed)
        digest = file_digest(written)
        path = named_by_content(written, f"{case.name}.safetensors", digest)
        size = (case.rows * patch_px, case.columns * patch_px)
        stored.append(ReferenceCase(case.name, f"reference/{path.name}", *size, case.caption_tokens))
        files.append((path, digest))
    return stored, files
