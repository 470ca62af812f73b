"""Settings of a transfer and their checks: model, data, schedule, memory and precision."""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from l2p_export.families.z_image_l2p.dimensions import (
    VARIANTS,
    Dimensions,
    UNetLevel,
    published_dimensions,
    source_dimensions,
)
from l2p_export.families.z_image_l2p.specs import HALO_ROWS, model_spec
from l2p_export.training.loop.distributed import ProcessGroup
from l2p_export.training.loop.loop import Schedule
from l2p_export.training.source.folder import Source
from l2p_export.training.transfer.storage import STORAGES
from l2p_runtime.contract import Grid, ModelSpec
from l2p_runtime.errors import HostError, UsageError
from l2p_runtime.policies import POSITIONS

if TYPE_CHECKING:
    from l2p_export.tensors.checkpoint import Checkpoint


AUTOCASTS, OPTIMIZER_DEVICES = ("none", "bf16"), ("same", "cpu")
NOISES = ("stored", "fresh")


@dataclass(frozen=True, slots=True)
class TransferSpec:
    """Settings of a transfer: model, data and schedule.

    Attributes:
        variant: `1k`, `4k`, `8k` or `10k`.
        sizes_px: sides of the square training images; each step takes one of them at random.
        schedule: length, batch size and optimizer settings.
        noise: `stored`: each image's own noise, from its seed, as published; `fresh`: new noise at each step.
        shift: of the sigma schedule.
        caption_dropout: share of samples without a caption.
        window_tokens: side of the square that the head draws and the loss sees; 0 for the whole image.
        halo_tokens: tokens around the window that the head also reads. 3 is exact; fewer cost less, but the head sees
            false image borders.
        head_divisor: divisor of the published head's channels; 1 for the published head.
        checkpointing: recompute activations in the backward pass.
        holdout: images that are not trained on: a share below 1, or a number of them; 0 for none.
        positions: position policy of grids beyond `base_grid`.
        base_grid: token rows and columns from which positions are stretched; None with `native`, which does not.
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
    holdout: float = 0.0
    positions: str = "native"
    base_grid: Grid | None = None

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            UsageError: names the one that is wrong.
        """
        if self.variant not in VARIANTS.values():
            raise UsageError(f"the variant is {self.variant!r}, expected one of {', '.join(VARIANTS.values())}")
        self._check_positions()
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
            raise UsageError("the 10k head draws only whole images", hint="leave --window-tokens out")
        if not 0 <= self.window_tokens * patch_px <= min(self.sizes_px):
            raise UsageError(
                f"a window of {self.window_tokens} tokens is larger than an image of {min(self.sizes_px)} px"
            )
        if not 0 <= self.halo_tokens <= HALO_ROWS:
            raise UsageError(f"a halo of {self.halo_tokens} tokens, expected 0 to {HALO_ROWS}, which is exact")
        if not 0 <= self.caption_dropout < 1:
            raise UsageError(f"caption dropout is {self.caption_dropout}, expected 0 up to 1")
        if not 0 <= self.holdout < math.inf or (self.holdout > 1 and self.holdout != int(self.holdout)):
            raise UsageError(f"holdout is {self.holdout}, expected a share below 1, or a number of images")
        if not 0 < self.shift < math.inf or self.head_divisor < 1:
            raise UsageError(
                f"shift is {self.shift} and head divisor {self.head_divisor}, expected above 0, and 1 or more"
            )

    def _check_positions(self) -> None:
        if self.positions not in POSITIONS:
            raise UsageError(f"positions are {self.positions!r}, expected one of {', '.join(POSITIONS)}")
        if self.positions != "native" and self.base_grid is None:
            raise UsageError(
                f"positions `{self.positions}` are stretched from a trained grid, and none is stated",
                hint="give --base-grid ROWSxCOLUMNS, or --init with adapters that state theirs",
            )

    @property
    def trained_grid(self) -> Grid:
        """The grid that the adapters know afterwards: the one stretched from, or with `native` the largest one."""
        side = max(self.sizes_px) // self.patch_px
        return (side, side) if self.base_grid is None or self.positions == "native" else self.base_grid

    @property
    def patch_px(self) -> int:
        """Side of a patch."""
        return next(patch_px for patch_px, name in VARIANTS.items() if name == self.variant)


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """Memory and precision options of a transfer.

    Attributes:
        autocast: `bf16`: matrix products in BF16; `none`: all in float32.
        trunk_storage: storage dtype of the frozen trunk's matrices: `float32`, `bfloat16` or `float8`.
        optimizer_device: `cpu` keeps float32 masters, moments and EMA in host memory. With BF16 autocast and unsharded
            weights, the device then holds matrices in BF16, as autocast would convert them.
        is_compiled: the pixel head runs with torch.compile, which rounds slightly differently.
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
        """Options that change a run's values by more than rounding; None for a default."""
        return {
            "autocast": None if self.autocast == "none" else self.autocast,
            "trunk_storage": None if self.trunk_storage == "float32" else self.trunk_storage,
        }


PLAIN = TrainingOptions()


def require_split(schedule: Schedule, ranks: ProcessGroup) -> None:
    """Check that a batch splits evenly over micro batches and processes.

    Raises:
        UsageError: it does not; the hint names a batch that would.
    """
    parts = schedule.micro_batches * ranks.size
    if schedule.batch % parts:
        raise UsageError(
            f"{schedule.batch} samples do not split into {schedule.micro_batches} micro batches "
            f"of each of {ranks.size} processes",
            hint=f"make the batch a multiple of {parts}",
        )


def require_compiler(options: TrainingOptions, ranks: ProcessGroup) -> None:
    """Check that the compiler that `torch.compile` calls is installed.

    Raises:
        HostError: it is missing; names it.
    """
    if not options.is_compiled:
        return
    hint = "install it, or leave --compile out"
    # The only compiler that torch tries.
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if ranks.device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise HostError("--compile needs Triton on a GPU, and it is not installed", hint=hint)
    if shutil.which(compiler) is None:
        raise HostError(f"--compile needs a C++ compiler, and `{compiler}` is not on PATH", hint=f"{hint}, or set CXX")


def transfer_dimensions(source: Source, spec: TransferSpec) -> Dimensions:
    """The pixel model's dimensions: the source's transformer, the variant's patches and head."""
    return pixel_dimensions(source.transformer, spec)


def pixel_dimensions(transformer: Checkpoint, spec: TransferSpec) -> Dimensions:
    """As `transfer_dimensions`, only from the transformer's headers."""
    pixels = published_dimensions(spec.variant)
    divisor = spec.head_divisor
    levels = tuple(
        UNetLevel(level.name, *(_divided(channels, divisor) for channels in (level.encoder, level.up, level.decoder)))
        for level in pixels.levels
    )
    pixels = replace(pixels, levels=levels, bottleneck=_divided(pixels.bottleneck, divisor))
    return source_dimensions(transformer.shapes, pixels)


def _divided(channels: int, divisor: int) -> int:
    # The outermost encoders of the 8k and 10k heads have 3 channels, as many as the image.
    return channels if channels == 3 else max(channels // divisor, min(channels, 16))


def trained_model(d: Dimensions, spec: TransferSpec) -> ModelSpec:
    """The model as it will know its trained grid."""
    model = model_spec(d)
    return replace(model, rotary=replace(model.rotary, base_grid=spec.trained_grid))
