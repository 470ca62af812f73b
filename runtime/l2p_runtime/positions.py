"""Rotary position tables. Positions are data, so a policy needs no other ONNX graph and no other engine.

A token has a position (time, row, column). Caption token i is at (1+i, 0, 0), its padding included; image tokens are at
(padded caption + 1, row, column); image pads are at (0, 0, 0). The tables are computed in float64 and stored as
float32. They list image tokens, image pads, caption: the order of the sequence (docs/model.md, "Rotary positions", and
docs/design.md, "Positions as data").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

from l2p_runtime.policies import Frequencies, Policy, TimeDependent, axis_frequencies

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from l2p_runtime.contract import ModelSpec

    Tables: TypeAlias = tuple[NDArray[np.float32], NDArray[np.float32]]


def rope_tables(
    model: ModelSpec,
    rows: int,
    columns: int,
    caption_tokens: int,
    policy: str | Policy | TimeDependent = "native",
    time: float = 0.0,
) -> Tables:
    """Cosine and sine tables [S, R] for a grid of image tokens and a padded caption.

    Args:
        model: rotary axes and padding.
        rows: h, token rows of the image.
        columns: w, token columns of the image.
        caption_tokens: T, caption tokens with padding.
        policy: a name of `POSITIONS`, or a function of the caller's own.
        time: t = 1 - sigma, for a policy that depends on it.

    Raises:
        UsageError: unknown policy name, or a function that returns something else than finite frequencies of the
            axis's shape and finite factors.
    """
    axes = axis_frequencies(model.rotary, (rows, columns), policy, time)
    return tables_of(model, rows, columns, caption_tokens, axes)


def tables_of(model: ModelSpec, rows: int, columns: int, caption_tokens: int, axes: Sequence[Frequencies]) -> Tables:
    """As `rope_tables`, from the frequencies and factors of the three axes."""
    import numpy as np

    image_tokens = rows * columns
    padded = model.padded(image_tokens)
    positions = np.zeros((padded + caption_tokens, 3))
    positions[:image_tokens, 0] = caption_tokens + 1
    positions[:image_tokens, 1] = np.repeat(np.arange(rows), columns)
    positions[:image_tokens, 2] = np.tile(np.arange(columns), rows)
    positions[padded:, 0] = np.arange(1, caption_tokens + 1)
    angles = [positions[:, axis, None] * frequencies for axis, (frequencies, _) in enumerate(axes)]
    angle, scale = np.concatenate(angles, axis=1), np.concatenate([factor for _, factor in axes])
    return (np.cos(angle) * scale).astype(np.float32), (np.sin(angle) * scale).astype(np.float32)


def caption_tables(tables: Tables, caption_tokens: int) -> Tables:
    """The last T rows of each table, [T, R], which belong to the caption."""
    cosine, sine = tables
    return cosine[-caption_tokens:], sine[-caption_tokens:]
