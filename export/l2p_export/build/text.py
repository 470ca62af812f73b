"""Adds a text encoder to a bundle: ONNX graphs, tokenizer, chat template, and their proof."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2p_engines.store.stages import Stage, StageOutput, StageRunner, named_by_content
from l2p_export.graphs.export import graph_stage
from l2p_export.precision.text import plans_by_ranges
from l2p_export.proof.text import prove_text
from l2p_export.tensors.digests import weight_digests
from l2p_runtime.contract import TEXT_ENCODER, FileRecord, GraphRecord, LedgerEntry, TextRecord
from l2p_runtime.text import CHAT_TEMPLATE, MAX_TOKENS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from l2p_calib.plans.plan import PrecisionPlan
    from l2p_export.families.qwen3 import TextEncoder
    from l2p_runtime.backends import Backend
    from l2p_runtime.progress import Reporter

    Tensors = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class TextParts:
    """The parts of a manifest that a text encoder adds."""

    record: TextRecord
    files: tuple[FileRecord, ...]
    ledger: tuple[LedgerEntry, ...]


def add_text_encoder(
    run: StageRunner, encoder: TextEncoder, plans: Sequence[PrecisionPlan], backend: Backend, reporter: Reporter
) -> TextParts:
    """Export ONNX graphs, tokenizer and template, and compare the ONNX graphs with torch float32.

    Raises:
        ArtifactError: a weight is NaN, Inf or out of range, or a layer makes NaN or Inf in float32.
        ParityError: an ONNX graph is further from torch than its threshold, or a layer's values exceed its plan.
    """
    model = encoder.model
    names = {TEXT_ENCODER: tuple(model.shapes)}
    digests = weight_digests(run, "the text encoder", encoder.tensors, names, encoder.files, {}, reporter)
    files: list[FileRecord] = []
    graphs = []
    weights = digests.of(TEXT_ENCODER)
    chosen, ranges = plans_by_ranges(run, encoder, plans, weights, reporter)
    for plan in chosen:
        stage = graph_stage(run, model, encoder.tensors, model.network, plan, weights, reporter)
        files += stage.files
        graphs.append(GraphRecord(TEXT_ENCODER, plan.name, plan.opset, *(file.path for file in stage.files)))
    tokenizer, template = _text_stage(run, encoder).files
    case, ledger = prove_text(
        run,
        encoder,
        graphs,
        {plan.name: plan.base for plan in plans},
        {record.path: record for record in files},
        backend,
        reporter,
    )
    record = TextRecord(
        network=model.network,
        graphs=tuple(graphs),
        tokenizer=tokenizer.path,
        chat_template=template.path,
        max_tokens=MAX_TOKENS,
        vocabulary=model.config.sizes.vocabulary,
        reference=case[0].path if case else None,
    )
    return TextParts(record, (*files, tokenizer, template, *case), (*ranges, *ledger))


def _text_stage(run: StageRunner, encoder: TextEncoder) -> Stage:
    """The stage with the files of tokenizer and chat template, in this order."""
    data = encoder.tokenizer.read_bytes()
    texts = {"tokenizer.json": data, "chat_template.txt": CHAT_TEMPLATE.encode()}
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in texts.items()}

    def make(work: Path) -> StageOutput:
        files = []
        for name, content in texts.items():
            # The stage syncs its files before it is recorded.
            (work / name).write_bytes(content)
            files.append((named_by_content(work / name, name, digests[name]), digests[name]))
        return StageOutput("text", tuple(files))

    return run("text", "tokenizer", digests, make)
