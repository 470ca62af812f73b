"""Trains a latent source on the small world: autoencoder, then text encoder and transformer together.

The parts are the published ones at a small size, so the result is a pipeline folder that diffusers opens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from l2p_export.families.z_image_l2p.pixel import load_published
from l2p_export.families.z_image_l2p.specs import model_spec
from l2p_export.tensors import read_tensor
from l2p_export.training.flow import draw_sigmas
from l2p_export.training.loop import Schedule, generator, train
from l2p_export.training.pipeline_folder import load_autoencoder, open_source, write_source
from l2p_export.training.samples import SampleSpec, source_samples
from l2p_export.training.source.autoencoder import train_autoencoder
from l2p_export.training.source.latents import LatentData, scene_latents
from l2p_export.training.source.model import SourceModel, initial_source, source_dimensions
from l2p_export.training.source.tokens import CAPTION_TOKENS, world_tokenizer
from l2p_runtime.errors import ArtifactError, UsageError
from l2p_runtime.positions import rope_tables

if TYPE_CHECKING:
    from l2p_export.families.z_image_l2p.dimensions import Dimensions
    from l2p_export.progress import Reporter
    from l2p_export.training.pipeline_folder import Source

NOISE_SHIFT = 2.0
"""Noise levels are drawn evenly and shifted by this, as a sampler's: shapes and places are decided at high noise."""

CAPTION_DROPOUT = 0.1

PROBE_WEIGHT = 0.1
"""Of the cross entropy of what lies where, in nats a token, against the mean squared error of x0 - noise."""


@dataclass(frozen=True, slots=True)
class SourceSpec:
    """How a source is trained.

    Attributes:
        scenes: rendered images that the transformer learns from.
        autoencoder: schedule of the first stage.
        transformer: schedule of the second.
    """

    scenes: int
    autoencoder: Schedule
    transformer: Schedule

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            UsageError: too few scenes.
        """
        if self.scenes < 1:
            raise UsageError(f"{self.scenes} scenes, expected 1 or more")


def train_source(
    out: Path, work: Path, spec: SourceSpec, report: Reporter, *, samples: SampleSpec | None, init: Path | None = None
) -> None:
    """Train all parts and write the pipeline folder; a stopped run goes on where it stopped.

    Args:
        out: pipeline folder to write.
        work: training states and latents.
        spec: how to train.
        report: told of stages.
        samples: what is drawn and judged at each saved state of the transformer, if anything.
        init: a source of this kind to begin with; its autoencoder stays as it is.

    Raises:
        As `loop.train`; ArtifactError where `init` is another kind of source; HostError where a disk refuses.
    """
    d, tokenizer, seed = source_dimensions(), world_tokenizer(), spec.transformer.seed
    if init is None:
        autoencoder = train_autoencoder(work / "autoencoder", spec.autoencoder, report)
        model = initial_source(d, seed)
    else:
        begun = open_source(init)
        autoencoder, model = load_autoencoder(begun), load_source_model(begun, d)
    data = scene_latents(work / "latents.safetensors", autoencoder, tokenizer, spec.scenes, seed, report)
    folder = work / "transformer"
    if samples is None:
        train_transformer(model, data, folder, spec.transformer, report)
    else:
        on_save = source_samples(folder, d, autoencoder, tokenizer, samples)
        train_transformer(model, data, folder, spec.transformer, report, on_save)
    write_source(out, model, d, autoencoder, tokenizer, NOISE_SHIFT)


def load_source_model(source: Source, d: Dimensions) -> SourceModel:
    """Text encoder and transformer of a pipeline folder, to train on.

    Raises:
        ArtifactError: its sizes are others.
    """
    model = SourceModel(d)
    tensors = {name: torch.from_numpy(read_tensor(tensor)) for name, tensor in source.transformer.tensors.items()}
    missing = load_published(model.latent, tensors)
    text = source.text.state_dict()
    if missing or {name: tuple(t.shape) for name, t in text.items()} != {
        name: tuple(t.shape) for name, t in model.text.state_dict().items()
    }:
        raise ArtifactError(
            f"`{source.folder}` is a source of other sizes, which this one cannot begin with",
            hint="give a folder that `train source` wrote, or leave --init out",
        )
    model.text.load_state_dict(text)
    return model


def train_transformer(
    model: SourceModel,
    data: LatentData,
    folder: Path,
    schedule: Schedule,
    report: Reporter,
    on_save: Callable[[int, SourceModel], None] = lambda step, model: None,
) -> None:
    """Train text encoder and transformer by flow matching on x0 - noise; the model is left with the averaged weights.

    Raises:
        As `loop.train`.
    """
    d = source_dimensions()
    rows, columns = data.latents.shape[2] // 2, data.latents.shape[3] // 2
    rope_cos, rope_sin = (
        torch.from_numpy(table) for table in rope_tables(model_spec(d), rows, columns, CAPTION_TOKENS)
    )

    def loss(step: int, micro: int) -> Tensor:
        size = schedule.batch // schedule.micro_batches
        draws = generator(schedule.seed, step, micro)
        index = torch.randint(len(data.latents), (size,), generator=draws)
        latents = data.latents[index].float()
        ids = data.ids[index]
        dropped = torch.rand(size, generator=draws) < CAPTION_DROPOUT
        ids = torch.where(dropped[:, None], data.empty, ids)
        noise = torch.randn(latents.shape, generator=draws)
        sigma = draw_sigmas(size, NOISE_SHIFT, draws)
        mixed = torch.lerp(latents, noise, sigma[:, None, None, None])
        made, scores = model.probed(mixed, 1 - sigma, ids, rope_cos, rope_sin)
        error: Tensor = (made - (latents - noise)).square().mean()
        # Without a caption there is nothing to take it from.
        surprise = -(data.shares[index].float() * scores.log_softmax(-1)).sum(-1).mean(-1)
        return error + PROBE_WEIGHT * (surprise * ~dropped).mean()

    # Two runs that begin with other weights are two runs; a sum tells them apart.
    start = float(sum(value.double().abs().sum() for value in model.state_dict().values()))
    settings = {"stage": "source", "schedule": asdict(schedule), "images": len(data.latents), "start": f"{start:.6e}"}
    averaging = SourceModel(d)

    def saved(step: int, averaged: Mapping[str, Tensor]) -> None:
        averaging.load_state_dict(dict(averaged))
        on_save(step, averaging)

    averaged = train(model, loss, schedule, folder, settings, report, title="source", on_save=saved)
    model.load_state_dict(averaged)
