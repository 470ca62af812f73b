"""From a checkpoint to a bundle.

    checkpoint -> graphs -> proof (reference and ledger) -> bundle.json

Files are written under names that carry their digest; replacing `bundle.json` is the only commit, so whatever stops a
build leaves the bundle that was there before, or none.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from l2p_calib.plans import PLANS, PrecisionPlan
from l2p_engines.profiles import load_profile
from l2p_export.demo import UNTRAINED, write_demo_checkpoint
from l2p_export.loading import LoadedModel, checkpoint_record, load_model
from l2p_export.lora import parse_lora, trunk_layers_touched
from l2p_export.metadata import is_trained, sampling_defaults
from l2p_export.output import OutputFolder, open_output, require_bundle_or_nothing, require_disk
from l2p_export.proof import prove
from l2p_export.text_encoder import TextEncoder, add_text_encoder, open_text_encoder
from l2p_runtime import __version__
from l2p_runtime.backends import open_backend
from l2p_runtime.bundle import Bundle, file_record
from l2p_runtime.contract import SCHEMA, FileRecord, GraphRecord, Manifest, Profile, Sampling, TextRecord
from l2p_runtime.errors import HostError, UsageError

if TYPE_CHECKING:
    from l2p_export.progress import Reporter

_ITEM_BYTES = {"float32": 4, "float16": 2}


@dataclass(frozen=True, slots=True)
class BuildPlan:
    """A build that was checked and not yet begun."""

    loaded: LoadedModel
    profiles: tuple[Profile, ...]
    plans: tuple[PrecisionPlan, ...]
    sampling: Sampling
    backend: str
    out: Path
    text_encoder: TextEncoder | None = None

    @property
    def is_trained(self) -> bool:
        """False for seeded weights, which draw noise."""
        return is_trained(self.loaded.checkpoint.metadata)

    def weight_bytes(self, plan: PrecisionPlan) -> int:
        """Bytes of all weights under one of the plans, the text encoder's included."""
        shapes = dict(self.loaded.checkpoint.shapes)
        if self.text_encoder is not None:
            shapes |= self.text_encoder.shapes
        return sum(math.prod(shape) * _ITEM_BYTES[plan.dtype(name)] for name, shape in shapes.items())


@contextmanager
def plan_build(
    checkpoint: Path | None,
    profiles: tuple[str, ...],
    precisions: tuple[str, ...],
    backend: str,
    out: Path | None,
    *,
    source: Path | None = None,
    loras: tuple[str, ...] = (),
    text_encoder: Path | None = None,
) -> Iterator[BuildPlan]:
    """Check everything that headers and profiles tell, before any work.

    The demo checkpoint is a temporary file and lives as long as the context.

    Args:
        checkpoint: file or folder; None for the demo checkpoint.
        profiles: names or paths, all of one patch size.
        precisions: names of plain plans.
        backend: what runs the graphs for the ledger: `auto` or a backend by name.
        out: folder to write; named after checkpoint and profiles when None.
        source: latent checkpoint to complete the checkpoint from and to compare it with.
        loras: to merge, as `FILE:STRENGTH`.
        text_encoder: Hugging Face folder of the text encoder, or a pipeline folder that has one; None for a bundle
            that takes embeddings alone.

    Raises:
        UsageError: profiles that do not fit the checkpoint, an unknown precision, an output that is something else.
        ArtifactError: the checkpoint is damaged, incomplete or of no known family.
    """
    read = tuple(load_profile(profile) for profile in dict.fromkeys(profiles))
    unknown = [name for name in precisions if name not in PLANS]
    if unknown:
        raise UsageError(f"there is no precision `{unknown[0]}`", hint=f"precisions: {', '.join(PLANS)}")
    plans = tuple(PLANS[name] for name in dict.fromkeys(precisions))
    with tempfile.TemporaryDirectory(prefix="l2p-demo-") as scratch:
        if checkpoint is None:
            checkpoint = Path(scratch) / "demo.safetensors"
            write_demo_checkpoint(checkpoint, read[0].patch_px)
        loaded = load_model(checkpoint, source, [parse_lora(text) for text in loras])
        for profile in read:
            profile.check_model(loaded.model.spec)
        stem = loaded.checkpoint.path.stem
        name = f"{stem}-{'-'.join(profile.name for profile in read)}.bundle"
        sampling = sampling_defaults(loaded.checkpoint.metadata, read[0].sampling)
        require_bundle_or_nothing(out or Path(name))
        text = open_text_encoder(text_encoder, loaded.model.spec.caption_width) if text_encoder is not None else None
        yield BuildPlan(loaded, read, plans, sampling, backend, out or Path(name), text)


