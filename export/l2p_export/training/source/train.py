"""Trains a latent source on the small world: autoencoder, then text encoder and transformer together.

The parts are the published architectures at a small size, so diffusers can open the resulting pipeline folder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from l2p_export.families.z_image_l2p.pixel import load_published
from l2p_export.families.z_image_l2p.specs import model_spec
from l2p_export.tensors.sources import read_tensor
from l2p_export.training.flow import draw_sigmas
from l2p_export.training.loop.loop import CPU, Schedule, generator, train
from l2p_export.training.loop.settings import digest, locked_folder
from l2p_export.training.sheet import SampleSpec
from l2p_export.training.source.autoencoder import IMAGE_PX, train_autoencoder
from l2p_export.training.source.folder import load_autoencoder, open_source, write_source
from l2p_export.training.source.latents import LatentData, SceneSet, scene_latents
from l2p_export.training.source.model import SourceModel, initial_source, source_dimensions
from l2p_export.training.source.samples import source_samples
from l2p_export.training.source.tokens import CAPTION_TOKENS, world_tokenizer
from l2p_runtime.errors import ArtifactError, UsageError
from l2p_runtime.positions import rope_tables

if TYPE_CHECKING:
    from l2p_export.families.z_image_l2p.dimensions import Dimensions
    from l2p_export.training.source.folder import Source
    from l2p_runtime.progress import Reporter

NOISE_SHIFT = 2.0
"""Shift of the training sigmas, as of a sampler's: shapes and positions are decided at high sigmas."""

CAPTION_DROPOUT = 0.1
TOKEN_PX, SIZE_MIN_PX = 16, 64

PROBE_WEIGHT = 0.1
"""Weight of the probe's cross entropy, in nats per token, against the mean squared error of x0 - noise."""


