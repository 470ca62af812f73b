"""Runs a bundle's stored cases on this machine, and compares the results with the stored outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2p_calib.ledger import END_TO_END, not_run
from l2p_export.proof.compare import compare_each, compare_networks
from l2p_export.proof.engine_layers import judge_layers, layers_not_read
from l2p_export.proof.stored import read_case
from l2p_export.proof.text import verify_text
from l2p_runtime.backends import Backend, Engine
from l2p_runtime.backends.trt_engine import TrtEngine
from l2p_runtime.contract import (
    NETWORKS,
    TEXT_ENCODER,
    Comparison,
    EngineRecord,
    LedgerEntry,
    Manifest,
    NetworkSpec,
    ReferenceCase,
    build_comparison,
    engine_comparison,
    fused_comparison,
    graph_comparison,
)
from l2p_runtime.errors import HostError, UnsupportedError, UsageError
from l2p_runtime.networks import (
    OpenedPlan,
    engine_record,
    fused_networks,
    head_rows_max,
    load_network,
    open_plan,
    require_sizes,
    runnable_plans,
)
from l2p_runtime.stripes import Stripe, plan_stripes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from l2p_runtime.bundle import Bundle
    from l2p_runtime.progress import Reporter

BUILT_OUTPUTS = "outputs"
"""Name of the case under which a build lists engines that it could not run."""


def verify_bundle(bundle: Bundle, backend: str, plan: str | None, reporter: Reporter) -> list[LedgerEntry]:
    """Run a bundle's stored cases on this machine.

    An engine backend also reads the dtypes of the layers of every engine that it opens.

    Args:
        bundle: the bundle.
        backend: a backend by name, or `auto`; engine backends run engines, others ONNX graphs.
        plan: only this precision plan; None for all that the backend has files for.
        reporter: shows progress.

    Returns:
        One entry for each comparison; those that this machine does not run are listed as not run.

    Raises:
        ArtifactError: the bundle has nothing that the backend runs, or a reference file is damaged.
        UsageError: no such plan.
        HostError: the backend cannot run here.
    """
    opened = open_plan(bundle, backend, 0, plan)
    plans = [opened.plan] if plan else runnable_plans(bundle, opened.backend)
    ledger = [entry for name in plans for entry in _verify_plan(opened.of_plan(name), reporter)]
    return [*ledger, *_left(bundle.manifest, opened.backend, plan, ledger)]


def _verify_plan(opened: OpenedPlan, reporter: Reporter) -> list[LedgerEntry]:
    """The ledger of one plan's engines if the backend runs engines, else of its ONNX graphs."""
    manifest, target, plan = opened.manifest, opened.backend.target, opened.plan
    comparison = graph_comparison(plan) if target is None else engine_comparison(plan, target.spelling)
    networks = {spec.name: spec for spec in manifest.networks}
    references, stripes, refused = {}, {}, []
    for case in manifest.references:
        try:
            stripes[case.name] = _stripes(opened, case)
        except UsageError as error:
            refused += not_run(comparison, [case.name], str(error))
        else:
            references[case.name] = read_case(opened.bundle, case)
    layers: list[LedgerEntry] = []
    reading = _reading_layers(opened, layers)

    def load(network: str) -> Engine:
        return load_network(reading, network, fused=False)

    calls = len(references) * (len(networks) + len(fused_networks(opened)))
    with reporter.task(f"ledger {plan}", calls, "calls") as advance:
        try:
            found = compare_networks(
                comparison, opened.base, networks, references, load, opened.backend.device, advance, stripes
            )
            found += _verify_fused(opened, networks, references, advance)
            found += verify_text(reading, comparison)
        except UnsupportedError as error:
            found = not_run(comparison, list(references), str(error))
    return [*found, *refused, *layers, *_layers_not_read(opened, layers)]


def _verify_fused(
    opened: OpenedPlan,
    networks: Mapping[str, NetworkSpec],
    references: Mapping[str, Mapping[str, NDArray[Any]]],
    advance: Callable[[int], None],
) -> list[LedgerEntry]:
    """The plan's fused graphs, where the backend runs them."""
    specs = {network: networks[network] for network in fused_networks(opened)}
    comparison, device = fused_comparison(opened.plan), opened.backend.device
    return compare_each(
        comparison, opened.base, specs, references, lambda name: load_network(opened, name), device, advance
    )


