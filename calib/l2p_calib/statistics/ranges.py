"""Activation statistics: ranges and histograms of a network's points, over any number of denoising calls.

A point's magnitudes are counted in eighths of an octave, by the first bits of their float32. So statistics take
constant memory, and those of two runs merge exactly, in any order.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2p_runtime.contract.codec import from_json, to_json
from l2p_runtime.errors import ArtifactError, L2PError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SCHEMA = 1
BINS_PER_OCTAVE = 8
BINS = 256 * BINS_PER_OCTAVE
"""Every sign-less float32, by its exponent and the first three bits of its fraction."""

CALLS_MIN = 4
"""Fewer calls than this say little of what a network can meet."""

_FRACTION_BITS = 20
_FIRST_NON_FINITE = 255 * BINS_PER_OCTAVE
_CHUNK = 1 << 20
_FILE_BYTES_MAX = 256 << 20
_COUNT_MAX = 1 << 62
_POINTS_MAX = 1 << 16
_FLOAT32_MAX = 3.4028234663852886e38


@dataclass(frozen=True, slots=True)
class Ranges:
    """The range and histogram of one point.

    Attributes:
        calls: denoising calls that it was seen in.
        count: finite values.
        non_finite: values that were NaN or Inf.
        low: the minimum of the finite values; 0 without any.
        high: their maximum; 0 without any.
        first_bin: first bin of the histogram of magnitudes.
        bins: number of magnitudes in each bin from there on.
    """

    calls: int
    count: int
    non_finite: int
    low: float
    high: float
    first_bin: int
    bins: tuple[int, ...]

    def __post_init__(self) -> None:
        counts = (self.calls, self.count, self.non_finite, *self.bins)
        if min(counts) < 0 or max(counts) > _COUNT_MAX:
            raise ArtifactError("a count is negative or absurd")
        if not (self.first_bin >= 0 and self.first_bin + len(self.bins) <= _FIRST_NON_FINITE):
            raise ArtifactError(f"bins {self.first_bin} to {self.first_bin + len(self.bins)} are out of range")
        if self.bins and not (self.bins[0] and self.bins[-1]):
            raise ArtifactError("the histogram begins or ends with an empty bin")
        if sum(self.bins) != self.count:
            raise ArtifactError(f"the histogram holds {sum(self.bins)} values, count is {self.count}")
        if self.low > self.high or self.peak > _FLOAT32_MAX:
            raise ArtifactError(f"the range is {self.low} to {self.high}")
        if self.count and not (self.bins and _bin(self.peak) == self.first_bin + len(self.bins) - 1):
            raise ArtifactError(f"the largest magnitude is {self.peak}, the histogram ends elsewhere")

    @property
    def peak(self) -> float:
        """The largest finite magnitude."""
        return max(abs(self.low), abs(self.high))

    @property
    def is_constant(self) -> bool:
        """Whether all values are equal."""
        return self.count > 1 and self.low == self.high

    def percentile(self, percent: float) -> float:
        """The magnitude that `percent` of the values do not exceed: the upper edge of a bin, or the peak.

        Args:
            percent: 0 to 100.
        """
        wanted, seen = math.ceil(self.count * percent / 100), 0
        for index, count in enumerate(self.bins, self.first_bin):
            seen += count
            if seen >= wanted and count:
                return min(_edge(index + 1), self.peak)
        return self.peak

    def edges(self) -> tuple[float, ...]:
        """Lower edge of each bin of the histogram, and the upper edge of the last one."""
        return tuple(_edge(index) for index in range(self.first_bin, self.first_bin + len(self.bins) + 1))

    def octaves(self) -> dict[int, int]:
        """Log2 histogram: exponent e to the number of magnitudes from 2^e to below 2^(e+1); zeros stand under -127."""
        found: dict[int, int] = {}
        for index, count in enumerate(self.bins, self.first_bin):
            if count:
                exponent = index // BINS_PER_OCTAVE - 127
                found[exponent] = found.get(exponent, 0) + count
        return found


@dataclass(frozen=True, slots=True)
class PointRanges:
    """The ranges of one point, by its name, as `layers.3.feed_forward.w2:in`."""

    point: str
    ranges: Ranges


@dataclass(frozen=True, slots=True)
class NetworkStatistics:
    """What was measured in one network.

    Attributes:
        network: its name.
        sha256: digest of its weights; of a trunk, the digest that adapters share it by.
        points: sorted by name.
    """

    network: str
    sha256: str
    points: tuple[PointRanges, ...]

    def __post_init__(self) -> None:
        names = [item.point for item in self.points]
        if names != sorted(set(names)) or len(names) > _POINTS_MAX:
            raise ArtifactError(f"the points of `{self.network}` are not sorted, or one stands twice")

    @property
    def calls(self) -> int:
        """Denoising calls that every point was seen in."""
        return min((item.ranges.calls for item in self.points), default=0)

    def of(self, point: str) -> Ranges | None:
        """The ranges of a point."""
        return next((item.ranges for item in self.points if item.point == point), None)


@dataclass(frozen=True, slots=True)
class Statistics:
    """Statistics of several networks, as a file holds them.

    Attributes:
        source: what was run, for people: prompts, sizes, number of samples.
        networks: one entry for each network and digest, sorted; adapters of one trunk may be in one file.
    """

    schema: int
    source: str
    networks: tuple[NetworkStatistics, ...]

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise ArtifactError(f"schema version {self.schema}, this version reads {SCHEMA}")
        keys = [(item.network, item.sha256) for item in self.networks]
        if keys != sorted(set(keys)):
            raise ArtifactError("networks are not sorted, or one stands twice")

    def of(self, network: str, sha256: str) -> NetworkStatistics | None:
        """What was measured in a network of these weights."""
        return next((item for item in self.networks if (item.network, item.sha256) == (network, sha256)), None)


class RangeCounter:
    """Counts the values of one point; takes constant memory."""

    def __init__(self) -> None:
        import numpy as np

        self._bins = np.zeros(BINS, np.int64)
        self._low, self._high, self._calls = math.inf, -math.inf, 0

    def add(self, values: NDArray[np.float32]) -> None:
        """Count the values of one call."""
        import numpy as np

        self._calls += 1
        flat = np.ascontiguousarray(values, np.float32).reshape(-1)
        for start in range(0, flat.size, _CHUNK):
            chunk = flat[start : start + _CHUNK]
            found = np.bincount((chunk.view(np.uint32) >> _FRACTION_BITS) & (BINS - 1), minlength=BINS)
            self._bins += found
            if found[_FIRST_NON_FINITE:].any():
                chunk = chunk[np.isfinite(chunk)]
            if chunk.size:
                self._low, self._high = min(self._low, float(chunk.min())), max(self._high, float(chunk.max()))

    def ranges(self) -> Ranges:
        """What was counted so far."""
        finite = self._bins[:_FIRST_NON_FINITE]
        used = finite.nonzero()[0]
        first, stop = (int(used[0]), int(used[-1]) + 1) if used.size else (0, 0)
        return Ranges(
            calls=self._calls,
            count=int(finite.sum()),
            non_finite=int(self._bins[_FIRST_NON_FINITE:].sum()),
            low=self._low if used.size else 0.0,
            high=self._high if used.size else 0.0,
            first_bin=first,
            bins=tuple(int(count) for count in finite[first:stop]),
        )


def network_statistics(network: str, sha256: str, counters: Mapping[str, RangeCounter]) -> NetworkStatistics:
    """What counters of a network's points have counted."""
    points = tuple(PointRanges(name, counters[name].ranges()) for name in sorted(counters))
    return NetworkStatistics(network, sha256, points)


