"""Transfer: a latent source becomes a pixel model by training its shallow layers on images, trunk frozen.

Initialised and trained as published (l2p.md 2.4, 2.5, 5.2): what matches by name and shape is copied, the trunk stays
as it is, the rest learns x0 - noise by flow matching.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from l2p_export.families.z_image_l2p.blocks import Block
from l2p_export.families.z_image_l2p.dimensions import (
    VARIANTS,
    Dimensions,
    Stage,
    published_dimensions,
    source_dimensions,
)
from l2p_export.families.z_image_l2p.pixel import PixelModel, checkpoint_activations
from l2p_export.families.z_image_l2p.specs import HALO_ROWS
from l2p_export.tensors.sources import read_tensor
from l2p_export.training.corpus.rendered import RenderedScenes
from l2p_export.training.loop.distributed import ALONE, Team, averaging_gradients, cut_over
from l2p_export.training.loop.loop import Schedule, train_weights
from l2p_export.training.loop.masters import Weights, trained_weights
from l2p_export.training.source.folder import Source
from l2p_export.training.transfer.adapters import copy_adapters, trunk_sha256, write_adapters
from l2p_export.training.transfer.batches import Images, batches, embed_captions, require_seeds
from l2p_export.training.transfer.storage import STORAGES, StoredLinear, largest_error
from l2p_runtime.errors import ArtifactError, HostError, UsageError

if TYPE_CHECKING:
    from l2p_export.tensors.checkpoint import Checkpoint
    from l2p_runtime.progress import Reporter

AUTOCASTS, OPTIMIZER_DEVICES = ("none", "bf16"), ("same", "cpu")
NOISES = ("stored", "fresh")


@dataclass(frozen=True, slots=True)
class TransferSpec:
    """What is trained, and on what.

    Attributes:
        variant: `1k`, `4k`, `8k` or `10k`.
        sizes_px: sides of the square images that steps draw from, in turn by chance.
        schedule: how long and how fast.
        noise: `stored`: each image's own noise, from its seed, as published; `fresh`: new at each step.
        shift: of the noise levels.
        caption_dropout: share of samples without a caption.
        window_tokens: side of the square that the head draws and the loss sees; 0 for the whole image.
        halo_tokens: what the head reads around it; 3 is exact, fewer cost less and show it edges that are none.
        head_divisor: the published head's channels over this; 1 for the published head.
        checkpointing: recompute activations in the backward pass.
    """

    variant: str
    sizes_px: tuple[int, ...]
    schedule: Schedule
    noise: str = "fresh"
    shift: float = 3.0
    caption_dropout: float = 0.1
    window_tokens: int = 0
    halo_tokens: int = HALO_ROWS
    head_divisor: int = 1
    checkpointing: bool = False

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            UsageError: names the one that is wrong.
        """
        if self.variant not in VARIANTS.values():
            raise UsageError(f"the variant is {self.variant!r}, expected one of {', '.join(VARIANTS.values())}")
        if self.noise not in NOISES:
            raise UsageError(f"noise is {self.noise!r}, expected {' or '.join(NOISES)}")
        patch_px = self.patch_px
        # The 10k head takes tokens in pairs.
        multiple_px, what = (2 * patch_px, "two patches") if self.variant == "10k" else (patch_px, "patch")
        for size_px in self.sizes_px or (0,):
            if size_px < multiple_px or size_px % multiple_px:
                raise UsageError(
                    f"a size is {size_px} px, expected a multiple of the {self.variant} {what}, {multiple_px} px"
                )
        if self.variant == "10k" and self.window_tokens:
            raise UsageError("the 10k head draws whole images alone", hint="leave the window out")
        if not 0 <= self.window_tokens * patch_px <= min(self.sizes_px):
            raise UsageError(
                f"a window of {self.window_tokens} tokens is larger than an image of {min(self.sizes_px)} px"
            )
        if not 0 <= self.halo_tokens <= HALO_ROWS:
            raise UsageError(f"a halo of {self.halo_tokens} tokens, expected 0 to {HALO_ROWS}, which is exact")
        if not 0 <= self.caption_dropout < 1:
            raise UsageError(f"caption dropout is {self.caption_dropout}, expected 0 up to 1")
        if not 0 < self.shift < math.inf or self.head_divisor < 1:
            raise UsageError(
                f"shift is {self.shift} and head divisor {self.head_divisor}, expected above 0, and 1 or more"
            )

    @property
    def patch_px(self) -> int:
        """Side of a patch."""
        return next(patch_px for patch_px, name in VARIANTS.items() if name == self.variant)