def _stripes(opened: OpenedPlan, case: ReferenceCase) -> tuple[Stripe, ...]:
    """Stripes of the pixel head in a case: of a size that its engine takes; an ONNX graph runs it whole.

    Raises:
        UsageError: the engines do not take the size of the case.
    """
    model = opened.manifest.model
    rows, columns = case.height_px // model.patch_px, case.width_px // model.patch_px
    stripes: tuple[Stripe, ...] = (Stripe(0, rows, 0, rows),)
    if opened.runs_engines:
        rows_max = head_rows_max(engine_record(opened, "head"), 1, columns)
        try:
            stripes = plan_stripes(model.head, rows, 1, rows_max)
        except HostError as error:
            raise UsageError(
                f"the engine of `head` takes {rows_max} token rows at once, too few to cut {rows}"
            ) from error
    require_sizes(opened, 1, (rows, columns), model.padded(case.caption_tokens), stripes)
    return stripes


def _reading_layers(opened: OpenedPlan, entries: list[LedgerEntry]) -> OpenedPlan:
    """The same plan, opened so that each engine's layer dtypes are appended to `entries` when it is opened."""
    open_engine = opened.backend.load_engine
    if open_engine is None:
        return opened
    plan = opened.manifest.plan(opened.plan)

    def read(path: Path, record: EngineRecord, spec: NetworkSpec) -> Engine:
        engine = open_engine(path, record, spec)
        if isinstance(engine, TrtEngine):
            entries.append(judge_layers(spec.name, plan, record.target, engine.layers()))
        return engine

    return replace(opened, backend=replace(opened.backend, load_engine=read))


def _layers_not_read(opened: OpenedPlan, read: Sequence[LedgerEntry]) -> list[LedgerEntry]:
    """Entries for the engines of a plan whose layers were not read."""
    if not opened.runs_engines:
        return []
    done = {entry.network for entry in read}
    networks = (*NETWORKS, *((TEXT_ENCODER,) if opened.manifest.text is not None else ()))
    return [
        layers_not_read(network, opened.plan, engine_record(opened, network).target)
        for network in networks
        if network not in done
    ]


def _left(manifest: Manifest, backend: Backend, plan: str | None, ledger: Sequence[LedgerEntry]) -> list[LedgerEntry]:
    """Entries of the bundle's own ledger, of one plan or all, that this machine did not run; listed as not run."""
    run = {entry.comparison for entry in ledger}
    cases = {case.name for case in manifest.references} | {entry.case for entry in ledger}
    of_graphs = (graph_comparison, fused_comparison)
    chosen = {made(ref.name) for ref in manifest.plans if plan in (None, ref.name) for made in of_graphs}
    replaced = _outputs_compared(manifest, backend, ledger)
    left = [
        entry
        for entry in manifest.ledger
        if (entry.comparison in chosen and (entry.comparison not in run or entry.case not in cases))
        or (
            entry.comparison.subject == "engine"
            and plan in (None, entry.comparison.plan)
            and (entry.comparison, entry.network, entry.case) not in replaced
        )
    ]
    once = dict.fromkeys(
        (e.comparison, END_TO_END if e.comparison in chosen else e.network, e.case, e.status) for e in left
    )
    return [
        LedgerEntry(comparison, network, case, "not run", f"not run here; `{status}` when the bundle was built")
        for comparison, network, case, status in once
    ]


def _outputs_compared(
    manifest: Manifest, backend: Backend, ledger: Sequence[LedgerEntry]
) -> set[tuple[Comparison, str, str]]:
    """Comparison, network and case of engine outputs that the build could not run and that were compared here."""
    if backend.target is None:
        return set()
    compared = {(entry.comparison, entry.network) for entry in ledger if entry.status != "not run"}
    return {
        (build_comparison(record.plan, record.target), record.network, BUILT_OUTPUTS)
        for record in manifest.engines
        if (engine_comparison(record.plan, backend.target.spelling), record.network) in compared
        and record == manifest.engine(record.network, record.plan, backend.target)
    }
