"""A text encoder goes into a bundle: graphs, tokenizer, chat template, and the proof that the graphs are right."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from l2p_calib.ledger import compare, require_passed, threshold_of
from l2p_engines.store.stages import Made, Stage, StageRunner, named_by_content
from l2p_export.graphs.export import graph_stage
from l2p_export.precision.text import plans_by_ranges
from l2p_export.proof.compare import graph_stage_name, run_engine
from l2p_export.tensors.digests import toolchain, weight_digests
from l2p_export.tensors.sources import read_tensor
from l2p_runtime.bundle import file_digest
from l2p_runtime.contract import TEXT_ENCODER, FileRecord, GraphRecord, LedgerEntry, TextRecord
from l2p_runtime.contract.codec import from_json
from l2p_runtime.errors import ArtifactError, UnsupportedError
from l2p_runtime.memory import available_host_bytes
from l2p_runtime.networks import load_network
from l2p_runtime.tensorfile import open_tensorfile, write_tensorfile
from l2p_runtime.text import CHAT_TEMPLATE, MAX_TOKENS

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

    from l2p_calib.plans.plan import PrecisionPlan
    from l2p_export.families import Model
    from l2p_export.families.qwen3.folder import TextEncoder
    from l2p_runtime.backends import Backend
    from l2p_runtime.bundle import Bundle
    from l2p_runtime.progress import Reporter

    Tensors = Mapping[str, NDArray[Any]]

CASE = "text"
"""Name of the one case that the ledger holds: two token rows of which one is padded."""

_CASE_LENGTHS = (24, 7)


@dataclass(frozen=True, slots=True)
class TextParts:
    """What a text encoder adds to a manifest."""

    record: TextRecord
    files: tuple[FileRecord, ...]
    ledger: tuple[LedgerEntry, ...]


@dataclass(frozen=True, slots=True)
class _Facts:
    ledger: tuple[LedgerEntry, ...]


def add_text_encoder(
    run: StageRunner, encoder: TextEncoder, plans: Sequence[PrecisionPlan], backend: Backend, reporter: Reporter
) -> TextParts:
    """Make graphs, tokenizer and template, and compare the graphs with torch float32.

    Raises:
        ArtifactError: a weight is NaN, Inf or out of range, or a layer makes such values in float32.
        ParityError: a graph is further from torch than its threshold, or a plan does not hold what a layer makes.
    """
    names = {TEXT_ENCODER: tuple(encoder.shapes)}
    digests = weight_digests(run, "the text encoder", encoder.tensors, names, encoder.files, {}, reporter)
    # The exporter asks for modules, blocks, layouts and shapes and for nothing else that a family's model has.
    model = cast("Model", encoder)
    files: list[FileRecord] = []
    graphs = []
    weights = digests.of(TEXT_ENCODER)
    chosen, ranges = plans_by_ranges(run, encoder, plans, weights, reporter)
    for plan in chosen:
        stage = graph_stage(
            run, model, encoder.tensors, encoder.network, plan, weights, reporter, settings=encoder.config
        )
        files += stage.files
        graphs.append(GraphRecord(TEXT_ENCODER, plan.name, plan.opset, stage.files[0].path, stage.files[1].path))
    tokenizer, template = _text_stage(run, encoder).files
    case, ledger = _prove(run, encoder, graphs, {record.path: record for record in files}, backend, reporter)
    record = TextRecord(
        network=encoder.network,
        graphs=tuple(graphs),
        tokenizer=tokenizer.path,
        chat_template=template.path,
        max_tokens=MAX_TOKENS,
        vocabulary=encoder.config.sizes.vocabulary,
        reference=case[0].path if case else None,
    )
    return TextParts(record, (*files, tokenizer, template, *case), (*ranges, *ledger))


def verify_text(bundle: Bundle, backend: Backend, stage: str, plan: str) -> list[LedgerEntry]:
    """Run the stored case of a bundle's text encoder under one plan; nothing without an encoder.

    Args:
        bundle: the bundle.
        backend: what runs its graph or its engine.
        stage: what the ledger calls the comparison.
        plan: name of the plan.

    Raises:
        ArtifactError: the reference file is damaged.
    """
    text = bundle.manifest.text
    if text is None:
        return []
    if text.reference is None:
        reason = "no stored reference; the encoder did not fit the memory of the machine that built the bundle"
        return [_not_run(stage, reason)]
    case = _read_case(bundle, text)
    engine = load_network(bundle, backend, TEXT_ENCODER, plan)
    try:
        return [_compare(case, run_engine(engine, backend.device, _inputs(case)), stage, plan)]
    finally:
        engine.close()


def torch_text_encoder(encoder: TextEncoder) -> nn.Module:
    """The network in torch float32 with the folder's weights."""
    import torch

    with torch.device("meta"):
        module = encoder.module(TEXT_ENCODER, lambda layer: torch.float32)
    state = {name: torch.from_numpy(read_tensor(encoder.tensors[name])) for name in module.state_dict()}
    module.load_state_dict(state, assign=True)
    return module


