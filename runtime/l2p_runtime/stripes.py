"""Cuts the pixel head into horizontal stripes that together equal the whole, exactly in arithmetic.

A stripe covers whole token rows and reads a halo of rows on each side; the halo's own results are thrown away. Three
rows are enough where the patch is 2^levels pixels: 3 (2^levels - 1) pixels of reach are less than 3 patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from l2p_runtime.errors import HostError

if TYPE_CHECKING:
    from l2p_runtime.contract import HeadSpec


@dataclass(frozen=True, slots=True)
class Stripe:
    """Token rows `first` to `stop` are kept; `read_first` to `read_stop` are computed."""

    first: int
    stop: int
    read_first: int
    read_stop: int


def plan_stripes(head: HeadSpec, rows: int, bytes_per_row: int, budget_bytes: int) -> tuple[Stripe, ...]:
    """The fewest equal stripes whose computation fits a budget; the last may be shorter.

    Args:
        head: halo of the model's head.
        rows: token rows of the image.
        bytes_per_row: activation bytes of one token row inside the head.
        budget_bytes: maximum activation bytes of one stripe.

    Raises:
        HostError: not even one row with its halo fits, or the head cannot be cut and does not fit whole.
    """
    fitting = budget_bytes // max(bytes_per_row, 1)
    if rows <= fitting:
        return (Stripe(0, rows, 0, rows),)
    if head.halo_rows is None:
        raise HostError(
            f"the pixel head needs {rows * bytes_per_row:,} bytes and this variant runs it whole; "
            f"{max(budget_bytes, 0):,} bytes are left for it",
            hint="raise the memory budget, or draw a smaller image",
        )
    kept = fitting - 2 * head.halo_rows
    if kept < 1:
        # The minimum is one row with both halos, or the whole of a small image.
        min_bytes = min(1 + 2 * head.halo_rows, rows) * bytes_per_row
        raise HostError(
            f"one stripe of the pixel head needs {min_bytes:,} bytes, {max(budget_bytes, 0):,} bytes are left for it",
            hint="raise the memory budget, or draw a narrower image",
        )
    count = -(-rows // kept)
    kept = -(-rows // count)
    return tuple(
        Stripe(first, min(first + kept, rows), max(first - head.halo_rows, 0), min(first + kept + head.halo_rows, rows))
        for first in range(0, rows, kept)
    )
