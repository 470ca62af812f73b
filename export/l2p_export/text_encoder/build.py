"""A text encoder goes into a bundle: graphs, tokenizer, chat template, and the proof that the graphs are right."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from l2p_calib.ledger import compare, require_passed
from l2p_export.tensors import read_tensor
from l2p_export.verification import run_engine
from l2p_runtime.bundle import file_digest, file_record
from l2p_runtime.contract import TEXT_ENCODER, FileRecord, GraphRecord, LedgerEntry, TextRecord
from l2p_runtime.memory import available_host_bytes
from l2p_runtime.tensorfile import open_tensorfile, write_tensorfile
from l2p_runtime.text import CHAT_TEMPLATE, MAX_TOKENS

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

    from l2p_calib.plans import PrecisionPlan
    from l2p_export.families import Model
    from l2p_export.output import OutputFolder
    from l2p_export.progress import Reporter
    from l2p_export.text_encoder.folder import TextEncoder
    from l2p_runtime.backends import Backend
    from l2p_runtime.bundle import Bundle

    Tensors = Mapping[str, NDArray[Any]]

CASE = "text"
"""Name of the one case that the ledger holds: two token rows of which one is padded."""

_CASE_LENGTHS = (24, 7)
_DIGEST_DIGITS = 16
# The torch network and ONNX Runtime's copy of it with packed weights: about three times the weights.
_NETWORK_COPIES = 3


def weight_bytes(encoder: TextEncoder, plan: PrecisionPlan) -> int:
    """Bytes of the encoder's weights under a plan."""
    item_bytes = {"float32": 4, "float16": 2}
    return sum(math.prod(shape) * item_bytes[plan.dtype(name)] for name, shape in encoder.shapes.items())


def add_text_encoder(
    encoder: TextEncoder,
    plans: Sequence[PrecisionPlan],
    output: OutputFolder,
    backend: Backend,
    reporter: Reporter,
) -> tuple[TextRecord, list[FileRecord], list[LedgerEntry]]:
    """Write graphs, tokenizer and template into the bundle's folders and compare the graphs with torch float32.

    Returns:
        What the manifest's `text` is, the files to add to its `files`, and the entries to add to its `ledger`.

    Raises:
        ArtifactError: a weight is NaN, Inf or out of range.
        ParityError: a graph is further from torch than its threshold.
    """
    graphs, files = _write_graphs(encoder, plans, output, reporter)
    tokenizer = _write_text(output, "tokenizer", ".json", encoder.tokenizer.read_bytes())
    template = _write_text(output, "chat_template", ".txt", CHAT_TEMPLATE.encode())
    reference, ledger = _prove(encoder, graphs, output, backend, reporter)
    record = TextRecord(
        network=encoder.network,
        graphs=tuple(graphs),
        tokenizer=tokenizer.path,
        chat_template=template.path,
        max_tokens=MAX_TOKENS,
        vocabulary=encoder.config.sizes.vocabulary,
        reference=reference.path if reference else None,
    )
    return record, [*files, tokenizer, template, *([reference] if reference else [])], ledger


def verify_text(bundle: Bundle, backend: Backend, plan: str, advance: Any = lambda done: None) -> list[LedgerEntry]:
    """Run the stored case of a bundle's text encoder under one plan; nothing without an encoder.

    Raises:
        ArtifactError: the reference file is damaged.
    """
    text = bundle.manifest.text
    if text is None:
        return []
    if text.reference is None:
        reason = "no stored reference; the encoder did not fit the memory of the machine that built the bundle"
        return [LedgerEntry(_stage(plan), TEXT_ENCODER, CASE, "not run", reason)]
    case = _read_case(bundle, text)
    record = text.graph(plan)
    engine = backend.load(bundle.path(record.graph), bundle.path(record.weights), text.network)
    try:
        entry = _compare(case, run_engine(engine, _inputs(case)), plan)
    finally:
        engine.close()
    advance(1)
    return [entry]


