"""Builds a bundle from a checkpoint.

    checkpoint -> digests -> plans -> ONNX graphs -> proof (reference and ledger) -> engines -> bundle.json

Each arrow is one or more stages, which are found again by the digest of their inputs. So a build that was stopped
resumes after the last completed stage, and a build with nothing new does nothing. Replacing `bundle.json` is the only
commit: a build that is stopped at any time leaves the previous bundle, or none.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from l2p_calib.plans.file import check_layers, read_plan
from l2p_calib.plans.plan import PLANS, PrecisionPlan
from l2p_calib.statistics.ranges import merge_statistics, read_statistics
from l2p_engines.builders.engines import (
    EngineOptions,
    build_engines,
    require_engine_resources,
    require_engines_possible,
)
from l2p_engines.forecast.calls import host_needs
from l2p_engines.profiles import load_profile
from l2p_engines.store.output import open_output, require_bundle_or_nothing, require_disk
from l2p_engines.store.shared import open_store, register_bundle, require_store_or_nothing
from l2p_engines.store.stages import STAGES, Home, StageRunner, find_stage
from l2p_export.build.progress import WholeBuild
from l2p_export.build.text import add_text_encoder
from l2p_export.checkpoint.demo import UNTRAINED, demo_model
from l2p_export.checkpoint.loading import LoadedModel, checkpoint_record, company_note, load_model, require_own_trunk
from l2p_export.checkpoint.lora import parse_lora, trunk_layers_touched
from l2p_export.families.qwen3 import TextEncoder, open_text_encoder
from l2p_export.graphs.ahead import ToTrace, tracing_ahead
from l2p_export.graphs.export import graph_key, graph_stage, weight_bytes
from l2p_export.precision.plans import PrecisionRequest, ResolvedPlan, float32_products, make_plans, plain_plan
from l2p_export.proof.prove import prove
from l2p_export.proof.reference import References
from l2p_export.tensors.digests import WeightDigests, weight_digests
from l2p_export.tensors.metadata import is_trained, sampling_defaults, trained_grid
from l2p_runtime import __version__
from l2p_runtime.backends import open_backend
from l2p_runtime.bundle import Bundle
from l2p_runtime.contract import (
    BASE_PRECISIONS,
    SCHEMA,
    TEXT_ENCODER,
    FileRecord,
    GraphRecord,
    Grid,
    Manifest,
    Profile,
    Sampling,
    bundle_digest,
    check_base_grid,
    manifest_to_bytes,
)
from l2p_runtime.errors import HostError, UsageError
from l2p_runtime.files import partial_folder, sweep_partials
from l2p_runtime.memory import available_host_bytes

if TYPE_CHECKING:
    from l2p_runtime.backends import Backend
    from l2p_runtime.progress import Reporter


LEDGER_BACKEND = "onnx"
"""Backend that runs ONNX graphs for the ledger."""
SPARE_DISK_BYTES = 64 << 20
"""Disk space, in addition to weights, for ONNX graphs, reference tensors and the file system's own data."""
_SCRATCH = "l2p-demo"


@dataclass(frozen=True, slots=True)
class BuildJob:
    """A build that is checked and not yet started.

    Attributes:
        asked: the precision plans, before anything is measured.
        base_grid: the trained grid; None where nothing states it.
        store: folder of shared files; None for a bundle that holds all its files.
        engines: targets and options of the engines.
        jobs: number of processes that trace networks.
    """

    loaded: LoadedModel
    profiles: tuple[Profile, ...]
    asked: PrecisionRequest
    sampling: Sampling
    base_grid: Grid | None
    out: Path
    text_encoder: TextEncoder | None = None
    store: Path | None = None
    engines: EngineOptions = field(default_factory=EngineOptions)
    jobs: int = 1

    @property
    def plans(self) -> tuple[PrecisionPlan, ...]:
        """The plans of the bundle before anything is measured."""
        model = self.loaded.model
        return (
            *(plain_plan(model, plan.base, plan.name) for plan in self.asked.plans),
            *(file.plan for file in self.asked.files),
        )

    @property
    def is_trained(self) -> bool:
        """False for seeded weights, which draw noise."""
        return is_trained(self.loaded.checkpoint.metadata)

    def weight_bytes(self, plan: PrecisionPlan) -> int:
        """Bytes of all weights under one of the plans, the text encoder's included."""
        shapes = dict(self.loaded.checkpoint.shapes)
        if self.text_encoder is not None:
            shapes |= self.text_encoder.model.shapes
        return plan.weight_bytes(shapes)

    @property
    def counted_stages(self) -> int:
        """Number of stages that `WholeBuild` counts: an ONNX graph and its engines for each network, and proofs."""
        texts = int(self.text_encoder is not None)
        networks = len(self.loaded.model.networks) + texts
        return len(self.plans) * networks * (1 + len(self.engines.targets)) + 1 + texts

    def network_bytes(self) -> dict[tuple[str, str], int]:
        """(network, plan) to the bytes of its weights."""
        model = self.loaded.model
        shapes = {spec.name: model.network_shapes(spec.name) for spec in model.networks}
        if self.text_encoder is not None:
            shapes[TEXT_ENCODER] = self.text_encoder.model.shapes
        return {(name, plan.name): plan.weight_bytes(found) for name, found in shapes.items() for plan in self.plans}


