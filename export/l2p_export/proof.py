"""The proof in a bundle: graphs are run against torch float32, and small cases travel with their expected outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from l2p_calib.ledger import require_passed
from l2p_export.reference import largest_network_bytes, run_reference
from l2p_export.verification import (
    CORNER_PIXELS_MAX,
    Case,
    case_inputs,
    compare_graphs,
    corner_cases,
    not_run,
    small_cases,
)
from l2p_runtime.bundle import file_digest, file_record
from l2p_runtime.contract import FileRecord, GraphRecord, LedgerEntry, Profile, ReferenceCase
from l2p_runtime.memory import available_host_bytes
from l2p_runtime.tensorfile import write_tensorfile

if TYPE_CHECKING:
    from typing import Any

    from numpy.typing import NDArray

    from l2p_export.loading import LoadedModel
    from l2p_export.output import OutputFolder
    from l2p_export.progress import Reporter
    from l2p_runtime.backends import Backend, Engine

# The torch network and ONNX Runtime's copy of it with packed weights: about three times the weights.
_NETWORK_COPIES = 3


def prove(
    loaded: LoadedModel,
    profiles: Sequence[Profile],
    graphs: Sequence[GraphRecord],
    output: OutputFolder,
    backend: Backend,
    reporter: Reporter,
) -> tuple[list[ReferenceCase], list[FileRecord], list[LedgerEntry]]:
    """Compare every graph with torch float32 and store the small cases.

    Returns:
        The stored cases, their files, and the ledger.

    Raises:
        ParityError: a comparison is over its threshold.
    """
    plans = list(dict.fromkeys(record.plan for record in graphs))
    corners = dict.fromkeys(case for profile in profiles for case in corner_cases(loaded.model.spec, profile))
    cases, too_large = _choose(loaded, small_cases(loaded.model.spec), list(corners))
    ledger = [entry for plan in plans for reason, left in too_large for entry in not_run(plan, left, reason)]
    if not cases:
        return [], [], ledger
    networks = {spec.name: spec for spec in loaded.model.networks}
    inputs = {case.name: case_inputs(loaded.model.spec, case, seed) for seed, case in enumerate(cases)}
    with reporter.stage("reference in torch float32", len(cases) * len(networks), "calls") as advance:
        references = run_reference(loaded, inputs, advance)
    for plan in plans:
        records = {record.network: record for record in graphs if record.plan == plan}

        def load(network: str, records: dict[str, GraphRecord] = records) -> Engine:
            record = records[network]
            return backend.load(output.root / record.graph, output.root / record.weights, networks[network])

        with reporter.stage(f"ledger {plan}", len(cases) * len(networks), "calls") as advance:
            ledger += compare_graphs(plan, networks, references, load, advance)
    require_passed(ledger)
    stored, files = _store([case for case in cases if case.stored], references, output, loaded.model.spec.patch_px)
    return stored, files, ledger


def _choose(
    loaded: LoadedModel, small: Sequence[Case], corners: Sequence[Case]
) -> tuple[list[Case], list[tuple[str, list[Case]]]]:
    """Cases that this machine runs, and for the others why not."""
    needed, available = _NETWORK_COPIES * largest_network_bytes(loaded), available_host_bytes()
    if needed > available:
        reason = f"a network in float32 takes about {needed:,} bytes here, {available:,} are free"
        return [], [(reason, [*small, *corners])]
    patch_px = loaded.model.spec.patch_px
    large = [case for case in corners if case.rows * case.columns * patch_px**2 > CORNER_PIXELS_MAX]
    reason = f"larger than the {CORNER_PIXELS_MAX:,} pixels that a build runs in torch"
    return [*small, *(case for case in corners if case not in large)], [(reason, large)]


def _store(
    cases: Sequence[Case], references: dict[str, dict[str, NDArray[Any]]], output: OutputFolder, patch_px: int
) -> tuple[list[ReferenceCase], list[FileRecord]]:
    stored, files = [], []
    for case in cases:
        partial = output.folder("reference") / f"{case.name}.partial"
        write_tensorfile(partial, references[case.name])
        digest = file_digest(partial)
        path = partial.with_name(f"{case.name}.{digest[:16]}.safetensors")
        partial.replace(path)
        record = file_record(output.root, path, digest)
        size = (case.rows * patch_px, case.columns * patch_px)
        stored.append(ReferenceCase(case.name, record.path, *size, case.caption_tokens))
        files.append(record)
    return stored, files
