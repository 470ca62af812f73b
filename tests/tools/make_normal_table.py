"""Writes `normal_table.f64`, the piecewise polynomial that turns 32 random bits into a normal value.

Run `python tests/tools/make_normal_table.py` to write the file again; a test compares the committed one with it. The
file is part of the seed contract: any other bit in it is another noise for every seed.

Layout: little-endian float64, [256, 7]. With v = r + 0.5 for a word r < 2^31, row `8 * (e + 1) + s` holds octave
2^e <= v < 2^(e+1), e = -1..30, eighth s of it, and its polynomial in t = -1..1 across that eighth, constant term first.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mpmath  # type: ignore[import-untyped]
import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

OCTAVES = 32
SEGMENTS = 8
DEGREE = 6
TABLE = Path(__file__).resolve().parents[2] / "runtime/l2p_runtime/data/normal_table.f64"


def main() -> int:
    """Write the whole table to where the runtime reads it."""
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_bytes(make_table(range(OCTAVES * SEGMENTS)).astype("<f8").tobytes())
    return 0


def make_table(rows: range) -> NDArray[np.float64]:
    """Interpolate the inverse normal distribution function at Chebyshev nodes, in 50 digits.

    Args:
        rows: which rows of the table to derive.

    Returns:
        Float64 [len(rows), DEGREE + 1], each coefficient rounded once.
    """
    with mpmath.workdps(50):
        count = DEGREE + 1
        nodes = [mpmath.cos(mpmath.pi * (2 * k + 1) / (2 * count)) for k in range(count)]
        powers = mpmath.matrix(count, count)
        for i, node in enumerate(nodes):
            for j in range(count):
                powers[i, j] = node**j
        to_coefficients = powers**-1
        return np.array([_segment(row, nodes, to_coefficients) for row in rows])


def _segment(row: int, nodes: list[Any], to_coefficients: Any) -> list[float]:
    octave, eighth = divmod(row, SEGMENTS)
    low = mpmath.ldexp(SEGMENTS + eighth, octave - 4)
    half = mpmath.ldexp(1, octave - 5)
    values = mpmath.matrix([_inverse_normal((low + half * (node + 1)) / 2**32) for node in nodes])
    coefficients = to_coefficients * values
    # At 53 bits `+c` rounds to nearest, and float() is then exact in every mpmath version.
    with mpmath.workprec(53):
        return [float(+c) for c in coefficients]


def _inverse_normal(p: Any) -> Any:
    return mpmath.sqrt(2) * mpmath.erfinv(2 * p - 1)


if __name__ == "__main__":
    sys.exit(main())
