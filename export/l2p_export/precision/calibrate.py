"""Measures activation statistics: runs a bundle's float32 ONNX graphs on noisy pictures of prompts.

A sample is one denoising call: a picture that the bundle draws of a prompt, with the noise of a timestep added. The
networks run one after the other. Their outputs are kept in the work folder, so memory holds one network and one sample,
and a calibration that was stopped resumes after the last completed network.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2p_calib.prompts import read_prompts
from l2p_calib.statistics.onnx_values import count_graph, graph_groups, point_values
from l2p_calib.statistics.ranges import (
    SCHEMA,
    NetworkStatistics,
    Statistics,
    network_statistics,
    read_statistics,
    require_finite,
    statistics_to_bytes,
)
from l2p_engines.store.locks import locked
from l2p_export.graphs.names import published_names
from l2p_export.graphs.stored import bundle_digests, bundle_model, float32_plan
from l2p_export.proof.cases import call_inputs, network_inputs
from l2p_export.toolchain import toolchain
from l2p_runtime import Pipeline, __version__
from l2p_runtime.contract import NETWORKS
from l2p_runtime.errors import UsageError
from l2p_runtime.files import is_partial_of, sweep_partials, write_bytes, write_text
from l2p_runtime.noise import normal_noise
from l2p_runtime.tensorfile import open_tensorfile, write_tensorfile

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from l2p_calib.layout import QuantizationLayout
    from l2p_runtime.bundle import Bundle
    from l2p_runtime.progress import Reporter

    Tensors = Mapping[str, NDArray[Any]]


TIMES_A_PICTURE = 4
"""Samples of one picture, at different timesteps."""

STEPS_MAX = 8
"""Maximum steps in which a picture is drawn; noise is added to it afterwards."""

_GOLDEN = 0.6180339887498949
_SETTINGS = "settings.json"
_CAPTION_TOKENS = 24


@dataclass(frozen=True, slots=True)
class Sample:
    """One denoising call.

    Attributes:
        prompt: index of its prompt.
        height_px: height of the picture.
        width_px: width of the picture.
        seed: seed of picture and noise.
        time: t = 1 - sigma.
    """

    prompt: int
    height_px: int
    width_px: int
    seed: int
    time: float


@dataclass(frozen=True, slots=True)
class CalibrationJob:
    """A calibration that is checked and not yet started.

    Attributes:
        samples: one denoising call each.
        prompts: prompts of the pictures. Without a text encoder, embeddings are noise seeded by the prompt's index.
        has_text: whether the bundle has a text encoder.
    """

    bundle: Bundle
    samples: tuple[Sample, ...]
    prompts: tuple[str, ...]
    has_text: bool
    out: Path

    @property
    def source(self) -> str:
        """Summary of the samples for people: calls, prompts and sizes."""
        sizes = ", ".join(dict.fromkeys(f"{sample.width_px}x{sample.height_px}" for sample in self.samples))
        captions = "prompts" if self.has_text else "captions of noise"
        count = len({sample.prompt for sample in self.samples})
        return f"{len(self.samples)} calls, {count} {captions}, {sizes}"

    @property
    def settings(self) -> str:
        """Everything that decides the measurements, as JSON."""
        samples = [[s.prompt, s.height_px, s.width_px, s.seed, s.time] for s in self.samples]
        said = {"bundle": self.bundle.digest, "version": __version__, "prompts": self.prompts, "samples": samples}
        # The code decides the points that are measured; its digest is in `tools`.
        return json.dumps({**said, "tools": toolchain()}, sort_keys=True)


def check_calibration(
    bundle: Bundle,
    out: Path,
    *,
    prompts: Path | None = None,
    samples: int = 16,
    sizes: Sequence[tuple[int, int]] = (),
    seed: int = 0,
) -> CalibrationJob:
    """Check everything before any work.

    Args:
        bundle: bundle with an fp32 plan.
        out: file to write.
        prompts: file of prompts; None for those of the package.
        samples: number of denoising calls.
        sizes: (height, width) in pixels; if empty, the first profile's minimum size and one twice as wide.
        seed: seed of the first picture.

    Raises:
        UsageError: a size is not a multiple of the model's, there are no samples, or prompts are given for a bundle
            without a text encoder.
        ArtifactError: the bundle has no fp32 ONNX graphs.
    """
    model, manifest = bundle.manifest.model, bundle.manifest
    if samples < 1:
        raise UsageError(f"--samples is {samples}, expected 1 or more")
    float32_plan(bundle)
    if prompts is not None and manifest.text is None:
        raise UsageError("prompts were given, and the bundle has no text encoder", hint="build it with --text-encoder")
    profile = manifest.profiles[0]
    height, width = profile.height_px.min, profile.width_px.min
    chosen = list(sizes) or [(height, width), (height, min(2 * width, profile.width_px.max))]
    unit = model.patch_px * model.head.row_multiple
    wrong = next((size for size in chosen if size[0] % unit or size[1] % unit or min(size) < unit), None)
    if wrong is not None:
        raise UsageError(f"the size {wrong[1]}x{wrong[0]} is no multiple of {unit} pixels")
    texts = tuple(dict.fromkeys(read_prompts(prompts)))
    drawn = [
        Sample(
            prompt=(index // TIMES_A_PICTURE) % len(texts),
            height_px=chosen[(index // TIMES_A_PICTURE) % len(chosen)][0],
            width_px=chosen[(index // TIMES_A_PICTURE) % len(chosen)][1],
            seed=seed + index // TIMES_A_PICTURE,
            time=(0.5 + index * _GOLDEN) % 1.0,
        )
        for index in range(samples)
    ]
    return CalibrationJob(bundle, tuple(drawn), texts, manifest.text is not None, out)


def calibrate(
    job: CalibrationJob, reporter: Reporter, more: Callable[[Path, Statistics], object] | None = None
) -> Statistics:
    """Measure every network and write the file; resumes a calibration that was stopped.

    Args:
        job: from `check_calibration`.
        reporter: shows the runs.
        more: called with the folder of the samples and the statistics, before the folder is removed.

    Raises:
        ArtifactError: an ONNX graph is not this version's, or made NaN or Inf.
        HostError: another calibration writes there, or ONNX Runtime is not installed.
    """
    work = work_folder(job.out)
    job.out.parent.mkdir(parents=True, exist_ok=True)
    with _work_folder(work, job) as folder:
        digests, model = bundle_digests(job.bundle, reporter), bundle_model(job.bundle)
        if not job.has_text:
            reporter.note("the bundle has no text encoder: captions are noise")
        _draw(job, folder, reporter)
        parts = [_measure(job, name, digests[name], model.layout(name), folder, reporter) for name in NETWORKS]
        found = Statistics(SCHEMA, job.source, tuple(sorted(parts, key=lambda item: (item.network, item.sha256))))
        write_bytes(job.out, statistics_to_bytes(found))
        if more is not None:
            more(folder, found)
        shutil.rmtree(work, ignore_errors=True)
    return found


def work_folder(out: Path) -> Path:
    """Where the results so far of a calibration lie while it writes `out`."""
    return out.with_name(f"{out.name}.work")


@contextmanager
def _work_folder(work: Path, job: CalibrationJob) -> Iterator[Path]:
    """The work folder, with the results so far of this calibration; it is emptied if it is another calibration's."""
    # Beside the folder, which is removed under the lock.
    with locked(work.with_name(f"{work.name}.lock"), busy=f"another calibration is writing `{job.out}`"):
        path = work / _SETTINGS
        if work.exists() and not path.is_file() and not _is_empty(work):
            raise UsageError(
                f"`{work}` is in the way: no calibration made it", hint="remove it, or choose another --out"
            )
        work.mkdir(exist_ok=True)
        if path.is_file() and path.read_text(encoding="utf-8") != job.settings:
            shutil.rmtree(work)
            work.mkdir()
        sweep_partials(work)
        write_text(path, job.settings)
        yield work


