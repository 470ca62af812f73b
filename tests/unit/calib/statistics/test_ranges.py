"""Statistics: counted in pieces or at once, merged in any order, written and read with suspicion."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from l2p_calib.statistics.ranges import (
    CALLS_MIN,
    SCHEMA,
    NetworkStatistics,
    PointRanges,
    RangeCounter,
    Ranges,
    Statistics,
    merge_networks,
    merge_ranges,
    merge_statistics,
    network_statistics,
    read_statistics,
    require_finite,
    require_usable,
    statistics_to_bytes,
)
from l2p_runtime.errors import ArtifactError, UsageError

VALUES = hnp.arrays(np.float32, st.integers(0, 40), elements=st.floats(width=32))
"""Any float32: zeros of both signs, subnormals, NaN and Inf included."""


def ranges_of(*calls: np.ndarray) -> Ranges:
    counter = RangeCounter()
    for values in calls:
        counter.add(values)
    return counter.ranges()


@given(st.lists(VALUES, min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_what_is_counted(calls: list[np.ndarray]) -> None:
    found, everything = ranges_of(*calls), np.concatenate(calls)
    finite = everything[np.isfinite(everything)]
    assert found.calls == len(calls)
    assert (found.count, found.non_finite) == (finite.size, everything.size - finite.size)
    assert found.peak == float(np.abs(finite).max(initial=0.0))
    assert (found.low, found.high) == (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    assert sum(found.octaves().values()) == finite.size
    for percent in (0, 50, 99.9, 100):
        # The upper edge of a bin: at least so many percent of the values are no larger, by an eighth of an octave.
        assert (np.abs(finite) <= found.percentile(percent)).sum() >= finite.size * percent / 100
        assert found.percentile(percent) <= found.peak
    magnitudes = np.sort(np.abs(finite[np.abs(finite) > 1e-30]))
    if magnitudes.size == finite.size and magnitudes.size:
        assert found.percentile(50) <= 1.125 * magnitudes[-(-magnitudes.size // 2) - 1]


@given(VALUES, VALUES, VALUES)
@settings(max_examples=60, deadline=None)
def test_merging_is_exact_in_any_order(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> None:
    one, two, three = ranges_of(a), ranges_of(b), ranges_of(c)
    together = ranges_of(a, b, c)
    assert merge_ranges(merge_ranges(one, two), three) == together
    assert merge_ranges(one, merge_ranges(two, three)) == together
    assert merge_ranges(three, merge_ranges(one, two)) == together


def test_octaves() -> None:
    found = ranges_of(np.asarray([0.0, 1.0, -1.5, 2.0, 65504.0], np.float32))
    assert found.octaves() == {-127: 1, 0: 2, 1: 1, 15: 1}


def test_large_arrays_are_counted_by_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).standard_normal((7, 31)).astype(np.float32).T
    whole = ranges_of(values)
    monkeypatch.setattr("l2p_calib.statistics.ranges._CHUNK", 10)
    assert ranges_of(values) == whole


def network(*points: str, sha256: str = "a", calls: int = CALLS_MIN, name: str = "trunk", seed: int = 0) -> Any:
    random, counters = np.random.default_rng(seed), {}
    for point in points:
        counters[point] = RangeCounter()
        for _ in range(calls):
            counters[point].add(random.standard_normal(50).astype(np.float32))
    return network_statistics(name, sha256, counters)


def test_a_trunks_statistics_are_the_union_over_its_adapters() -> None:
    first, second = network("p", seed=1), network("p", "q", seed=2)
    merged = merge_networks([first, second])
    assert merged.of("p") == merge_ranges(first.of("p"), second.of("p"))
    assert merged.of("q") == second.of("q")
    with pytest.raises(ArtifactError, match="different networks cannot be merged"):
        merge_networks([first, replace(second, sha256="b")])


def test_files_are_merged_by_digest() -> None:
    stems = [network("p", name="stem", sha256=sha, seed=index) for index, sha in enumerate("ab")]
    files = [Statistics(SCHEMA, f"run {i}", (stem, network("p", seed=i))) for i, stem in enumerate(stems)]
    merged = merge_statistics(files)
    assert merged == merge_statistics(files[::-1])
    assert [(item.network, item.sha256) for item in merged.networks] == [("stem", "a"), ("stem", "b"), ("trunk", "a")]
    assert merged.of("trunk", "a") == merge_networks([network("p", seed=0), network("p", seed=1)])
    assert merged.of("stem", "c") is None
    assert merged.source == "run 0; run 1"


def test_a_file_reads_as_it_was_written(tmp_path: Path) -> None:
    found = Statistics(SCHEMA, "a run, 中国", (network("p", "q"),))
    (tmp_path / "s").write_bytes(statistics_to_bytes(found))
    assert read_statistics(tmp_path / "s") == found


def change(data: dict[str, Any], key: str, value: object) -> None:
    data["networks"][0]["points"][0]["ranges"][key] = value


@pytest.mark.parametrize(
    ("damage", "needle"),
    [
        (lambda data: data.update(schema=2), "schema version 2"),
        (lambda data: data.update(more=1), "unknown keys more"),
        (lambda data: data["networks"].append(data["networks"][0]), "stands twice"),
        (lambda data: data["networks"][0]["points"].reverse(), "not sorted"),
        (lambda data: change(data, "count", -1), "negative"),
        (lambda data: change(data, "count", 1), "the histogram holds"),
        (lambda data: change(data, "calls", 1 << 63), "absurd"),
        (lambda data: change(data, "calls", "x"), "expected int"),
        (lambda data: change(data, "first_bin", 2040), "out of range"),
        (lambda data: change(data, "first_bin", -1), "out of range"),
        (lambda data: change(data, "high", 1e9), "ends elsewhere"),
        (lambda data: change(data, "high", 1e39), "range"),
        (lambda data: change(data, "high", float("nan")), "finite"),
        (lambda data: change(data, "low", 99.0), "range"),
    ],
)
def test_a_file_that_lies(tmp_path: Path, damage: Any, needle: str) -> None:
    data = json.loads(statistics_to_bytes(Statistics(SCHEMA, "", (network("p", "q"),))))
    damage(data)
    (tmp_path / "s").write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match=needle):
        read_statistics(tmp_path / "s")


@pytest.mark.parametrize("text", [b"", b"\x80", b"[" * 100_000, b"{}", b"[]", b"NaN"])
def test_a_file_that_is_something_else(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "s").write_bytes(text)
    with pytest.raises(ArtifactError):
        read_statistics(tmp_path / "s")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no file"):
        read_statistics(tmp_path / "s")


def test_statistics_that_say_nothing() -> None:
    good = network("p", "q")
    require_usable(good, ["q", "p"])
    with pytest.raises(ArtifactError, match="do not match its layers: r"):
        require_usable(good, ["p", "q", "r"])
    with pytest.raises(ArtifactError, match="do not match its layers: q"):
        require_usable(good, ["p"])
    require_usable(good, ["p"], optional=["q", "r"])
    with pytest.raises(ArtifactError, match="do not match its layers: q"):
        require_usable(good, ["p"], optional=["r"])
    with pytest.raises(ArtifactError, match="come from 3 calls, at least 4"):
        require_usable(network("p", calls=3), ["p"])
    counter = RangeCounter()
    for _ in range(CALLS_MIN):
        counter.add(np.full(3, 0.5, np.float32))
    with pytest.raises(ArtifactError, match="values of `p` were all the same"):
        require_usable(network_statistics("trunk", "a", {"p": counter}), ["p"])


def test_a_network_that_makes_nan_in_float32() -> None:
    bad = ranges_of(np.asarray([1.0, np.nan, -np.inf], np.float32))
    with pytest.raises(ArtifactError, match=r"`p` held NaN or Inf in float32 \(2 values\)"):
        require_finite(NetworkStatistics("trunk", "a", (PointRanges("p", bad),)))
