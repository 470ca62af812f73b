"""Copies of a bundle with only the files that a target needs, in one folder, shared files included."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from l2p_engines.store.output import open_output, require_disk
from l2p_runtime.contract import (
    PORTABLE,
    Comparison,
    EngineRecord,
    GraphRecord,
    Manifest,
    PlanRef,
    target_from_spelling,
)
from l2p_runtime.errors import ArtifactError, UsageError
from l2p_runtime.files import atomic_file

if TYPE_CHECKING:
    from l2p_runtime.bundle import Bundle
    from l2p_runtime.progress import Reporter

_COPY_BYTES = 8 << 20
_SPARE_BYTES = 1 << 20

TARGETS: dict[str, Callable[[PlanRef], bool]] = {
    # ONNX Runtime has no bfloat16 kernels on the CPU (docs/design.md, "ONNX Runtime facts").
    "onnx-cpu": lambda plan: plan.base != "bf16",
}
"""Targets of ONNX graphs, to whether a plan runs there; engine targets are those of the bundle."""


def pack_manifest(manifest: Manifest, target: str | None, plans: Sequence[str]) -> Manifest:
    """The manifest of a copy: chosen plans, their ONNX graphs or engines, files and ledger entries; no file is shared.

    Args:
        manifest: manifest of the whole bundle.
        target: a key of `TARGETS`, which keeps only ONNX graphs; an engine target, as `rtx-sm89` or `rtx1.7-sm89`,
            which keeps its engines instead of ONNX graphs; None for everything.
        plans: plans to keep; all if empty.

    Raises:
        UsageError: no such target or plan, or no plan that runs on the target.
    """
    chosen = [manifest.plan(name).name for name in plans] or [plan.name for plan in manifest.plans]
    engines = _engines(manifest, target, chosen)
    if target is None:
        kept = chosen
    elif target in TARGETS:
        kept = [name for name in chosen if TARGETS[target](manifest.plan(name))]
    else:
        kept = list(dict.fromkeys(record.plan for record in engines))
    if not kept:
        raise UsageError(
            f"none of {', '.join(chosen)} runs on `{target}`", hint="build the bundle with another --precision too"
        )
    keeps_graphs = target is None or target in TARGETS

    def of_kept(graphs: tuple[GraphRecord, ...]) -> tuple[GraphRecord, ...]:
        return tuple(record for record in graphs if record.plan in kept)

    graphs = of_kept(manifest.graphs)
    text = replace(manifest.text, graphs=of_kept(manifest.text.graphs)) if manifest.text else None
    used = {case.file for case in manifest.references} | (text.documents if text else set())
    used |= {record.engine for record in engines}
    used |= {plan.file for plan in manifest.plans if plan.file is not None and plan.name in kept}
    if keeps_graphs:
        for record in (*graphs, *(text.graphs if text else ())):
            if manifest.has_graph(record.network, record.plan):
                used |= set(record.paths)
            elif target is not None:
                raise UsageError(
                    f"the bundle has no graph of `{record.network}`: it was packed for engines",
                    hint="pack the bundle that it was packed from",
                )
    built = {(record.plan, record.target) for record in engines}
    return replace(
        manifest,
        plans=tuple(plan for plan in manifest.plans if plan.name in kept),
        graphs=graphs,
        text=text,
        files=tuple(replace(record, in_store=False) for record in manifest.files if record.path in used),
        ledger=tuple(entry for entry in manifest.ledger if _is_kept(entry.comparison, kept, built)),
        engines=engines,
    )


def _is_kept(comparison: Comparison, plans: Sequence[str], engines: set[tuple[str, str]]) -> bool:
    """Whether a copy with these plans, and with engines given by plan and target, keeps a comparison."""
    if comparison.target is not None:
        return (comparison.plan, comparison.target) in engines
    return comparison.plan in plans


def _engines(manifest: Manifest, target: str | None, plans: Sequence[str]) -> tuple[EngineRecord, ...]:
    """The engines that a copy keeps; for an engine target, those of plans that have one of each network.

    Raises:
        UsageError: the bundle has no engine for such a target.
    """
    records = tuple(record for record in manifest.engines if record.plan in plans)
    if target is None:
        return records
    if target in TARGETS:
        return ()
    have = tuple(dict.fromkeys(record.target for record in manifest.engines))
    wanted = [spelling for spelling in have if target.lower() in _spellings(spelling)]
    if not wanted:
        there = ", ".join((*TARGETS, *have))
        raise UsageError(
            f"the bundle has nothing for a target `{target[:80]}`",
            hint=f"it can be packed for {there}; for another, build it with --target first",
        )
    networks = {record.network for record in records}
    found = [record for record in records if record.target == wanted[0]]
    whole = [plan for plan in plans if {record.network for record in found if record.plan == plan} == networks]
    return tuple(record for record in found if record.plan in whole)


def _spellings(target: str) -> set[str]:
    """Names that select a target: `rtx1.7-sm89` and `rtx-sm89`; for a portable one also `portable`."""
    parsed = target_from_spelling(target)
    short = f"{parsed.backend}-{parsed.compute_capability}"
    return {target, short} | ({PORTABLE} if parsed.compute_capability == PORTABLE else set())


def pack(bundle: Bundle, manifest: Manifest, out: Path, reporter: Reporter) -> Bundle:
    """Copy the files of a packed manifest, check their digests, and commit it.

    Raises:
        ArtifactError: a file was changed.
        HostError: too little disk space, or another build writes there.
        UsageError: `out` is the bundle itself or is not a bundle.
    """
    if bundle.root.resolve() in (out.resolve(), *out.resolve().parents):
        raise UsageError(f"--out `{out}` is the bundle itself or inside it", hint="choose another folder")
    records = {record.path: record for record in bundle.manifest.files}
    total = sum(record.size_bytes for record in manifest.files)
    with open_output(out) as output:
        require_disk(output.root, total + _SPARE_BYTES)
        with reporter.task(f"copying into `{out}`", total) as advance:
            for record in manifest.files:
                source, target = bundle.home(records[record.path]) / record.path, output.root / record.path
                target.parent.mkdir(exist_ok=True)
                # Not written in place: an older copy stays whole, and the target of a hard link is not changed.
                with atomic_file(target) as written:
                    if _copy(source, written, advance) != record.sha256:
                        raise ArtifactError(
                            f"`{source}` was changed after it was built: its digest differs",
                            hint="build the bundle again",
                        )
        return output.commit(manifest, None, ())


def _copy(source: Path, written: BinaryIO, advance: Callable[[int], None]) -> str:
    """Copy a file; returns the SHA-256 of the bytes that were copied."""
    digest = hashlib.sha256()
    with source.open("rb") as read:
        while block := read.read(_COPY_BYTES):
            digest.update(block)
            written.write(block)
            advance(len(block))
    return digest.hexdigest()