@dataclass(frozen=True, slots=True)
class Built:
    """The result of a build.

    Attributes:
        is_new: False if the same bundle was there already.
        made: labels of the stages that were run; empty if there was nothing to do.
    """

    bundle: Bundle
    is_new: bool
    made: tuple[str, ...]


@contextmanager
def check_build(
    checkpoint: Path | None,
    profiles: tuple[str, ...],
    precisions: tuple[str, ...],
    out: Path | None,
    *,
    engines: EngineOptions | None = None,
    plan_files: tuple[Path, ...] = (),
    statistics: tuple[Path, ...] = (),
    source: Path | None = None,
    loras: tuple[str, ...] = (),
    skip_text_encoder_lora: bool = False,
    text_encoder: Path | None = None,
    store: Path | None = None,
    jobs: int = 1,
    base_grid: Grid | None = None,
) -> Iterator[BuildJob]:
    """Check everything that headers and profiles tell, before any work.

    A seeded demo checkpoint is a temporary file, which is removed when the context ends.

    Args:
        checkpoint: file or folder; None for the demo.
        profiles: names or paths, all of one patch size.
        precisions: names of plans; fp32 when there is neither one nor a plan file.
        out: folder to write; named after checkpoint and profiles when None.
        engines: targets and options of engines; None for only ONNX graphs.
        plan_files: files of whole plans, as bundles contain them, in addition to `precisions`.
        statistics: files that `calibrate` wrote, in addition to the measurements of the build's own cases.
        source: latent checkpoint to complete the checkpoint from and to compare it with.
        loras: LoRAs to merge, as `FILE:STRENGTH`.
        skip_text_encoder_lora: whether to leave out what they change in a text encoder.
        text_encoder: Hugging Face folder of the text encoder, or a pipeline folder that has one; None for a bundle
            that takes only embeddings.
        store: folder whose files bundles share; None for a bundle that holds all its files.
        jobs: number of processes that trace networks; each takes a core, and memory for torch.
        base_grid: the trained grid, token rows and columns; None for that of the first profile or the checkpoint.

    Raises:
        UsageError: no jobs, profiles that do not fit the checkpoint, an unknown precision, or an output that is not a
            bundle.
        ArtifactError: the checkpoint is damaged, incomplete or of no known family; a plan or statistics cannot be read.
        HostError: the libraries for exporting are not installed.
    """
    if jobs < 1:
        raise UsageError(f"{jobs} jobs, expected 1 or more")
    _require_libraries()
    read = tuple(load_profile(profile) for profile in dict.fromkeys(profiles))
    asked = _asked(precisions, plan_files, statistics)
    temporary = Path(tempfile.gettempdir())
    sweep_partials(temporary, _SCRATCH)
    with partial_folder(temporary / _SCRATCH) as scratch:
        is_demo = checkpoint is None
        if checkpoint is None:
            demo = demo_model(read[0].patch_px, scratch)
            checkpoint = demo.checkpoint
            source, text_encoder = source or demo.source, text_encoder or demo.text_encoder
        requests = [parse_lora(text, skip_text_encoder=skip_text_encoder_lora) for text in loras]
        loaded = load_model(checkpoint, source, requests)
        for profile in read:
            profile.check_model(loaded.model.spec)
        stem = "demo" if is_demo else loaded.checkpoint.path.stem
        name = f"{stem}-{'-'.join(profile.name for profile in read)}.bundle"
        sampling = sampling_defaults(loaded.checkpoint.metadata, read[0].sampling)
        base_grid = base_grid or read[0].base_grid or trained_grid(loaded.checkpoint.metadata)
        if base_grid is not None:
            check_base_grid(base_grid, loaded.model.spec.rotary.axis_lengths)
        require_bundle_or_nothing(out or Path(name))
        text = open_text_encoder(text_encoder, loaded.model.spec.caption_width) if text_encoder is not None else None
        options = engines or EngineOptions()
        job = BuildJob(loaded, read, asked, sampling, base_grid, out or Path(name), text, store, options, jobs)
        for file in asked.files:
            check_layers(file, [loaded.model.layout(spec.name) for spec in loaded.model.networks])
        _require_engines(job, job.plans)
        yield job


