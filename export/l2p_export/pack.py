"""A bundle copied with only what a target needs: one folder that holds all its files, shared ones included."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from l2p_calib.plans import PLANS
from l2p_engines.stages import WORK
from l2p_export.output import open_output, require_disk
from l2p_runtime.contract import GraphRecord, Manifest
from l2p_runtime.errors import ArtifactError, UsageError

if TYPE_CHECKING:
    from l2p_export.progress import Reporter
    from l2p_runtime.bundle import Bundle

_COPY_BYTES = 8 << 20
_SPARE_BYTES = 1 << 20

TARGETS: dict[str, Callable[[str], bool]] = {
    # ONNX Runtime has no bfloat16 kernels on the CPU (tensorrt.md 4).
    "onnx-cpu": lambda plan: plan not in PLANS or PLANS[plan].default != "bfloat16",
}
"""What a bundle can be packed for, to whether a plan runs there."""


def pack_manifest(manifest: Manifest, target: str | None, plans: Sequence[str]) -> Manifest:
    """The manifest of a copy: chosen plans, their graphs, files and ledger entries, all of them its own.

    Args:
        manifest: of the whole bundle.
        target: a key of `TARGETS`; None for any machine.
        plans: plans to keep; all when empty.

    Raises:
        UsageError: no such target or plan, or no plan that runs on the target.
    """
    if target is not None and target not in TARGETS:
        raise UsageError(f"there is no target `{target}`", hint=f"targets: {', '.join(TARGETS)}")
    chosen = [manifest.plan(name).name for name in plans] or [plan.name for plan in manifest.plans]
    kept = [name for name in chosen if target is None or TARGETS[target](name)]
    if not kept:
        raise UsageError(
            f"none of {', '.join(chosen)} runs on `{target}`", hint="build the bundle with another --precision too"
        )

    def of_kept(graphs: tuple[GraphRecord, ...]) -> tuple[GraphRecord, ...]:
        return tuple(record for record in graphs if record.plan in kept)

    graphs = of_kept(manifest.graphs)
    text = replace(manifest.text, graphs=of_kept(manifest.text.graphs)) if manifest.text else None
    used = {path for record in graphs for path in (record.graph, record.weights)}
    used |= {case.file for case in manifest.references} | (text.paths if text else set())
    stages = tuple(f" {name} graph" for name in kept)
    return replace(
        manifest,
        plans=tuple(plan for plan in manifest.plans if plan.name in kept),
        graphs=graphs,
        text=text,
        files=tuple(replace(record, in_store=False) for record in manifest.files if record.path in used),
        ledger=tuple(entry for entry in manifest.ledger if entry.stage.endswith(stages)),
    )


def pack(bundle: Bundle, manifest: Manifest, out: Path, reporter: Reporter) -> Bundle:
    """Copy the files that a packed manifest names, hashed on the way, and commit it.

    Raises:
        ArtifactError: a file was changed.
        HostError: no room on the disk, or another build writes there.
        UsageError: `out` is the bundle itself or holds something else.
    """
    if bundle.root.resolve() in (out.resolve(), *out.resolve().parents):
        raise UsageError(f"--out `{out}` is the bundle itself or inside it", hint="choose another folder")
    records = {record.path: record for record in bundle.manifest.files}
    total = sum(record.size_bytes for record in manifest.files)
    with open_output(out) as output:
        require_disk(output.root, total + _SPARE_BYTES)
        with reporter.stage(f"copying into `{out}`", total) as advance:
            partial = output.root / WORK / "copy"
            partial.parent.mkdir(exist_ok=True)
            for record in manifest.files:
                source, target = bundle.home(records[record.path]) / record.path, output.root / record.path
                # Beside what is there: an older copy stays whole, and a hard link keeps what it leads to.
                if _copy(source, partial, advance) == record.sha256:
                    target.parent.mkdir(exist_ok=True)
                    partial.replace(target)
                else:
                    raise ArtifactError(
                        f"`{source}` was changed after it was built: its digest differs", hint="build the bundle again"
                    )
        return output.commit(manifest, None, ())


def _copy(source: Path, target: Path, advance: Callable[[int], None]) -> str:
    """Copy a file; the digest of what was copied."""
    digest = hashlib.sha256()
    with source.open("rb") as read, target.open("wb") as written:
        while block := read.read(_COPY_BYTES):
            digest.update(block)
            written.write(block)
            advance(len(block))
        written.flush()
        os.fsync(written.fileno())
    return digest.hexdigest()
