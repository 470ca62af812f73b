"""FP8 (E4M3) quantization: rounding, and the scales that bring weights and activations into its range.

A value is stored as the E4M3 number nearest to value / scale. Weights have one scale per output channel. Activations
have one scale per tensor, chosen by the error that it makes on the measured histogram.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from l2p_calib.statistics.ranges import Ranges
from l2p_runtime.errors import ArtifactError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FP8_MAX = 448.0
"""The largest E4M3 number; larger values saturate there (ONNX `QuantizeLinear`, `saturate` = 1)."""

AMAX = "amax"
PERCENTILES = (99.99, 99.9)
MSE = "mse"

NEAR_MINIMUM = 1.02
"""A scale that saturates less is preferred to the one of minimum error if its own error is within 2 % of that: the
histogram covers only some calls, and values beyond it saturate."""

_STEPS_AN_OCTAVE = 8
_OCTAVES = 6
_POINTS_A_BIN = 8
_FLOAT16_TINY = 2.0**-24


@dataclass(frozen=True, slots=True)
class ScaleChoice:
    """One way to choose the scale of an activation.

    Attributes:
        method: `amax`, `percentile 99.99`, `percentile 99.9` or `mse`.
        scale: what values are divided by.
        error: relative L2 error of the rounded values, by the histogram.
    """

    method: str
    scale: float
    error: float


def quantize(values: NDArray[np.float32], scale: NDArray[np.float32] | float) -> NDArray[Any]:
    """Quantize values to E4M3: divide in float32, saturate, round to even.

    Args:
        values: of any shape; NaN stays NaN.
        scale: one number, or an array that broadcasts.

    Returns:
        Values of the broadcast shape, of ml_dtypes' `float8_e4m3fn`.
    """
    import ml_dtypes
    import numpy as np

    with np.errstate(over="ignore"):
        divided = np.asarray(values, np.float32) / np.asarray(scale, np.float32)
    return np.clip(divided, -FP8_MAX, FP8_MAX).astype(ml_dtypes.float8_e4m3fn)


def fake_quantize(values: NDArray[np.float32], scale: NDArray[np.float32] | float) -> NDArray[np.float32]:
    """The float32 values that an FP8 ONNX graph computes with: quantized, then dequantized."""
    import numpy as np

    decoded: NDArray[np.float32] = quantize(values, scale).astype(np.float32) * np.asarray(scale, np.float32)
    return decoded


def float16_scale(scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scales rounded up to float16, and never to 0: ONNX graphs hold scales in float16.

    Values are quantized and dequantized with the same number, so rounding the scale adds no error.

    Returns:
        float32 of the same shape; every value is exact in float16.

    Raises:
        ArtifactError: a scale is negative, NaN, or more than float16 holds.
    """
    import numpy as np

    wide = np.asarray(scales, np.float32)
    if not (wide >= 0).all() or not (wide <= np.finfo(np.float16).max).all():
        raise ArtifactError(f"an FP8 scale is {float(wide.min()):g} to {float(wide.max()):g}, expected 0 to 65504")
    narrow = wide.astype(np.float16)
    with np.errstate(over="ignore"):
        above = np.nextafter(narrow, np.float16(np.inf))
    narrow = np.where(narrow.astype(np.float32) < wide, above, narrow)
    return np.asarray(np.maximum(narrow.astype(np.float32), np.float32(_FLOAT16_TINY)))


def channel_scales(peaks: NDArray[np.float32]) -> NDArray[np.float32]:
    """The scale per output channel, which maps its largest magnitude to 448; 1 for a channel of zeros.

    Args:
        peaks: [out], the largest magnitude of each row of a weight. Where it is NaN or Inf the scale is 1: whoever
            writes the weight refuses it by name.

    Returns:
        [out] float32; every value is exact in float16.

    Raises:
        ArtifactError: weights are so large that float16 does not hold their scale.
    """
    import numpy as np

    usable = np.isfinite(peaks) & (peaks > 0)
    return float16_scale(np.where(usable, peaks, FP8_MAX).astype(np.float32) / np.float32(FP8_MAX))


def scale_choices(ranges: Ranges) -> tuple[ScaleChoice, ...]:
    """Every way to choose the scale of an activation, with its error, in the order of how little they saturate.

    Args:
        ranges: what was measured at the point that the layer reads.

    Raises:
        ArtifactError: values were NaN or Inf, or all were 0, so that there is no scale.
    """
    if ranges.non_finite:
        raise ArtifactError(f"{ranges.non_finite} values were NaN or Inf; FP8 has no scale for these")
    if not ranges.peak:
        raise ArtifactError("all values were 0, which gives an FP8 scale of 0")
    histogram = _Histogram(ranges)
    methods = {AMAX: ranges.peak} | {f"percentile {percent:g}": ranges.percentile(percent) for percent in PERCENTILES}
    found = [ScaleChoice(name, top / FP8_MAX, histogram.error(top / FP8_MAX)) for name, top in methods.items() if top]
    searched = ((histogram.error(scale), scale) for scale in _searched(ranges.peak / FP8_MAX))
    error, scale = min(searched, key=lambda item: (item[0], -item[1]))
    return (*found, ScaleChoice(MSE, scale, error))


def best_choice(choices: tuple[ScaleChoice, ...]) -> ScaleChoice:
    """The first choice whose error is within 2 % of the minimum."""
    minimum = min(choice.error for choice in choices)
    return next(choice for choice in choices if choice.error <= NEAR_MINIMUM * minimum)


class _Histogram:
    """Counted magnitudes, assumed to be spread evenly within each bin."""

    def __init__(self, ranges: Ranges) -> None:
        import numpy as np

        counts = np.asarray(ranges.bins, np.float64)
        # One value is known: the largest.
        counts[-1] -= 1
        edges = np.asarray([*ranges.edges(), ranges.peak], np.float64)
        # The last bin ends where the largest magnitude is.
        low, high = edges[:-2], np.minimum(edges[1:-1], edges[-1])
        parts = (np.arange(_POINTS_A_BIN) + 0.5) / _POINTS_A_BIN
        used = counts > 0
        spread = (low[used, None] + (high - low)[used, None] * parts).reshape(-1)
        self._values = np.append(spread, ranges.peak).astype(np.float32)
        self._shares = np.append(np.repeat(counts[used] / _POINTS_A_BIN, _POINTS_A_BIN), 1.0)
        self._power = self._sum(np.square(self._values, dtype=np.float64))

    def error(self, scale: float) -> float:
        """Relative L2 error of the values rounded with a scale."""
        import numpy as np

        difference = fake_quantize(self._values, scale).astype(np.float64) - self._values
        return float(np.sqrt(self._sum(np.square(difference)) / self._power)) if self._power else 0.0

    def _sum(self, values: NDArray[np.float64]) -> float:
        return float((self._shares * values).sum())


def _searched(largest: float) -> Iterator[float]:
    """Scales from the largest downwards, an eighth of an octave apart."""
    for step in range(_OCTAVES * _STEPS_AN_OCTAVE + 1):
        scale = largest * 2.0 ** (-step / _STEPS_AN_OCTAVE)
        if scale > 0:
            yield scale
