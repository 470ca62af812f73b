"""Checks a transfer, forecasts its memory, and runs it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2p_export.training.corpus.checking import check_images
from l2p_export.training.corpus.corpus import open_corpus
from l2p_export.training.corpus.rendered import world_scenes
from l2p_export.training.sheet import SampleSpec
from l2p_export.training.source.folder import open_headers, open_source
from l2p_export.training.transfer.batches import padded_lengths, require_seeds
from l2p_export.training.transfer.forecast import TrainingForecast, require_memory, transfer_forecast
from l2p_export.training.transfer.holdout import holdout_count, read_losses, split_images
from l2p_export.training.transfer.samples import pixel_samples
from l2p_export.training.transfer.spec import pixel_dimensions, require_compiler, require_split
from l2p_export.training.transfer.train import transfer
from l2p_runtime.text import CHAT_TEMPLATE, load_tokenizer

if TYPE_CHECKING:
    from l2p_export.families.z_image_l2p.dimensions import Dimensions
    from l2p_export.training.corpus.reader import Images
    from l2p_export.training.loop.distributed import ProcessGroup
    from l2p_export.training.transfer.spec import TrainingOptions, TransferSpec
    from l2p_runtime.progress import Reporter


@dataclass(frozen=True, slots=True)
class TransferJob:
    """A transfer that is checked and not yet started.

    Attributes:
        source: pipeline folder.
        images: images to train on, and those to hold out.
        holdout: number of images to hold out.
        samples: samples to draw and judge at each saved state; None for none.
        dimensions: of the pixel model.
        counts: of images, by what is done to them; empty before `check_job_images`.
    """

    source: Path
    images: Images
    holdout: int
    spec: TransferSpec
    options: TrainingOptions
    ranks: ProcessGroup
    samples: SampleSpec | None
    dimensions: Dimensions
    forecast: TrainingForecast
    counts: Mapping[str, int] = field(default_factory=dict)

    @property
    def facts(self) -> dict[str, Any]:
        """The settings as JSON values."""
        layers = [self.dimensions.trunk.start, self.dimensions.trunk.stop]
        return {
            "images": len(self.images),
            "held_out_images": self.holdout,
            "image_changes": dict(self.counts),
            "trunk_layers": layers,
            **asdict(self.spec),
            **asdict(self.options),
        }

    def require_memory(self) -> None:
        """Check the forecast against this machine.

        Raises:
            HostError: the transfer does not fit.
        """
        require_memory(self.forecast, self.spec, self.options, self.ranks)


def check_transfer(
    source: Path,
    corpus: Path | None,
    spec: TransferSpec,
    options: TrainingOptions,
    ranks: ProcessGroup,
    *,
    scenes: int,
    samples: int,
) -> TransferJob:
    """Check everything that headers show, and forecast memory.

    Args:
        source: pipeline folder.
        corpus: folder of images; None for scenes of the small world.
        spec: settings of the transfer.
        options: memory and precision options.
        ranks: the process group.
        scenes: number of scenes without a corpus.
        samples: number of captions drawn and judged at each saved state; 0 for none.

    Raises:
        UsageError: options that do not fit each other, images without seeds for stored noise, or none left to train on.
        ArtifactError: the source or the corpus cannot be read.
    """
    require_split(spec.schedule, ranks)
    require_compiler(options, ranks)
    drawn = SampleSpec(samples, min(spec.sizes_px), shift=spec.shift) if samples else None
    transformer, encoder = open_headers(source)
    images = open_corpus(corpus) if corpus else world_scenes(scenes, spec.schedule.seed)
    holdout = holdout_count(spec.holdout, len(images))
    if spec.noise == "stored":
        require_seeds(images)
    d = pixel_dimensions(transformer, spec)
    lengths = padded_lengths(load_tokenizer(encoder.tokenizer, CHAT_TEMPLATE), images)
    forecast = transfer_forecast(
        d,
        spec,
        options,
        ranks,
        caption_tokens=max(lengths.values()),
        text_parameters=sum(math.prod(shape) for shape in encoder.model.shapes.values()),
        caption_values=sum(lengths.values()) * d.caption_width,
        files=len(images) if corpus else 0,
    )
    return TransferJob(source, images, holdout, spec, options, ranks, drawn, d, forecast)


def check_job_images(job: TransferJob, report: Reporter) -> TransferJob:
    """Decode every image once, and report what is upscaled, cropped or converted.

    Raises:
        ArtifactError: images cannot be trained on; lists them.
    """
    checked = check_images(job.images, max(job.spec.sizes_px), report)
    if checked.counts:
        report.note(checked.text)
    return replace(job, images=checked.images, counts=checked.counts)


def run_transfer(
    job: TransferJob, out: Path, work: Path, init: Path | None, metadata: Mapping[str, str], report: Reporter
) -> float | None:
    """Train, or resume from the last saved state in `work`, and write adapters to `out`.

    Returns:
        The loss on held-out images; None without them, and on ranks other than 0.

    Raises:
        UsageError: the states in `work` are of another run.
        ArtifactError: the source or `init` does not fit the model.
    """
    opened = open_source(job.source)
    on_save = None if job.samples is None else pixel_samples(work, job.dimensions, opened, job.samples, job.spec)
    training, held_out = split_images(job.images, job.holdout, job.spec.schedule.seed)
    transfer(
        opened,
        training,
        job.spec,
        out,
        work,
        report,
        on_save,
        init=init,
        options=job.options,
        ranks=job.ranks,
        metadata=metadata,
        held_out=held_out,
    )
    if held_out is None or not job.ranks.is_rank_zero:
        return None
    _, loss = read_losses(work)[-1]
    report.note(f"loss on {len(held_out)} held-out images: {loss:.4f}")
    return loss