@dataclass(frozen=True, slots=True)
class Means:
    """How memory and precision are spent on it.

    Attributes:
        autocast: `bf16`: matrix products in BF16; `none`: all in float32.
        trunk_storage: what the frozen trunk's matrices are kept in: `float32`, `bfloat16` or `float8`.
        optimizer_device: `cpu` keeps float32 masters, moments and averages in the CPU's memory; with BF16 autocast and
            whole weights, the device then holds matrices in BF16, as autocast would make them.
        is_compiled: the pixel head runs as torch.compile makes it, which rounds a little otherwise.
    """

    autocast: str = "none"
    trunk_storage: str = "float32"
    optimizer_device: str = "same"
    is_compiled: bool = False

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            UsageError: names the one that is wrong.
        """
        allowed = {"autocast": AUTOCASTS, "trunk_storage": tuple(STORAGES), "optimizer_device": OPTIMIZER_DEVICES}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise UsageError(f"{name} is {getattr(self, name)!r}, expected {', '.join(values)}")

    @property
    def settings(self) -> dict[str, str | None]:
        """What changes the values that a run computes by more than their rounding; None for what is left plain."""
        return {
            "autocast": None if self.autocast == "none" else self.autocast,
            "trunk_storage": None if self.trunk_storage == "float32" else self.trunk_storage,
        }


PLAIN = Means()


def transfer(
    source: Source,
    images: Images,
    spec: TransferSpec,
    out: Path,
    folder: Path,
    report: Reporter,
    on_save: Callable[[int, PixelModel], None] | None = None,
    *,
    init: Path | None = None,
    means: Means = PLAIN,
    team: Team = ALONE,
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> PixelModel:
    """Train adapters and write them to `out` with the digest of the trunk that they belong to.

    Args:
        source: what is moved to pixels.
        images: with captions: a corpus, or scenes.
        spec: what is trained.
        out: .safetensors file; written at each saved state, from the averaged weights.
        folder: where training states go.
        report: told of steps and loss.
        on_save: called with the model that has the averaged weights, on the first process.
        init: adapters of this trunk to begin with, of any variant: what matches by name and shape is copied.
        means: how memory and precision are spent.
        team: the processes that share the work; all call this alike.
        metadata: what the file states beside its trunk and the shift.

    Returns:
        The model with the averaged weights; with those of the last step where they are cut over processes.

    Raises:
        As `loop.train`; ArtifactError for a damaged corpus or source; UsageError for a batch that does not split over
        processes and micro batches, stored noise without seeds, or `on_save` with weights that are cut; HostError where
        nothing compiles.
    """
    require_split(spec.schedule, team)
    require_compiler(means, team)
    if spec.noise == "stored":
        require_seeds(images)
    if team.is_sharded and on_save is not None:
        raise UsageError("weights that are cut over processes cannot draw samples", hint="leave the sharding out")
    d = transfer_dimensions(source, spec)
    model = initial_model(source, d, spec.schedule.seed, means.trunk_storage)
    _tell_rounding(model, means, team, report)
    digest = trunk_sha256(source, d)
    begun = None if init is None else copy_adapters(init, model, digest, report)
    if spec.checkpointing:
        checkpoint_activations(model)
    batch_of = batches(images, embed_captions(source, images), d, spec, team)
    weights, called = _on_device(model, spec.schedule, means, team)

    def loss(step: int, micro: int) -> Tensor:
        batch = batch_of(step, micro)
        with torch.autocast(team.device.type, torch.bfloat16, enabled=means.autocast == "bf16"):
            made = called(batch.mixed, batch.time, batch.embeds.values, batch.embeds.mask, *batch.rope, batch.window)
        error: Tensor = (made.to(torch.float32) - batch.wanted).square().mean()
        return error

    states = {"l2p.shift": f"{spec.shift:g}", **metadata}

    def saved(step: int, averaged: Mapping[str, Tensor]) -> None:
        write_adapters(out, averaged, digest, states)
        if on_save is not None:
            with _values_of(model, averaged):
                on_save(step, model)

    settings = {"stage": "transfer", "trunk": digest, "corpus": len(images), **asdict(spec), **means.settings}
    # Only where it is so: states of runs on a corpus say nothing of it.
    settings |= {"init": begun} | ({"scenes": True} if isinstance(images, RenderedScenes) else {})
    # Steps repeat a few shapes many times: the fastest kernel for each is worth a search.
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True):
        averaged = train_weights(
            weights,
            loss,
            spec.schedule,
            folder,
            settings,
            report,
            title=f"transfer {spec.variant}",
            on_save=saved,
            team=team,
            called=called,
        )
    if team.leads and not out.exists():
        saved(spec.schedule.steps, averaged)
    if not team.is_sharded:
        model.load_state_dict(dict(averaged), strict=False)
    return model


def require_split(schedule: Schedule, team: Team) -> None:
    """Refuse a batch that does not split into equal micro batches of equal processes.

    Raises:
        UsageError: says what would.
    """
    parts = schedule.micro_batches * team.size
    if schedule.batch % parts:
        raise UsageError(
            f"{schedule.batch} samples do not split into {schedule.micro_batches} micro batches "
            f"of each of {team.size} processes",
            hint=f"make the batch a multiple of {parts}",
        )


def require_compiler(means: Means, team: Team) -> None:
    """Refuse compilation where the compiler that `torch.compile` calls is missing.

    Raises:
        HostError: names it.
    """
    if not means.is_compiled:
        return
    hint = "install it, or leave --compile out"
    # What torch calls; it looks for no other.
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if team.device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise HostError("--compile needs Triton on a GPU, and it is not installed", hint=hint)
    if shutil.which(compiler) is None:
        raise HostError(f"--compile needs a C++ compiler, and `{compiler}` is not on PATH", hint=f"{hint}, or set CXX")


def transfer_dimensions(source: Source, spec: TransferSpec) -> Dimensions:
    """The pixel model's dimensions: the source's transformer, the variant's patches and head."""
    return pixel_dimensions(source.transformer, spec)


