"""A finished bundle run again on this machine: what its build stored against what its graphs make of it here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from l2p_export.text_encoder.build import verify_text
from l2p_export.verification import (
    END_TO_END,
    Case,
    case_inputs,
    compare_networks,
    engine_stage_name,
    graph_stage_name,
    not_run,
)
from l2p_runtime.backends import Backend, Engine
from l2p_runtime.contract import LedgerEntry, ReferenceCase
from l2p_runtime.errors import ArtifactError, UnsupportedError, UsageError
from l2p_runtime.networks import load_network, open_for, require_sizes, runnable_plans
from l2p_runtime.stripes import Stripe
from l2p_runtime.tensorfile import open_tensorfile

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from l2p_export.progress import Reporter
    from l2p_runtime.bundle import Bundle


def verify_bundle(bundle: Bundle, backend: str, plan: str | None, reporter: Reporter) -> list[LedgerEntry]:
    """Run a bundle's stored cases on this machine; what it does not run is listed as not run.

    Args:
        bundle: the bundle.
        backend: a backend by name, or `auto`; engine backends run engines, others graphs.
        plan: only this precision plan; None for all that the backend has files for.
        reporter: shows where it stands.

    Raises:
        ArtifactError: nothing for the backend, or a damaged reference file.
        UsageError: no such plan.
        HostError: the backend cannot run here.
    """
    manifest = bundle.manifest
    opened, first = open_for(bundle, backend, 0, plan)
    plans = [first] if plan else runnable_plans(manifest, opened)
    ledger = [entry for name in plans for entry in _verify_plan(bundle, opened, name, reporter)]
    run = {entry.stage for entry in ledger}
    cases = {case.name for case in manifest.references} | {entry.case for entry in ledger}
    chosen = {graph_stage_name(plan)} if plan else {graph_stage_name(ref.name) for ref in manifest.plans}
    left = [
        entry
        for entry in manifest.ledger
        if (entry.stage in chosen and (entry.stage not in run or entry.case not in cases))
        or (entry.stage.endswith(" engine") and (plan is None or entry.stage.startswith(f"{plan} ")))
    ]
    once = dict.fromkeys((e.stage, END_TO_END if e.stage in chosen else e.network, e.case, e.status) for e in left)
    return ledger + [
        LedgerEntry(stage, network, case, "not run", f"not run here; `{status}` when the bundle was built")
        for stage, network, case, status in once
    ]


def _verify_plan(bundle: Bundle, backend: Backend, plan: str, reporter: Reporter) -> list[LedgerEntry]:
    """The ledger of one plan's graphs, or of its engines where the backend runs these."""
    manifest, model = bundle.manifest, bundle.manifest.model
    target = backend.target
    stage = graph_stage_name(plan) if target is None else engine_stage_name(plan, target.spelling)
    networks = {spec.name: spec for spec in manifest.networks}
    references, refused = {}, []
    for case in manifest.references:
        rows, columns = case.height_px // model.patch_px, case.width_px // model.patch_px
        tokens = model.padded(case.caption_tokens)
        try:
            require_sizes(manifest, backend, plan, 1, (rows, columns), tokens, (Stripe(0, rows, 0, rows),))
        except UsageError as error:
            refused += not_run(stage, [case.name], str(error))
        else:
            references[case.name] = _read_case(bundle, case)

    def load(network: str) -> Engine:
        return load_network(bundle, backend, network, plan)

    with reporter.stage(f"ledger {plan}", len(references) * len(networks), "calls") as advance:
        try:
            found = compare_networks(stage, plan, networks, references, load, backend.device, advance)
            return [*found, *verify_text(bundle, backend, stage, plan), *refused]
        except UnsupportedError as error:
            return [*not_run(stage, list(references), str(error)), *refused]


def _read_case(bundle: Bundle, case: ReferenceCase) -> dict[str, NDArray[Any]]:
    """Read one stored case; its tensors must be the ones that the case and the networks call for."""
    file = open_tensorfile(bundle.path(case.file))
    model = bundle.manifest.model
    rows, columns = case.height_px // model.patch_px, case.width_px // model.patch_px
    inputs = case_inputs(model, Case(case.name, rows, columns, case.caption_tokens, stored=True), seed=0)
    wanted = {name: value.shape for name, value in inputs.items()}
    sizes = {"B": 1, "s": len(inputs["rope_cos"]), "t": model.padded(case.caption_tokens) // model.sequence_multiple}
    sizes |= {"h": rows // model.head.row_multiple, "w": columns // model.head.row_multiple}
    sizes["r"] = sizes["h"]
    wanted |= {f"{net.name}.{out.name}": out.resolve(sizes) for net in bundle.manifest.networks for out in net.outputs}
    found = {name: info.shape for name, info in file.tensors.items()}
    if found != wanted:
        wrong = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        raise ArtifactError(f"reference `{case.file}` does not hold case `{case.name}`: {', '.join(wrong[:6])}")
    return {name: file.read(name) for name in file.tensors}
