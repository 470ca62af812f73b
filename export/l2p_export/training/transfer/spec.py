"""Settings of a transfer, checked: what is trained, on what, and with which memory and precision."""

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
from l2p_export.families.z_image_l2p.specs import HALO_ROWS
from l2p_export.training.loop.distributed import ProcessGroup
from l2p_export.training.loop.loop import Schedule
from l2p_export.training.source.folder import Source
from l2p_export.training.transfer.storage import STORAGES
from l2p_runtime.errors import HostError, UsageError

if TYPE_CHECKING:
    from l2p_export.tensors.checkpoint import Checkpoint


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
class TrainingOptions:
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


PLAIN = TrainingOptions()


def require_split(schedule: Schedule, ranks: ProcessGroup) -> None:
    """Refuse a batch that does not split into equal micro batches of equal processes.

    Raises:
        UsageError: says what would.
    """
    parts = schedule.micro_batches * ranks.size
    if schedule.batch % parts:
        raise UsageError(
            f"{schedule.batch} samples do not split into {schedule.micro_batches} micro batches "
            f"of each of {ranks.size} processes",
            hint=f"make the batch a multiple of {parts}",
        )


def require_compiler(options: TrainingOptions, ranks: ProcessGroup) -> None:
    """Refuse compilation where the compiler that `torch.compile` calls is missing.

    Raises:
        HostError: names it.
    """
    if not options.is_compiled:
        return
    hint = "install it, or leave --compile out"
    # What torch calls; it looks for no other.
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if ranks.device.type == "cuda" and importlib.util.find_spec("triton") is None:
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
    levels = tuple(
        UNetLevel(level.name, *(_divided(channels, divisor) for channels in (level.encoder, level.up, level.decoder)))
        for level in pixels.levels
    )
    pixels = replace(pixels, levels=levels, bottleneck=_divided(pixels.bottleneck, divisor))
    return source_dimensions(transformer.shapes, pixels)


def _divided(channels: int, divisor: int) -> int:
    # The outermost encoders of the 8k and 10k heads have 3 channels, as many as the image.
    return channels if channels == 3 else max(channels // divisor, min(channels, 16))
