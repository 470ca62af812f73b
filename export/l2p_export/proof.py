"""The proof in a bundle: graphs are run against torch float32, and small cases travel with their expected outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from l2p_calib.ledger import THRESHOLDS, require_passed
from l2p_engines.stages import Made, StageRunner, named_by_content
from l2p_export.digests import toolchain
from l2p_export.reference import reference_bytes, run_reference
from l2p_export.verification import (
    CORNER_PIXELS_MAX,
    Case,
    case_inputs,
    compare_networks,
    corner_cases,
    graph_stage_name,
    not_run,
    small_cases,
)
from l2p_runtime.bundle import file_digest
from l2p_runtime.contract import FileRecord, GraphRecord, LedgerEntry, Profile, ReferenceCase
from l2p_runtime.contract.codec import from_json
from l2p_runtime.errors import UnsupportedError
from l2p_runtime.memory import available_host_bytes
from l2p_runtime.tensorfile import write_tensorfile

if TYPE_CHECKING:
    from typing import Any

    from numpy.typing import NDArray

    from l2p_export.loading import LoadedModel
    from l2p_export.progress import Reporter
    from l2p_runtime.backends import Backend, Engine


@dataclass(frozen=True, slots=True)
class Proof:
    """What a bundle stores of its proof: small cases, their files, and the ledger."""

    references: tuple[ReferenceCase, ...]
    files: tuple[FileRecord, ...]
    ledger: tuple[LedgerEntry, ...]


@dataclass(frozen=True, slots=True)
class _Facts:
    references: tuple[ReferenceCase, ...]
    ledger: tuple[LedgerEntry, ...]


def prove(
    run: StageRunner,
    loaded: LoadedModel,
    profiles: Sequence[Profile],
    graphs: Sequence[GraphRecord],
    files: Mapping[str, FileRecord],
    backend: Backend,
    reporter: Reporter,
) -> Proof:
    """Compare every graph with torch float32 and store the small cases.

    Args:
        run: keeps stages.
        loaded: the checkpoint.
        profiles: their corners are run too, where they are small enough.
        graphs: of every network and plan.
        files: path to record of the graphs' files.
        backend: runs the graphs.
        reporter: shows the calls.

    Raises:
        ParityError: a comparison is over its threshold.
    """
    plans = list(dict.fromkeys(record.plan for record in graphs))
    corners = dict.fromkeys(case for profile in profiles for case in corner_cases(loaded.model.spec, profile))
    cases, too_large = _choose(loaded, small_cases(loaded.model.spec), list(corners))
    inputs = {
        "graphs": [[record, files[record.graph].sha256, files[record.weights].sha256] for record in graphs],
        "cases": cases,
        "left": [[reason, left] for reason, left in too_large],
        "thresholds": {plan: THRESHOLDS.get(plan) for plan in plans},
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
        references = _references(loaded, cases, reporter)
        for plan in plans:
            of_plan = {record.network: record for record in graphs if record.plan == plan}
            ledger += _compare(run, loaded, plan, of_plan, files, backend, references, reporter)
        require_passed(ledger)
        stored, made = _store([case for case in cases if case.stored], references, work, loaded.model.spec.patch_px)
        return Made("reference", tuple(made), _Facts(tuple(stored), tuple(ledger)))

    stage = run("proof", " ".join(plans), inputs, make)
    facts = from_json(_Facts, stage.facts)
    return Proof(facts.references, stage.files, facts.ledger)


def _references(loaded: LoadedModel, cases: Sequence[Case], reporter: Reporter) -> dict[str, dict[str, NDArray[Any]]]:
    inputs = {case.name: case_inputs(loaded.model.spec, case, seed) for seed, case in enumerate(cases)}
    with reporter.stage("reference in torch float32", len(cases) * len(loaded.model.networks), "calls") as advance:
        return run_reference(loaded, inputs, advance)


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


def _choose(
    loaded: LoadedModel, small: Sequence[Case], corners: Sequence[Case]
) -> tuple[list[Case], list[tuple[str, list[str]]]]:
    """Cases that this machine runs, and the names of the others with the reason."""
    needed, available = reference_bytes(loaded.model), available_host_bytes()
    if needed > available:
        # The figure of the moment stays out of the reason: it would make each build another one.
        reason = f"a block in float32 takes about {needed:,} bytes here, more than are free"
        return [], [(reason, [case.name for case in (*small, *corners)])]
    patch_px = loaded.model.spec.patch_px
    large = [case for case in corners if case.rows * case.columns * patch_px**2 > CORNER_PIXELS_MAX]
    reason = f"larger than the {CORNER_PIXELS_MAX:,} pixels that a build runs in torch"
    left = [(reason, [case.name for case in large])] if large else []
    return [*small, *(case for case in corners if case not in large)], left


def _store(
    cases: Sequence[Case], references: Mapping[str, Mapping[str, NDArray[Any]]], work: Path, patch_px: int
) -> tuple[list[ReferenceCase], list[tuple[Path, str]]]:
    stored, files = [], []
    for case in cases:
        partial = work / case.name
        write_tensorfile(partial, references[case.name])
        digest = file_digest(partial)
        path = named_by_content(partial, f"{case.name}.safetensors", digest)
        size = (case.rows * patch_px, case.columns * patch_px)
        stored.append(ReferenceCase(case.name, f"reference/{path.name}", *size, case.caption_tokens))
        files.append((path, digest))
    return stored, files