@dataclass(frozen=True, slots=True)
class SourceSpec:
    """Settings of training a source.

    Attributes:
        scenes: rendered training images of the transformer, at the first size.
        sizes_px: sides of the square training images. Each step of the transformer takes one of them at random, with an
            equal number of tokens, so with fewer images of a larger size.
        autoencoder: schedule of the autoencoder, which is trained first.
        transformer: schedule of text encoder and transformer.
    """

    scenes: int
    autoencoder: Schedule
    transformer: Schedule
    sizes_px: tuple[int, ...] = (IMAGE_PX,)

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            UsageError: too few scenes, or an invalid size.
        """
        if self.scenes < 1:
            raise UsageError(f"{self.scenes} scenes, expected 1 or more")
        for size_px in self.sizes_px or (0,):
            if size_px < SIZE_MIN_PX or size_px % TOKEN_PX:
                raise UsageError(
                    f"a size is {size_px} px, expected a multiple of {TOKEN_PX} px from {SIZE_MIN_PX} px on"
                )


def train_source(
    out: Path,
    work: Path,
    spec: SourceSpec,
    report: Reporter,
    *,
    samples: SampleSpec | None,
    init: Path | None = None,
    device: torch.device = CPU,
) -> None:
    """Train all parts and write the pipeline folder; a stopped run resumes where it stopped.

    Args:
        out: pipeline folder to write.
        work: folder of training states and latents.
        spec: settings of training.
        report: gets tasks and progress.
        samples: samples to draw and judge at each saved state of the transformer; None for none.
        init: a source of this kind to initialize from; its autoencoder is kept.
        device: device of all computations, which are in float32.

    Raises:
        As `loop.train`; ArtifactError if `init` is another kind of source; HostError if a file cannot be written,
        or another run writes one of the folders.
    """
    with locked_folder(work, busy=f"another run is training in `{work}`"), locked_folder(out):
        _train_parts(out, work, spec, report, samples, init, device)


def _train_parts(
    out: Path,
    work: Path,
    spec: SourceSpec,
    report: Reporter,
    samples: SampleSpec | None,
    init: Path | None,
    device: torch.device,
) -> None:
    d, tokenizer, seed = source_dimensions(), world_tokenizer(), spec.transformer.seed
    if init is None:
        autoencoder = train_autoencoder(work / "autoencoder", spec.autoencoder, report, device)
        model = initial_source(d, seed)
    else:
        begun = open_source(init)
        autoencoder, model = load_autoencoder(begun), load_source_model(begun, d, seed)
    # PyTorch's method: the library's override warns about things that do not apply here.
    nn.Module.to(autoencoder, device)
    model.to(device)
    first_px = spec.sizes_px[0]
    data = {
        size_px: scene_latents(
            work / f"latents-{size_px}.safetensors",
            autoencoder,
            tokenizer,
            SceneSet(max(1, spec.scenes * first_px**2 // size_px**2), size_px, seed),
            report,
            device,
        )
        for size_px in sorted(set(spec.sizes_px))
    }
    steps_draw_from = [data[size_px] for size_px in spec.sizes_px]
    folder = work / "transformer"
    if samples is None:
        train_transformer(model, steps_draw_from, folder, spec.transformer, report)
    else:
        on_save = source_samples(folder, d, autoencoder, tokenizer, samples)
        train_transformer(model, steps_draw_from, folder, spec.transformer, report, on_save)
    nn.Module.to(autoencoder, CPU)
    write_source(out, model.to(CPU), d, autoencoder, tokenizer, NOISE_SHIFT)


def check_initial(init: Path | None) -> None:
    """Refuse a folder that cannot initialize a source.

    Raises:
        ArtifactError: it is no source, or one of other dimensions.
    """
    if init is not None:
        load_source_model(open_source(init), source_dimensions(), 0)


def load_source_model(source: Source, d: Dimensions, seed: int) -> SourceModel:
    """Load text encoder and transformer of a pipeline folder for training; `seed` initializes the probe.

    Raises:
        ArtifactError: the source has other dimensions.
    """
    model = initial_source(d, seed)
    tensors = {name: torch.from_numpy(read_tensor(tensor)) for name, tensor in source.transformer.tensors.items()}
    missing = load_published(model.latent, tensors)
    text = source.text.state_dict()
    if missing or {name: tuple(t.shape) for name, t in text.items()} != {
        name: tuple(t.shape) for name, t in model.text.state_dict().items()
    }:
        raise ArtifactError(
            f"`{source.folder}` is a source of other dimensions, so it cannot initialize this one",
            hint="give a folder that `train source` wrote, or leave --init out",
        )
    model.text.load_state_dict(text)
    return model


def train_transformer(
    model: SourceModel,
    data: Sequence[LatentData],
    folder: Path,
    schedule: Schedule,
    report: Reporter,
    on_save: Callable[[int, SourceModel], None] = lambda step, model: None,
) -> None:
    """Train text encoder and transformer by flow matching on x0 - noise; the model ends with the EMA weights.

    Args:
        model: model to train, on the device of the data.
        data: scenes of each size; each step takes one size at random.
        folder: folder of training states.
        schedule: `batch` counts images of the first size; steps of other sizes have as many tokens.
        report: gets steps and loss.
        on_save: called with a model of the EMA weights after each saved state.

    Raises:
        As `loop.train`.
    """
    d, device = source_dimensions(), data[0].latents.device
    grids = [(scenes.latents.shape[2] // 2, scenes.latents.shape[3] // 2) for scenes in data]
    tables = [
        [torch.from_numpy(table).to(device) for table in rope_tables(model_spec(d), rows, columns, CAPTION_TOKENS)]
        for rows, columns in grids
    ]

    def loss(step: int, micro: int) -> Tensor:
        which = int(torch.randint(len(data), (1,), generator=generator(schedule.seed, step)))
        scenes, size = data[which], schedule.batch // schedule.micro_batches
        size = max(1, size * math.prod(grids[0]) // math.prod(grids[which]))
        draws = generator(schedule.seed, step, micro + 1)
        index = torch.randint(len(scenes.latents), (size,), generator=draws).to(device)
        dropped = (torch.rand(size, generator=draws) < CAPTION_DROPOUT).to(device)
        sigma = draw_sigmas(size, NOISE_SHIFT, draws).to(device)
        latents, ids = scenes.latents[index].float(), scenes.ids[index]
        ids = torch.where(dropped[:, None], scenes.empty, ids)
        by_noise = generator(schedule.seed, step, micro + 1, 1, device=device)
        noise = torch.randn(latents.shape, generator=by_noise, device=device)
        mixed = torch.lerp(latents, noise, sigma[:, None, None, None])
        made, scores = model.probed(mixed, 1 - sigma, ids, *tables[which])
        error: Tensor = (made - (latents - noise)).square().mean()
        # Without a caption, the layout cannot be predicted.
        surprise = -(scenes.shares[index].float() * scores.log_softmax(-1)).sum(-1).mean(-1)
        return error + PROBE_WEIGHT * (surprise * ~dropped).mean()

    # Runs with different initial weights must not resume each other; a sum of the weights tells them apart.
    start = float(sum(value.double().abs().sum() for value in model.state_dict().values()))
    images = {f"{8 * scenes.latents.shape[2]} px": len(scenes.latents) for scenes in data}
    settings = {"stage": "source", "schedule": asdict(schedule), "images": images, "start": f"{start:.6e}"}
    # Scenes, and the autoencoder that made latents of them.
    settings["data"] = digest([scenes.made_from for scenes in data])
    averaging = SourceModel(d).to(device)

    def saved(step: int, averaged: Mapping[str, Tensor]) -> None:
        averaging.load_state_dict(dict(averaged))
        on_save(step, averaging)

    averaged = train(model, loss, schedule, folder, settings, report, title="source", on_save=saved)
    model.load_state_dict(averaged)