def pixel_dimensions(transformer: Checkpoint, spec: TransferSpec) -> Dimensions:
    """As `transfer_dimensions`, from the transformer's headers alone."""
    pixels = published_dimensions(spec.variant)
    divisor = spec.head_divisor
    stages = tuple(
        Stage(stage.name, *(_divided(channels, divisor) for channels in (stage.encoder, stage.up, stage.decoder)))
        for stage in pixels.stages
    )
    pixels = replace(pixels, stages=stages, bottleneck=_divided(pixels.bottleneck, divisor))
    return source_dimensions(transformer.shapes, pixels)


def initial_model(source: Source, d: Dimensions, seed: int, trunk_storage: str = "float32") -> PixelModel:
    """PyTorch's initial values, and over them what the source has by name and shape; the trunk takes no gradient.

    Made part by part, so that the trunk is in memory only as it is stored.

    Raises:
        ArtifactError: the source lacks a tensor that has no initial value.
    """
    with torch.device("meta"):
        model = PixelModel(d)
    model.trunk.requires_grad_(requires_grad=False)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for name in [name for name, _ in model.named_modules()]:
            part = model.get_submodule(name)
            if not dict(part.named_parameters(recurse=False)):
                continue
            part.to_empty(device="cpu", recurse=False)
            is_frozen = name.startswith("trunk.")
            has_initial = False
            if isinstance(part, (nn.Linear, nn.Conv2d)) and not is_frozen:
                part.reset_parameters()
                has_initial = True
            _copy_from_source(source, name.partition(".")[2], part, has_initial=has_initial)
            if is_frozen and isinstance(part, nn.Linear) and trunk_storage != "float32":
                model.set_submodule(name, StoredLinear(part, trunk_storage))
    return model


def _copy_from_source(source: Source, layer: str, part: nn.Module, *, has_initial: bool) -> None:
    for own, parameter in part.named_parameters(recurse=False):
        published = f"{layer}.{own}" if layer else own
        found = source.transformer.tensors.get(published)
        if found is not None and tuple(found.shape) == tuple(parameter.shape):
            parameter.copy_(torch.from_numpy(read_tensor(found)))
        elif not has_initial:
            what = "lacks it" if found is None else f"has it as {list(found.shape)}"
            raise ArtifactError(
                f"the model needs `{published}` {list(parameter.shape)} from the source, which {what}",
                hint="fetch the folder again",
            )


def _on_device(model: PixelModel, schedule: Schedule, means: Means, team: Team) -> tuple[Weights, nn.Module]:
    """Trained weights, and what the loss calls, each on the device that it is meant for."""
    on_cpu = means.optimizer_device == "cpu"
    if team.is_sharded:
        trunk = tuple(part for part in model.trunk.modules() if isinstance(part, Block))
        # What is stored narrow is small, and none of it is trained.
        whole = trunk if means.trunk_storage != "float32" else ()
        blocks = tuple(part for part in model.modules() if isinstance(part, Block) and part not in whole)
        cut_over(model, blocks, whole, team)
    elif not on_cpu:
        model.to(team.device)
    if team.device.type == "cuda" and not team.is_sharded:
        # 64 images of 1024 px at a quarter of the channels, on an H200: 246 ms a step, 301 ms in rows.
        model.head.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if means.is_compiled:
        model.head.compile()
    narrow = on_cpu and not team.is_sharded and means.autocast == "bf16"
    weights = trained_weights(model, schedule.weight_decay, schedule.beta2, on_cpu=on_cpu, narrow=narrow)
    model.to(team.device)
    return weights, averaging_gradients(model, team)


@contextmanager
def _values_of(model: nn.Module, averaged: Mapping[str, Tensor]) -> Iterator[None]:
    """The model has other values while this lasts."""
    own = {name: parameter for name, parameter in model.named_parameters() if name in averaged}
    before = {name: parameter.detach().clone() for name, parameter in own.items()}
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(averaged[name])
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(before[name])


def _tell_rounding(model: PixelModel, means: Means, team: Team, report: Reporter) -> None:
    error = largest_error(model.trunk)
    if error and team.leads:
        report.note(
            f"--trunk-storage {means.trunk_storage} moves the frozen trunk's values by up to {error:.2g} of a layer's, "
            "root mean square; adapters learn beside that trunk and run beside the exact one"
        )


def _divided(channels: int, divisor: int) -> int:
    # The outermost encoders of the 8k and 10k heads have 3 channels, as many as the image.
    return channels if channels == 3 else max(channels // divisor, min(channels, 16))