def _is_empty(work: Path) -> bool:
    """Whether a calibration that was killed at its start may have left the folder."""
    return work.is_dir() and all(is_partial_of(entry.name, _SETTINGS) for entry in work.iterdir())


def _draw(job: CalibrationJob, folder: Path, reporter: Reporter) -> None:
    """Write the inputs of every sample; several samples share a picture."""
    import numpy as np

    left = [index for index in range(len(job.samples)) if not _case_path(folder, index).is_file()]
    if not left:
        return
    spec = job.bundle.manifest.model
    steps = min(job.bundle.manifest.sampling.steps, STEPS_MAX)
    with (
        Pipeline.open(job.bundle.root, "onnx", plan=float32_plan(job.bundle), store=job.bundle.store) as pipe,
        reporter.task("drawing", len(left), "samples") as advance,
    ):
        used = sorted({job.samples[index].prompt for index in left})
        embeds = dict(zip(used, _embeddings(job, pipe, used), strict=True))
        drawn: tuple[int, Any] = (-1, None)
        for index in left:
            sample = job.samples[index]
            size = (sample.height_px, sample.width_px)
            if drawn[0] != sample.seed:
                pixels = pipe.generate(
                    prompt_embeds=embeds[sample.prompt],
                    height=size[0],
                    width=size[1],
                    seed=sample.seed,
                    steps=steps,
                    guidance=1.0,
                    dtype="float16",
                )
                drawn = sample.seed, pixels.astype(np.float32).transpose(2, 0, 1) * 2 - 1
            noise = normal_noise(sample.seed, image_index=index + 1, rows=(0, size[0]), cols=(0, size[1]))
            image = (sample.time * drawn[1] + (1 - sample.time) * noise)[np.newaxis].astype(np.float32)
            case = call_inputs(spec, image, sample.time, embeds[sample.prompt])
            write_tensorfile(_case_path(folder, index), case)
            advance(1)