def merge_ranges(first: Ranges, second: Ranges) -> Ranges:
    """The ranges of both together, exact in any order."""
    with_values = [ranges for ranges in (first, second) if ranges.count]
    start = min((ranges.first_bin for ranges in with_values), default=0)
    stop = max((ranges.first_bin + len(ranges.bins) for ranges in with_values), default=0)
    bins = [0] * (stop - start)
    for ranges in with_values:
        for index, count in enumerate(ranges.bins, ranges.first_bin - start):
            bins[index] += count
    return Ranges(
        calls=first.calls + second.calls,
        count=first.count + second.count,
        non_finite=first.non_finite + second.non_finite,
        low=min((ranges.low for ranges in with_values), default=0.0),
        high=max((ranges.high for ranges in with_values), default=0.0),
        first_bin=start,
        bins=tuple(bins),
    )


def merge_networks(parts: Sequence[NetworkStatistics]) -> NetworkStatistics:
    """Statistics of one network from several runs, as of a trunk under several adapters.

    Raises:
        ArtifactError: they are of different networks or weights.
    """
    first = parts[0]
    if any((part.network, part.sha256) != (first.network, first.sha256) for part in parts):
        found = ", ".join(dict.fromkeys(f"`{part.network}` {part.sha256[:16]}" for part in parts))
        raise ArtifactError(f"statistics of different networks cannot be merged: {found}")
    merged: dict[str, Ranges] = {}
    for part in parts:
        for item in part.points:
            known = merged.get(item.point)
            merged[item.point] = item.ranges if known is None else merge_ranges(known, item.ranges)
    return replace(first, points=tuple(PointRanges(name, merged[name]) for name in sorted(merged)))