def _text_stage(run: StageRunner, encoder: TextEncoder) -> Stage:
    """Tokenizer and chat template."""
    data = encoder.tokenizer.read_bytes()
    texts = {"tokenizer.json": data, "chat_template.txt": CHAT_TEMPLATE.encode()}
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in texts.items()}

    def make(work: Path) -> Made:
        files = []
        for name, content in texts.items():
            (work / name).write_bytes(content)
            files.append((named_by_content(work / name, name, digests[name]), digests[name]))
        return Made("text", tuple(files))

    return run("text", "tokenizer", digests, make)


def _prove(
    run: StageRunner,
    encoder: TextEncoder,
    graphs: Sequence[GraphRecord],
    files: Mapping[str, FileRecord],
    backend: Backend,
    reporter: Reporter,
) -> tuple[tuple[FileRecord, ...], tuple[LedgerEntry, ...]]:
    """The stored case, if this machine can make one, and the ledger."""
    needed = 2 * 4 * sum(math.prod(shape) for shape in encoder.shapes.values())
    fits = needed <= available_host_bytes()
    inputs = {
        "graphs": [[record, files[record.graph].sha256, files[record.weights].sha256] for record in graphs],
        "fits": fits,
        "thresholds": {record.plan: threshold_of(record.plan, TEXT_ENCODER) for record in graphs},
        "backend": backend.identity,
        "tools": toolchain(),
    }

    def make(work: Path) -> Made:
        if not fits:
            reason = f"the text encoder in float32 takes about {needed:,} bytes here, more than are free"
            return Made(facts=_Facts(tuple(_not_run(graph_stage_name(record.plan), reason) for record in graphs)))
        with reporter.stage("text reference in torch float32", 1, "calls") as advance:
            case = _reference(encoder)
            advance(1)
        ledger = []
        for record in graphs:
            with reporter.stage(f"text ledger {record.plan}", 1, "calls") as advance:
                stage = graph_stage_name(record.plan)
                paths = run.path(files[record.graph]), run.path(files[record.weights])
                try:
                    engine = backend.load(*paths, encoder.network)
                except UnsupportedError as error:
                    ledger.append(_not_run(stage, str(error)))
                    continue
                try:
                    made = run_engine(engine, backend.device, _inputs(case))
                    ledger.append(_compare(case, made, stage, record.plan))
                finally:
                    engine.close()
                advance(1)
        require_passed(ledger)
        write_tensorfile(work / CASE, case)
        digest = file_digest(work / CASE)
        path = named_by_content(work / CASE, f"{CASE}.safetensors", digest)
        return Made("reference", ((path, digest),), _Facts(tuple(ledger)))

    stage = run("proof", TEXT_ENCODER, inputs, make)
    return stage.files, from_json(_Facts, stage.facts).ledger


def _not_run(stage: str, reason: str) -> LedgerEntry:
    return LedgerEntry(stage, TEXT_ENCODER, CASE, "not run", reason)


def _reference(encoder: TextEncoder) -> dict[str, NDArray[Any]]:
    """Token numbers spread over the whole vocabulary, the mask, and what torch makes of them."""
    import numpy as np
    import torch

    shape = (len(_CASE_LENGTHS), max(_CASE_LENGTHS))
    ids = np.linspace(0, encoder.config.sizes.vocabulary - 1, math.prod(shape)).astype(np.int64)
    mask = np.arange(shape[1]) < np.asarray(_CASE_LENGTHS)[:, np.newaxis]
    case = {"input_ids": ids.reshape(shape), "attention_mask": mask.astype(np.int64)}
    module = torch_text_encoder(encoder)
    with torch.no_grad():
        made = module(**{name: torch.from_numpy(value) for name, value in case.items()})
    return {**case, "prompt_embeds": made.numpy()}


def _inputs(case: Tensors) -> dict[str, NDArray[Any]]:
    return {"input_ids": case["input_ids"], "attention_mask": case["attention_mask"]}


def _compare(case: Tensors, made: Tensors, stage: str, plan: str) -> LedgerEntry:
    """Rows of padding are thrown away by the runtime, and are not compared."""
    real = case["attention_mask"] != 0
    expected, found = case["prompt_embeds"][real], made["prompt_embeds"][real]
    return compare(expected, found, stage=stage, network=TEXT_ENCODER, case=CASE, plan=plan)


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