def _embeddings(job: CalibrationJob, pipe: Pipeline, prompts: Sequence[int]) -> list[NDArray[Any]]:
    if job.has_text:
        return list(pipe.encode([job.prompts[index] for index in prompts], truncate_prompt=True))
    width = job.bundle.manifest.model.caption_width
    # Lengths differ, as those of prompts do.
    return [
        normal_noise(index, image_index=1, channels=1, rows=(0, 3 + index % _CAPTION_TOKENS), cols=(0, width))[0]
        for index in prompts
    ]


def _measure(
    job: CalibrationJob, network: str, sha256: str, layout: QuantizationLayout, folder: Path, reporter: Reporter
) -> NetworkStatistics:
    """The statistics of one network; its outputs for each sample are written before them."""
    import onnx

    done = folder / f"{network}.json"
    if done.is_file():
        return read_statistics(done).networks[0]
    path = job.bundle.path(job.bundle.manifest.graph(network, float32_plan(job.bundle)).graph)
    graph = onnx.load(str(path), load_external_data=False).graph
    names = [point.name for point in layout.points]
    values_bytes = _values_bytes(job, network, layout)
    runs = len(graph_groups(names, values_bytes)) * len(job.samples)

    def inputs(index: int) -> Callable[[], Tensors]:
        return lambda: _inputs(folder, network, index)

    def keep(index: int, made: Tensors) -> None:
        write_tensorfile(folder / f"{index}.{network}.safetensors", {f"{network}.{k}": v for k, v in made.items()})

    with reporter.task(f"measuring `{network}`", runs, "calls") as advance:
        points = point_values(graph, layout, published_names)
        samples = [inputs(index) for index in range(len(job.samples))]
        counters = count_graph(path, points, samples, values_bytes, keep, advance)
    found = network_statistics(network, sha256, counters)
    require_finite(found)
    write_bytes(done, statistics_to_bytes(Statistics(SCHEMA, job.source, (found,))))
    return found


def _inputs(folder: Path, network: str, index: int) -> dict[str, NDArray[Any]]:
    """The inputs of one network, from the sample and the outputs of earlier networks."""
    known = sample_values(folder, index)
    return network_inputs(network, known, known)


def sample_values(folder: Path, index: int) -> dict[str, NDArray[Any]]:
    """A sample's inputs and, as `network.output`, the outputs of each network that was measured."""
    known: dict[str, NDArray[Any]] = {}
    paths = [_case_path(folder, index), *(folder / f"{index}.{name}.safetensors" for name in NETWORKS)]
    for path in paths:
        if path.is_file():
            file = open_tensorfile(path)
            known |= {name: file.read(name) for name in file.tensors}
    return known


def _values_bytes(job: CalibrationJob, network: str, layout: QuantizationLayout) -> int:
    """About the bytes of all points' values in the largest sample."""
    model = job.bundle.manifest.model
    pixels = max(sample.height_px * sample.width_px for sample in job.samples)
    if network == "head":
        return int(4 * pixels * model.head.peak_values_per_px * 4)
    tokens = pixels // model.patch_px**2 + model.caption_tokens_max
    return 4 * tokens * model.width * len(layout.points)


def _case_path(folder: Path, index: int) -> Path:
    return folder / f"{index}.safetensors"
