"""Profiles: the shapes an engine is built for, and sampling defaults (docs/design.md, "Profiles")."""

from __future__ import annotations

from dataclasses import dataclass, field

from l2p_runtime.contract.model import Grid, ModelSpec, Positions, check_base_grid
from l2p_runtime.errors import ArtifactError, UsageError


@dataclass(frozen=True, slots=True)
class Range:
    """Minimum, preferred and maximum value of a dynamic size."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise UsageError(f"min {self.min}, opt {self.opt}, max {self.max}: expected 1 <= min <= opt <= max")


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling defaults: denoising steps, guidance scale (1 is none), schedule shift."""

    steps: int = 50
    guidance: float = 4.0
    shift: float = 3.0

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= 1000:
            raise UsageError(f"steps is {self.steps}, expected 1 to 1000")
        if not 0 <= self.guidance <= 100:
            raise UsageError(f"guidance is {self.guidance}, expected 0 to 100")
        if not 0 < self.shift <= 100:
            raise UsageError(f"shift is {self.shift}, expected more than 0 and at most 100")


@dataclass(frozen=True, slots=True)
class Profile:
    """Min, opt and max of every dynamic size, the position policy and sampling defaults.

    Attributes:
        base_grid: the trained grid, where the checkpoint does not state it or states it wrongly.
    """

    name: str
    patch_px: int
    height_px: Range
    width_px: Range
    caption_tokens: Range = field(default_factory=lambda: Range(32, 128, 512))
    batch: Range = field(default_factory=lambda: Range(1, 1, 1))
    positions: Positions = "auto"
    sampling: Sampling = field(default_factory=Sampling)
    base_grid: Grid | None = None

    def __post_init__(self) -> None:
        # The name becomes part of the bundle's.
        if not self.name.isprintable() or "/" in self.name or not 1 <= len(self.name) <= 128:
            raise UsageError(f"profile name {self.name[:128]!r} is refused: expected 1 to 128 characters without `/`")
        if self.patch_px < 1:
            raise UsageError(f"patch_px is {self.patch_px}, expected 1 or more")
        for axis, span in (("height_px", self.height_px), ("width_px", self.width_px)):
            # A fully static shape lets TensorRT fold the rotary tables into the engine: 140 MB against 6 MB.
            if span.min == span.max:
                raise UsageError(f"{axis} min equals max ({span.min}), expected min < max")
            wrong = [str(size) for size in (span.min, span.opt, span.max) if size % self.patch_px]
            if wrong:
                raise UsageError(f"{axis} {', '.join(wrong)} not a multiple of {self.patch_px} px")
        if any(size % 32 for size in (self.caption_tokens.min, self.caption_tokens.opt, self.caption_tokens.max)):
            raise UsageError("caption_tokens must be multiples of 32")

    def check_model(self, model: ModelSpec) -> None:
        """Refuse a model that this profile was not written for.

        Raises:
            UsageError: another patch size, or sizes that the model's head cannot take.
        """
        if self.patch_px != model.patch_px:
            raise UsageError(
                f"profile `{self.name}` is for {self.patch_px} px patches, the checkpoint has {model.patch_px} px",
                hint=f"use a profile with patch_px = {model.patch_px}; the built-in one is `{model.variant}`",
            )
        if self.base_grid is not None:
            try:
                check_base_grid(self.base_grid, model.rotary.axis_lengths)
            except ArtifactError as error:
                raise UsageError(f"profile `{self.name}`: {error}") from error
        for axis, span in (("height_px", self.height_px), ("width_px", self.width_px)):
            if any(size % model.size_multiple_px for size in (span.min, span.opt, span.max)):
                raise UsageError(f"profile `{self.name}`: {axis} must be multiples of {model.size_multiple_px} px")
            if span.max // self.patch_px > model.rotary.axis_lengths[1]:
                longest = model.rotary.axis_lengths[1] * self.patch_px
                raise UsageError(f"profile `{self.name}`: {axis} max is {span.max}, the model reaches {longest} px")