def torch_text_encoder(encoder: TextEncoder) -> nn.Module:
    """The network in torch float32 with the folder's weights."""
    import torch

    with torch.device("meta"):
        module = encoder.module(TEXT_ENCODER, lambda layer: torch.float32)
    state = {name: torch.from_numpy(read_tensor(encoder.tensors[name])) for name in module.state_dict()}
    module.load_state_dict(state, assign=True)
    return module


def _write_graphs(
    encoder: TextEncoder, plans: Sequence[PrecisionPlan], output: OutputFolder, reporter: Reporter
) -> tuple[list[GraphRecord], list[FileRecord]]:
    from l2p_export.graphs.export import export_graph

    graphs, files = [], []
    # The exporter asks for modules and blocks and for nothing else that a family's model has.
    model = cast("Model", encoder)
    for plan in plans:
        with reporter.stage(f"{plan.name} graph of `{TEXT_ENCODER}`", weight_bytes(encoder, plan)) as advance:
            found = export_graph(model, encoder.tensors, encoder.network, plan, output.folder("graphs"), advance)
        graph = file_record(output.root, found.graph, found.graph_sha256)
        weights = file_record(output.root, found.weights, found.weights_sha256)
        files += [graph, weights]
        graphs.append(GraphRecord(TEXT_ENCODER, plan.name, plan.opset, graph.path, weights.path))
    return graphs, files


def _write_text(output: OutputFolder, name: str, suffix: str, data: bytes) -> FileRecord:
    partial = output.folder("text") / f"{name}.partial"
    partial.write_bytes(data)
    return _named_by_content(output, partial, name, suffix)


def _named_by_content(output: OutputFolder, partial: Path, name: str, suffix: str) -> FileRecord:
    digest = file_digest(partial)
    path = partial.with_name(f"{name}.{digest[:_DIGEST_DIGITS]}{suffix}")
    partial.replace(path)
    return file_record(output.root, path, digest)


def _prove(
    encoder: TextEncoder,
    graphs: Sequence[GraphRecord],
    output: OutputFolder,
    backend: Backend,
    reporter: Reporter,
) -> tuple[FileRecord | None, list[LedgerEntry]]:
    needed = _NETWORK_COPIES * 4 * sum(math.prod(shape) for shape in encoder.shapes.values())
    available = available_host_bytes()
    if needed > available:
        reason = f"the text encoder in float32 takes about {needed:,} bytes here, {available:,} are free"
        return None, [LedgerEntry(_stage(record.plan), TEXT_ENCODER, CASE, "not run", reason) for record in graphs]
    with reporter.stage("text reference in torch float32", 1, "calls") as advance:
        case = _reference(encoder)
        advance(1)
    ledger = []
    for record in graphs:
        with reporter.stage(f"text ledger {record.plan}", 1, "calls") as advance:
            engine = backend.load(output.root / record.graph, output.root / record.weights, encoder.network)
            try:
                ledger.append(_compare(case, run_engine(engine, _inputs(case)), record.plan))
            finally:
                engine.close()
            advance(1)
    require_passed(ledger)
    partial = output.folder("reference") / f"{CASE}.partial"
    write_tensorfile(partial, case)
    return _named_by_content(output, partial, CASE, ".safetensors"), ledger


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


def _compare(case: Tensors, made: Tensors, plan: str) -> LedgerEntry:
    """Rows of padding are thrown away by the runtime, and are not compared."""
    real = case["attention_mask"] != 0
    expected, found = case["prompt_embeds"][real], made["prompt_embeds"][real]
    return compare(expected, found, stage=_stage(plan), network=TEXT_ENCODER, case=CASE, plan=plan)


def _read_case(bundle: Bundle, text: TextRecord) -> dict[str, NDArray[Any]]:
    from l2p_runtime.errors import ArtifactError

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


def _stage(plan: str) -> str:
    return f"torch float32 -> {plan} graph"