def check_machine(job: BuildJob) -> Backend:
    """Check what a build needs of this machine before any work; the backend that its proof runs on.

    Raises:
        HostError: too little memory, or the backend cannot run here.
        UsageError: the store is something else.
    """
    _require_memory(job)
    if job.store is not None:
        require_store_or_nothing(job.store)
    return open_backend(LEDGER_BACKEND)


def build(job: BuildJob, reporter: Reporter) -> Built:
    """Run a build; stages that exist already are not run again.

    Raises:
        HostError: too little disk space, or the backend cannot run here.
        ArtifactError: a weight is NaN, Inf or out of range.
        ParityError: an ONNX graph is further from torch than its threshold; nothing is committed.
    """
    backend = check_machine(job)
    if not job.is_trained:
        reporter.note(UNTRAINED)
    for note in (note for lora in job.loaded.loras for note in lora.notes):
        reporter.note(note)
    if job.loaded.checkpoint.company:
        reporter.note(company_note(job.loaded.checkpoint))
    touched = trunk_layers_touched(job.loaded.loras, job.loaded.model.network_shapes("trunk"))
    if touched:
        reporter.note(f"the LoRA changes {len(touched)} frozen layers and makes another trunk: {_listed(touched)}")
    shared = nullcontext(None) if job.store is None else open_store(job.store)
    with open_output(job.out) as output, shared as store:
        run = StageRunner(store or Home(output.root), reporter.note)
        if not (run.home.root / STAGES).is_dir():
            # Before the weights are hashed, which takes a minute for the published ones.
            needed = sum(job.weight_bytes(item) for item in job.plans) + SPARE_DISK_BYTES
            require_disk(run.home.root, needed)
            free = shutil.disk_usage(run.home.root).free - needed
            require_engine_resources(job.engines, job.network_bytes(), free, str(run.home.root))
        manifest = _run_stages(job, run, backend, WholeBuild(reporter, run.kinds, job.counted_stages))
        data, folder = manifest_to_bytes(manifest), store.root if store else None
        if store is not None:
            register_bundle(store, output.root, bundle_digest(data))
        made = tuple(label for label in run.made if not label.startswith("digests "))
        if data == output.committed():
            output.tidy(run.keys)
            return Built(Bundle(output.root, manifest, bundle_digest(data), folder), is_new=False, made=made)
        return Built(output.commit(manifest, folder, run.keys), is_new=True, made=made)


def _run_stages(job: BuildJob, run: StageRunner, backend: Backend, reporter: Reporter) -> Manifest:
    loaded = job.loaded
    digests = _weight_digests(loaded, run, reporter)
    require_own_trunk(loaded, digests.trunk_sha256)
    references = References(loaded, job.profiles, reporter)
    planned = make_plans(run, job.asked, digests, references, reporter)
    # A measured plan may have raised a layer to a dtype that a target cannot multiply.
    _require_engines(job, [item.plan for item in planned])
    wanted = [] if job.jobs == 1 else _to_trace(job, planned, run, digests)
    with tracing_ahead(run.home, wanted, job.jobs):
        graphs, files = _graphs(job, planned, run, digests, reporter)
    bases = {item.plan.name: item.plan.base for item in planned}
    proof = prove(run, references, graphs, bases, {record.path: record for record in files}, backend, reporter)
    del references  # holds the outputs of every case
    files += [item.file for item in planned if item.file is not None]
    text = None
    if job.text_encoder is not None:
        text_plans = [plain_plan(job.text_encoder.model, item.plan.base, item.plan.name) for item in planned]
        text = add_text_encoder(run, job.text_encoder, text_plans, backend, reporter)
    files += [*proof.files, *(text.files if text else ())]
    networks = {spec.name: spec for spec in (*loaded.model.networks, *((text.record.network,) if text else ()))}
    to_compile = [(networks[graph.network], graph) for graph in (*graphs, *(text.record.graphs if text else ()))]
    records = {record.path: record for record in files}
    plans = [item.plan for item in planned]
    engines = build_engines(run, job.engines, loaded.model.spec, job.profiles, plans, to_compile, records, reporter)
    files += engines.files
    return Manifest(
        schema=SCHEMA,
        producer=f"l2p-export {__version__}",
        model=loaded.model.spec,
        checkpoint=checkpoint_record(loaded, digests.trunk_sha256),
        sampling=job.sampling,
        networks=loaded.model.networks,
        profiles=job.profiles,
        plans=tuple(item.ref for item in planned),
        graphs=tuple(graphs),
        references=proof.references,
        files=tuple(sorted(files, key=lambda record: record.path)),
        ledger=(
            *(entry for item in planned for entry in item.ledger),
            *proof.ledger,
            *(text.ledger if text else ()),
            *engines.ledger,
        ),
        text=text.record if text else None,
        engines=engines.records,
        base_grid=job.base_grid,
    )


