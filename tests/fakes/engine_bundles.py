"""Bundles with fake engines in them, as a build for a GPU would leave."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from fakes.tensorrt_runtime import write_engine
from l2p_engines.builders.shapes import HeadBudget, engine_profiles, stripe_rows
from l2p_runtime.bundle import file_digest, file_record, open_bundle
from l2p_runtime.contract import NETWORKS, LedgerEntry, ModelSpec, Profile, build_comparison, manifest_to_bytes
from l2p_runtime.errors import HostError


def add_engines(
    root: Path, plan: str, *, head_rows: int | None = None, target: str = "rtx1.7-sm89", **facts: Any
) -> None:
    """Put a fake engine of every network of a plan into a bundle, in place of those that it has.

    Args:
        root: the bundle.
        plan: of the graphs.
        head_rows: the most token rows that the head's engine takes; None for all.
        target: of the engines.
        facts: what goes into the engines' files as it is, beside what `write_engine` puts there.
    """
    manifest = open_bundle(root).manifest
    (profile,), model = manifest.profiles, manifest.model
    budget = None
    if head_rows is not None:
        budgets = (HeadBudget(size << 20, "fp32") for size in range(1, 999))
        budget = next(budget for budget in budgets if _rows(model, profile, budget) == head_rows)
    (root / "engines").mkdir(exist_ok=True)
    records = []
    files = [record for record in manifest.files if not record.path.startswith("engines/")]
    digests = {record.path: record.sha256 for record in files}
    for network in NETWORKS:
        graph = manifest.graph(network, plan)
        path = root / "engines" / f"{network}.engine"
        shapes = engine_profiles(manifest.network(network), model, manifest.profiles, budget)
        record = write_engine(path, root / graph.graph, shapes, network=network, plan=plan, target=target, **facts)
        whole = {"graph_sha256": digests[graph.graph], "weights_sha256": digests[graph.weights]}
        records.append(replace(record, **whole))
        files.append(file_record(root, path, file_digest(path)))
    comparison = build_comparison(plan, target)
    ledger = [entry for entry in manifest.ledger if entry.comparison.subject != "engine"]
    for case in ("weight bytes", "outputs"):
        ledger += [
            LedgerEntry(comparison, network, case, "not run", "this build opened no engine") for network in NETWORKS
        ]
    made = replace(
        manifest,
        engines=tuple(records),
        files=tuple(sorted(files, key=lambda record: record.path)),
        ledger=tuple(ledger),
    )
    (root / "bundle.json").write_bytes(manifest_to_bytes(made))


def _rows(model: ModelSpec, profile: Profile, budget: HeadBudget) -> int:
    try:
        return stripe_rows(model, profile, budget)
    except HostError:
        return 0
