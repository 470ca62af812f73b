"""What the runtime must know about a model, and nothing more: sizes, positions, padding, pixel head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from l2p_runtime.errors import ArtifactError

Positions = Literal["native", "ntk", "yarn"]


@dataclass(frozen=True, slots=True)
class RotarySpec:
    """Rotary embedding over the axes (time, row, column).

    Attributes:
        theta: base of the frequencies.
        axis_channels: channels of a head per axis; their sum is the head width.
        axis_lengths: positions the model was made for, per axis; larger grids are refused.
        base_grid: tokens per side of the training grid, from which NTK and YaRN stretch.
    """

    theta: float
    axis_channels: tuple[int, int, int]
    axis_lengths: tuple[int, int, int]
    base_grid: int

    def __post_init__(self) -> None:
        if any(channels <= 0 or channels % 2 for channels in self.axis_channels):
            raise ArtifactError(f"rotary axes {list(self.axis_channels)} must be positive and even")

    @property
    def pairs(self) -> int:
        """R, the width of the cosine and sine tables."""
        return sum(self.axis_channels) // 2


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """How the pixel head may be cut.

    Attributes:
        row_multiple: token rows (and columns) come in multiples of this; 2 for the 160 px head, else 1.
        halo_rows: token rows of context that make a stripe exact; None when the head must run whole.
        peak_values_per_px: activation values alive at once, per pixel of the stripe.
    """

    row_multiple: int
    halo_rows: int | None
    peak_values_per_px: float


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Family, variant and dimensions of one model (design sections 2 and 5).

    Attributes:
        trunk_layers: first layer of the trunk and the one after its last.
        sequence_multiple: image and caption tokens are each padded to a multiple of this.
        caption_tokens_max: longest caption, in tokens.
    """

    family: str
    variant: str
    patch_px: int
    width: int
    heads: int
    layers: int
    trunk_layers: tuple[int, int]
    ffn_width: int
    caption_width: int
    time_width: int
    sequence_multiple: int
    caption_tokens_max: int
    rotary: RotarySpec
    head: HeadSpec

    @property
    def size_multiple_px(self) -> int:
        """Height and width are multiples of this."""
        return self.patch_px * self.head.row_multiple

    def padded(self, tokens: int) -> int:
        """`tokens` rounded up to the sequence multiple."""
        return -(-tokens // self.sequence_multiple) * self.sequence_multiple