def _require_engines(job: BuildJob, plans: Sequence[PrecisionPlan]) -> None:
    model = job.loaded.model
    products = {plan.name: float32_products(model, plan) for plan in plans}
    require_engines_possible(job.engines, model.spec, job.profiles, plans, products)


def _weight_digests(loaded: LoadedModel, run: StageRunner, reporter: Reporter) -> WeightDigests:
    names = {spec.name: tuple(loaded.model.network_shapes(spec.name)) for spec in loaded.model.networks}
    recipe = {"loras": [f"{lora.path.name}:{lora.strength!r}" for lora in loaded.loras]}
    return weight_digests(
        run, loaded.checkpoint.path.name, loaded.checkpoint.tensors, names, loaded.files, recipe, reporter
    )


def _graphs(
    job: BuildJob, planned: tuple[ResolvedPlan, ...], run: StageRunner, digests: WeightDigests, reporter: Reporter
) -> tuple[list[GraphRecord], list[FileRecord]]:
    graphs: list[GraphRecord] = []
    files: list[FileRecord] = []
    model, tensors = job.loaded.model, job.loaded.checkpoint.tensors
    plans = [item.plan for item in planned]
    left_bytes = sum(
        weight_bytes(model, spec.name, precision)
        for precision, spec in itertools.product(plans, model.networks)
        if find_stage(run.home, graph_key(model, spec, precision, digests.of(spec.name))) is None
    )
    if left_bytes:
        require_disk(run.home.root, left_bytes + SPARE_DISK_BYTES)
    for precision, spec in itertools.product(plans, model.networks):
        stage = graph_stage(run, model, tensors, spec, precision, digests.of(spec.name), reporter)
        files += stage.files
        graphs.append(GraphRecord(spec.name, precision.name, precision.opset, *(file.path for file in stage.files)))
    return graphs, files


def _to_trace(
    job: BuildJob, planned: tuple[ResolvedPlan, ...], run: StageRunner, digests: WeightDigests
) -> list[ToTrace]:
    """Networks and plans whose ONNX graphs do not exist yet, in the order of `_graphs`."""
    model = job.loaded.model
    return [
        ToTrace(model, spec, item.plan)
        for item, spec in itertools.product(planned, model.networks)
        if find_stage(run.home, graph_key(model, spec, item.plan, digests.of(spec.name))) is None
    ]


def _asked(precisions: tuple[str, ...], plan_files: tuple[Path, ...], statistics: tuple[Path, ...]) -> PrecisionRequest:
    unknown = [name for name in precisions if name not in BASE_PRECISIONS]
    if unknown:
        raise UsageError(f"there is no precision `{unknown[0]}`", hint=f"precisions: {', '.join(PLANS)}")
    asked = precisions or (() if plan_files else ("fp32",))
    names = [base for base in BASE_PRECISIONS if base in asked]
    names.sort(key=asked.index)
    files = tuple(read_plan(path) for path in plan_files)
    for index, file in enumerate(files):
        if file.name in (*names, *(other.name for other in files[:index])):
            raise UsageError(f"two plans are called `{file.name}`", hint="change the `name` in the file of one of them")
    measured = merge_statistics([read_statistics(path) for path in statistics]) if statistics else None
    return PrecisionRequest(tuple(PLANS[name] for name in names), files, measured)


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _require_memory(job: BuildJob) -> None:
    """Refuse a build that the free memory cannot hold.

    Raises:
        HostError: with the bytes that are needed and free.
    """
    sources = [job.loaded.checkpoint.tensors, job.text_encoder.tensors if job.text_encoder else {}]
    # A matrix is read whole as float32 to be stored transposed.
    largest = max(4 * math.prod(tensor.shape) for tensors in sources for tensor in tensors.values())
    needed, free = host_needs({}, largest).memory, available_host_bytes()
    if needed > free:
        raise HostError(
            f"the build needs about {needed:,} bytes of memory, {free:,} are free",
            hint="close other programs, or raise the limit that holds this process (ulimit -v, the container's memory)",
        )


def _require_libraries() -> None:
    """Fail at once if a library for exporting is not installed; imports none, since a build may need none."""
    for module in ("torch", "onnx", "onnxscript", "onnx_ir", "ml_dtypes"):
        if importlib.util.find_spec(module) is None:
            raise HostError(
                f"`build` needs `{module}`, which is not installed", hint="pip install 'l2p-export[export,cpu]'"
            )
