"""Compares a text encoder's ONNX graphs and engines with torch float32 on one stored case."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2p_calib.ledger import compare, require_passed, threshold_of
from l2p_engines.store.stages import StageOutput, StageRunner, named_by_content
from l2p_export.families.qwen3.folder import torch_text_encoder
from l2p_export.proof.compare import run_engine
from l2p_export.toolchain import toolchain
from l2p_runtime.bundle import file_digest
from l2p_runtime.contract import (
    TEXT_ENCODER,
    BasePrecision,
    Comparison,
    FileRecord,
    GraphRecord,
    LedgerEntry,
    TextRecord,
    graph_comparison,
)
from l2p_runtime.contract.codec import from_json
from l2p_runtime.errors import ArtifactError, UnsupportedError
from l2p_runtime.memory import available_host_bytes
from l2p_runtime.networks import load_network
from l2p_runtime.tensorfile import open_tensorfile, write_tensorfile

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from l2p_export.families.qwen3.folder import TextEncoder
    from l2p_runtime.backends import Backend
    from l2p_runtime.bundle import Bundle
    from l2p_runtime.networks import OpenedPlan
    from l2p_runtime.progress import Reporter

    Tensors = Mapping[str, NDArray[Any]]


CASE = "text"
"""Name of the only case of a text encoder: two rows of tokens, one of them padded."""


_CASE_LENGTHS = (24, 7)


@dataclass(frozen=True, slots=True)
class _Facts:
    ledger: tuple[LedgerEntry, ...]


def verify_text(opened: OpenedPlan, comparison: Comparison) -> list[LedgerEntry]:
    """Run the stored case of a bundle's text encoder under one plan.

    Args:
        opened: the bundle's plan, and the backend that runs its ONNX graph or its engine.
        comparison: the comparison that the ledger entry belongs to.

    Returns:
        One entry; none for a bundle without a text encoder.

    Raises:
        ArtifactError: the reference file is damaged.
    """
    text = opened.manifest.text
    if text is None:
        return []
    if text.reference is None:
        reason = "no stored reference; the encoder did not fit the memory of the machine that built the bundle"
        return [_not_run(comparison, reason)]
    case = _read_case(opened.bundle, text)
    engine = load_network(opened, TEXT_ENCODER)
    try:
        made = run_engine(engine, opened.backend.device, _inputs(case))
        return [_compare(case, made, comparison, opened.base)]
    finally:
        engine.close()


def prove_text(
    run: StageRunner,
    encoder: TextEncoder,
    graphs: Sequence[GraphRecord],
    bases: Mapping[str, BasePrecision],
    files: Mapping[str, FileRecord],
    backend: Backend,
    reporter: Reporter,
) -> tuple[tuple[FileRecord, ...], tuple[LedgerEntry, ...]]:
    """Compare a text encoder's ONNX graphs with torch float32.

    Returns:
        The file of the stored case, or none if this machine lacks the memory to make it; and the ledger.

    Raises:
        ParityError: a comparison is over its threshold.
    """
    needed = 2 * 4 * sum(math.prod(shape) for shape in encoder.model.shapes.values())
    fits = needed <= available_host_bytes()
    inputs = {
        "graphs": [[record, files[record.graph].sha256, files[record.weights].sha256] for record in graphs],
        "fits": fits,
        "thresholds": {record.plan: threshold_of(bases[record.plan], TEXT_ENCODER) for record in graphs},
        "backend": backend.identity,
        "tools": toolchain(),
    }

    def make(work: Path) -> StageOutput:
        if not fits:
            reason = f"the text encoder in float32 takes about {needed:,} bytes here, more than are free"
            return StageOutput(
                facts=_Facts(tuple(_not_run(graph_comparison(record.plan), reason) for record in graphs))
            )
        with reporter.task("text reference in torch float32", 1, "calls") as advance:
            case = _reference(encoder)
            advance(1)
        ledger = []
        for record in graphs:
            with reporter.task(f"text ledger {record.plan}", 1, "calls") as advance:
                comparison = graph_comparison(record.plan)
                paths = run.path(files[record.graph]), run.path(files[record.weights])
                try:
                    engine = backend.load(*paths, encoder.model.network)
                except UnsupportedError as error:
                    ledger.append(_not_run(comparison, str(error)))
                    continue
                try:
                    made = run_engine(engine, backend.device, _inputs(case))
                    ledger.append(_compare(case, made, comparison, bases[record.plan]))
                finally:
                    engine.close()
                advance(1)
        require_passed(ledger, bases)
        write_tensorfile(work / CASE, case)
        digest = file_digest(work / CASE)
        path = named_by_content(work / CASE, f"{CASE}.safetensors", digest)
        return StageOutput("reference", ((path, digest),), _Facts(tuple(ledger)))

    stage = run("proof", TEXT_ENCODER, inputs, make)
    return stage.files, from_json(_Facts, stage.facts).ledger


def _not_run(comparison: Comparison, reason: str) -> LedgerEntry:
    return LedgerEntry(comparison, TEXT_ENCODER, CASE, "not run", reason)


def _reference(encoder: TextEncoder) -> dict[str, NDArray[Any]]:
    """Token ids spread over the whole vocabulary, the mask, and the embeddings that torch makes of them."""
    import numpy as np
    import torch

    shape = (len(_CASE_LENGTHS), max(_CASE_LENGTHS))
    ids = np.linspace(0, encoder.model.config.sizes.vocabulary - 1, math.prod(shape)).astype(np.int64)
    mask = np.arange(shape[1]) < np.asarray(_CASE_LENGTHS)[:, np.newaxis]
    case = {"input_ids": ids.reshape(shape), "attention_mask": mask.astype(np.int64)}
    module = torch_text_encoder(encoder)
    with torch.no_grad():
        made = module(**{name: torch.from_numpy(value) for name, value in case.items()})
    return {**case, "prompt_embeds": made.numpy()}


def _inputs(case: Tensors) -> dict[str, NDArray[Any]]:
    return {"input_ids": case["input_ids"], "attention_mask": case["attention_mask"]}


def _compare(case: Tensors, made: Tensors, comparison: Comparison, base: BasePrecision) -> LedgerEntry:
    """Compare only rows of real tokens: the runtime discards rows of padding."""
    real = case["attention_mask"] != 0
    expected, found = case["prompt_embeds"][real], made["prompt_embeds"][real]
    return compare(expected, found, comparison, network=TEXT_ENCODER, case=CASE, base=base)


def _read_case(bundle: Bundle, text: TextRecord) -> dict[str, NDArray[Any]]:
    file = open_tensorfile(bundle.path(text.reference or ""))
    shape = (len(_CASE_LENGTHS), max(_CASE_LENGTHS))
    sizes = {"B": shape[0], "L": shape[1]}
    specs = (*text.network.inputs, *text.network.outputs)
    wanted = {spec.name: (_STORED[spec.dtype], spec.resolve(sizes)) for spec in specs}
    if {name: (info.dtype, info.shape) for name, info in file.tensors.items()} != wanted:
        raise ArtifactError(
            f"reference `{text.reference}` does not hold the case `{CASE}`", hint="build the bundle again"
        )
    case = {name: file.read(name) for name in file.tensors}
    if not ((case["input_ids"] >= 0) & (case["input_ids"] < text.vocabulary)).all():
        raise ArtifactError(f"reference `{text.reference}` has token numbers outside the vocabulary")
    return case


_STORED = {"int64": "I64", "float32": "F32"}
