"""The facts of a model that the runtime needs: sizes, positions, padding, pixel head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from l2p_runtime.errors import ArtifactError

Positions = Literal[
    "auto",
    "native",
    "linear",
    "ntk",
    "yarn",
    "vision-yarn",
    "native+temperature",
    "linear+temperature",
    "ntk+temperature",
    "yarn+temperature",
    "vision-yarn+temperature",
]
Grid = tuple[int, int]
"""Token rows and columns."""


@dataclass(frozen=True, slots=True)
class RotarySpec:
    """Rotary embedding over the axes (time, row, column).

    Attributes:
        theta: base of the frequencies.
        axis_channels: channels of a head per axis; their sum is the head width.
        axis_lengths: number of positions per axis that the model supports; larger grids are refused.
        base_grid: token rows and columns of the trained grid, from which position policies stretch.
    """

    theta: float
    axis_channels: tuple[int, int, int]
    axis_lengths: tuple[int, int, int]
    base_grid: Grid

    def __post_init__(self) -> None:
        if any(channels <= 0 or channels % 2 for channels in self.axis_channels):
            raise ArtifactError(f"rotary axes {list(self.axis_channels)} must be positive and even")
        _require_sizes(**{f"axis_lengths[{axis}]": size for axis, size in enumerate(self.axis_lengths)})
        check_base_grid(self.base_grid, self.axis_lengths)
        if self.theta <= 1:
            raise ArtifactError(f"theta is {self.theta}, expected more than 1")

    @property
    def pairs(self) -> int:
        """R, the width of the cosine and sine tables."""
        return sum(self.axis_channels) // 2


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """How the pixel head may be cut into stripes.

    Attributes:
        row_multiple: token rows (and columns) come in multiples of this; 2 for the 160 px head, else 1.
        halo_rows: token rows of context that make a stripe exact; None when the head must run whole.
        peak_values_per_px: activation values alive at once, per pixel of the stripe.
        fused_peak_values_per_px: the same of the fused graph; None in bundles without one of the head.
    """

    row_multiple: int
    halo_rows: int | None
    peak_values_per_px: float
    fused_peak_values_per_px: float | None = None

    def __post_init__(self) -> None:
        _require_sizes(row_multiple=self.row_multiple)
        peaks = [peak for peak in (self.peak_values_per_px, self.fused_peak_values_per_px) if peak is not None]
        if (self.halo_rows is not None and self.halo_rows < 0) or min(peaks) <= 0:
            raise ArtifactError(f"halo_rows {self.halo_rows} and peak_values_per_px {peaks}: expected no less than 0")


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Family, variant and dimensions of one model (docs/design.md, "Words" and "Networks").

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

    def __post_init__(self) -> None:
        _require_sizes(
            patch_px=self.patch_px,
            width=self.width,
            heads=self.heads,
            layers=self.layers,
            ffn_width=self.ffn_width,
            caption_width=self.caption_width,
            time_width=self.time_width,
            sequence_multiple=self.sequence_multiple,
            caption_tokens_max=self.caption_tokens_max,
        )
        if self.width != self.heads * 2 * self.rotary.pairs:
            raise ArtifactError(
                f"width is {self.width}, expected {self.heads} heads of {2 * self.rotary.pairs} rotary channels"
            )
        first, stop = self.trunk_layers
        if not 0 <= first < stop <= self.layers:
            raise ArtifactError(f"trunk_layers is {first} to {stop}, expected layers of 0 to {self.layers}")

    @property
    def size_multiple_px(self) -> int:
        """Height and width are multiples of this."""
        return self.patch_px * self.head.row_multiple

    def padded(self, tokens: int) -> int:
        """`tokens` rounded up to the sequence multiple."""
        return -(-tokens // self.sequence_multiple) * self.sequence_multiple

    def symbols(self, batch: int, grid: tuple[int, int], caption_tokens: int, head_rows: int) -> dict[str, int]:
        """The value of every symbol of the networks' shapes, for one denoising call.

        Args:
            batch: images.
            grid: token rows and columns.
            caption_tokens: padded.
            head_rows: token rows that the pixel head reads at once, halo included.

        Returns:
            B batch, h and w rows and columns in units of `head.row_multiple`, t caption tokens in units of
            `sequence_multiple`, s the whole sequence, r head rows in units of `head.row_multiple`.
        """
        unit = self.head.row_multiple
        rows, columns = grid
        return {
            "B": batch,
            "h": rows // unit,
            "w": columns // unit,
            "t": caption_tokens // self.sequence_multiple,
            "s": self.padded(rows * columns) + caption_tokens,
            "r": head_rows // unit,
        }


def check_base_grid(grid: Grid, axis_lengths: tuple[int, int, int]) -> None:
    """Refuse a trained grid that the model's positions do not reach.

    Raises:
        ArtifactError: a side below 1, or longer than its axis.
    """
    for name, tokens, longest in zip(("rows", "columns"), grid, axis_lengths[1:], strict=True):
        if not 1 <= tokens <= longest:
            raise ArtifactError(f"the trained grid has {tokens} token {name}, expected 1 to {longest}")


def _require_sizes(**sizes: int) -> None:
    """Require positive sizes below 2^31, so that multiplying a few of them cannot overflow here."""
    for name, size in sizes.items():
        if not 1 <= size < 2**31:
            raise ArtifactError(f"{name} is {size}, expected 1 or more")