def build(plan: BuildPlan, reporter: Reporter) -> Bundle:
    """Carry out a build.

    Raises:
        HostError: a library is missing, no room on the disk, or the backend cannot run here.
        ArtifactError: a weight is NaN, Inf or out of range.
        ParityError: a graph is further from torch than its threshold; nothing is committed.
    """
    _require_libraries()
    backend = open_backend(plan.backend)
    if not plan.is_trained:
        reporter.note(UNTRAINED)
    touched = trunk_layers_touched(plan.loaded.loras, plan.loaded.model.spec.trunk_layers)
    if touched:
        reporter.note(f"the LoRA changes {len(touched)} frozen layers and makes another trunk: {_listed(touched)}")
    with open_output(plan.out) as output:
        require_disk(output.root, sum(plan.weight_bytes(item) for item in plan.plans))
        graphs, files = _write_graphs(plan, output, reporter)
        references, more_files, ledger = prove(plan.loaded, plan.profiles, graphs, output, backend, reporter)
        text: TextRecord | None = None
        if plan.text_encoder is not None:
            added = add_text_encoder(plan.text_encoder, plan.plans, output, backend, reporter)
            text, text_files, text_ledger = added
            files += text_files
            ledger += text_ledger
        with reporter.stage("trunk digest"):
            checkpoint = checkpoint_record(plan.loaded)
        manifest = Manifest(
            schema=SCHEMA,
            producer=f"l2p-export {__version__}",
            model=plan.loaded.model.spec,
            checkpoint=checkpoint,
            sampling=plan.sampling,
            networks=plan.loaded.model.networks,
            profiles=plan.profiles,
            plans=tuple(item.ref for item in plan.plans),
            graphs=tuple(graphs),
            references=tuple(references),
            files=tuple(sorted([*files, *more_files], key=lambda record: record.path)),
            ledger=tuple(ledger),
            text=text,
        )
        return output.commit(manifest)


def _write_graphs(
    plan: BuildPlan, output: OutputFolder, reporter: Reporter
) -> tuple[list[GraphRecord], list[FileRecord]]:
    from l2p_export.graphs.export import export_graph

    graphs, files = [], []
    tensors = plan.loaded.checkpoint.tensors
    for precision, spec in itertools.product(plan.plans, plan.loaded.model.networks):
        with reporter.stage(f"{precision.name} graph of `{spec.name}`") as advance:
            found = export_graph(plan.loaded.model, tensors, spec, precision, output.folder("graphs"), advance)
        graph = file_record(output.root, found.graph, found.graph_sha256)
        weights = file_record(output.root, found.weights, found.weights_sha256)
        files += [graph, weights]
        graphs.append(GraphRecord(spec.name, precision.name, precision.opset, graph.path, weights.path))
    return graphs, files


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _require_libraries() -> None:
    """Fail at once, by name, when the exporting half is not installed."""
    for module in ("torch", "onnx", "onnxscript", "onnx_ir", "ml_dtypes"):
        try:
            __import__(module)
        except ImportError as error:
            raise HostError(
                f"`build` needs `{module}`, which cannot be imported: {error}",
                hint="pip install 'l2p-export[export,cpu]'",
            ) from error