def merge_statistics(files: Iterable[Statistics]) -> Statistics:
    """Statistics of several files: networks of equal weights are merged, the others are kept side by side."""
    groups: dict[tuple[str, str], list[NetworkStatistics]] = {}
    sources: dict[str, None] = {}
    for file in files:
        sources |= dict.fromkeys(file.source.split("; "))
        for item in file.networks:
            groups.setdefault((item.network, item.sha256), []).append(item)
    networks = tuple(merge_networks(groups[key]) for key in sorted(groups))
    return Statistics(SCHEMA, "; ".join(sorted(sources)), networks)


def require_usable(statistics: NetworkStatistics, points: Iterable[str], optional: Iterable[str] = ()) -> None:
    """Refuse statistics that say nothing of a network.

    Args:
        statistics: as read from a file.
        points: that must be in it.
        optional: points that may be in it besides.

    Raises:
        ArtifactError: points are missing or unknown, too few calls were seen, or values were NaN, Inf or all the same.
    """
    network, wanted = statistics.network, set(points)
    found = {item.point for item in statistics.points}
    wrong = sorted((wanted - found) | (found - wanted - set(optional)))
    if wrong:
        raise ArtifactError(
            f"statistics of `{network}` do not match its layers: {', '.join(wrong[:4])}"
            + (f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""),
            hint=_AGAIN,
        )
    if statistics.calls < CALLS_MIN:
        raise ArtifactError(
            f"statistics of `{network}` come from {statistics.calls} calls, at least {CALLS_MIN} are wanted",
            hint="calibrate with more --samples",
        )
    require_finite(statistics)
    constant = [item.point for item in statistics.points if item.ranges.is_constant]
    if constant:
        raise ArtifactError(
            f"values of `{constant[0]}` were all the same, so statistics of `{network}` say nothing of it",
            hint="give prompts and sizes that differ, or check what the layer was trained to",
        )


def require_finite(statistics: NetworkStatistics) -> None:
    """Refuse statistics of a network that makes NaN or Inf in float32 already.

    Raises:
        ArtifactError: names the first such point.
    """
    bad = [item for item in statistics.points if item.ranges.non_finite]
    if bad:
        raise ArtifactError(
            f"`{bad[0].point}` held NaN or Inf in float32 ({bad[0].ranges.non_finite} values)",
            hint="the weights are damaged, or the training that wrote them diverged; use an earlier checkpoint",
        )


def read_statistics(path: Path) -> Statistics:
    """Read a file of statistics; everything in it is checked.

    Raises:
        UsageError: no such file.
        ArtifactError: not JSON, another schema, or content that does not hold together.
    """
    if not path.is_file():
        raise UsageError(f"there is no file `{path}`", hint="l2p-export calibrate BUNDLE --out FILE writes one")
    if path.stat().st_size > _FILE_BYTES_MAX:
        raise ArtifactError(f"`{path}` has {path.stat().st_size:,} bytes, expected at most {_FILE_BYTES_MAX:,}")
    try:
        return from_json(Statistics, json.loads(path.read_bytes()))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"`{path}` is not JSON: {error}", hint=_AGAIN) from error
    except L2PError as error:
        raise ArtifactError(f"`{path}`: {error}", hint=error.hint or _AGAIN) from error


def statistics_to_bytes(statistics: Statistics) -> bytes:
    """The file as UTF-8 JSON: equal statistics give equal bytes."""
    data: Any = to_json(statistics)
    return (json.dumps(data, separators=(",", ":"), allow_nan=False, ensure_ascii=False) + "\n").encode()


def _bin(magnitude: float) -> int:
    import numpy as np

    return int(np.float32(magnitude).view(np.uint32)) >> _FRACTION_BITS


def _edge(index: int) -> float:
    import numpy as np

    return float(np.uint32(index << _FRACTION_BITS).view(np.float32))


_AGAIN = "measure it again with `l2p-export calibrate`"
