"""A float16 plan from what was measured: exponents and float32 layers by hand, and what cannot be held."""

from __future__ import annotations

import numpy as np
import pytest

from l2p_calib.layout import Branch, Point, QuantizationLayout
from l2p_calib.plans.float16 import FLOAT16_MAX, Measurement, largest, measured_plan, overflows
from l2p_calib.plans.plan import PLANS
from l2p_calib.statistics.ranges import RangeCounter, network_statistics
from l2p_runtime.errors import ArtifactError, ParityError

LAYOUT = QuantizationLayout(
    "trunk",
    ("v", "out", "w1", "w3", "w2", "norm", "residual.trunk"),
    (
        Point("v:out", (), ("v",)),
        Point("out:out", ("out",), ("v", "out")),
        Point("w1:out", ("w1",)),
        Point("w3:out", ("w3",), ("w3",)),
        Point("w2:in", ("w1", "w3", "w2"), ("w3",)),
        Point("w2:out", ("w2",), ("w3", "w2")),
        Point("norm:out", ("w2", "residual.trunk")),
    ),
    (Branch("v", "out", usual="out"), Branch("w3", "w2", usual="w3")),
)


def measurement(weights: float = 1.0, **peaks: float) -> Measurement:
    """What was measured: 1 everywhere, but for these points, whose colon is a double underscore."""
    counters = {point.name: RangeCounter() for point in LAYOUT.points}
    for name, counter in counters.items():
        counter.add(np.asarray([peaks.get(name.replace(":", "__"), 1.0), 0.1], np.float32))
    tensors = {f"{layer}.weight": weights for layer in ("v", "out", "w1", "w3", "w2", "norm")}
    return Measurement(LAYOUT, "sha", tensors, network_statistics("trunk", "sha", counters))


def plan(item: Measurement) -> tuple[dict[str, int], set[str]]:
    """Exponents, and the layers in float32."""
    found = measured_plan(PLANS["fp16"], [item])
    assert not overflows(found.plan, item, limit=FLOAT16_MAX / 4)
    by_layer = {entry.layer: entry for entry in found.layers}
    assert tuple(by_layer) == LAYOUT.layers
    assert all(entry.reason for entry in found.layers if entry.exponent or entry.dtype != "float16")
    scales = {layer: entry.exponent for layer, entry in by_layer.items() if entry.exponent}
    return scales, {layer for layer, entry in by_layer.items() if entry.dtype == "float32"}


def test_every_branch_is_scaled_as_usual() -> None:
    assert plan(measurement()) == ({"out": -6, "w3": -6}, set())
    # 63,000, where the published model peaks, comes to 984.
    assert plan(measurement(out__out=63_000.0, w2__in=63_000.0)) == ({"out": -6, "w3": -6}, set())


@pytest.mark.parametrize(
    ("peaks", "scales"),
    [
        ({"w2__in": 16_376.0 * 64}, {"out": -6, "w3": -6}),
        ({"w2__in": 16_380.0 * 64}, {"out": -6, "w3": -7}),
        ({"w3__out": 2.0**22}, {"out": -6, "w3": -9}),
        ({"w2__out": 2.0**22}, {"out": -6, "w3": -6, "w2": -3}),
        ({"out__out": 2.0**22}, {"out": -9, "w3": -6}),
        ({"v__out": 2.0**15}, {"v": -2, "out": -6, "w3": -6}),
        ({"v__out": 2.0**15, "out__out": 2.0**22}, {"v": -2, "out": -7, "w3": -6}),
    ],
)
def test_a_branch_is_scaled_by_what_it_needs(peaks: dict[str, float], scales: dict[str, int]) -> None:
    assert plan(measurement(**peaks)) == (scales, set())


def test_what_no_scale_reaches_is_raised_to_float32() -> None:
    assert plan(measurement(w1__out=20_000.0))[1] == {"w1"}
    assert plan(measurement(w1__out=16_000.0))[1] == set()
    assert plan(measurement(norm__out=1e6))[1] == {"w2", "residual.trunk"}


def test_weights_are_not_scaled_away() -> None:
    """Weights of 0.01 bear 2^-4; a product that needs more is held in float32."""
    scales, raised = plan(measurement(weights=0.01, w2__in=2.0**20))
    assert scales == {"out": -4, "w3": -4}
    assert raised == {"w1", "w3", "w2"}
    assert plan(measurement(weights=0.0))[0] == {"out": -6, "w3": -6}


def test_weights_beyond_float16_are_raised_unless_scaling_brings_them_down() -> None:
    scales, raised = plan(measurement(weights=1e6))
    assert scales == {"out": -6, "w3": -6}
    # The two that are scaled come to 15,625; a norm's gain takes what holds its values along.
    assert raised == {"v", "w1", "w2", "norm", "residual.trunk"}


def test_attention_is_never_raised() -> None:
    with pytest.raises(ParityError, match=r"inside attention.*v:out reaches") as caught:
        measured_plan(PLANS["fp16"], [measurement(weights=0.001, v__out=1e6)])
    assert "bf16" in caught.value.hint


def test_nan_in_float32_is_the_checkpoints_fault() -> None:
    with pytest.raises(ArtifactError, match="`w1:out` held NaN"):
        measured_plan(PLANS["fp16"], [measurement(w1__out=float("nan"))])


def test_without_statistics_branches_are_scaled_as_usual() -> None:
    known = Measurement(LAYOUT, "sha", {"w3.weight": 1.0})
    found = measured_plan(PLANS["fp16"], [known])
    assert {scale.layer: scale.exponent for scale in found.plan.scales} == {"out": -6, "w3": -6}
    assert not any(entry.evidence for entry in found.layers)


def test_evidence_is_what_was_measured_before_scaling() -> None:
    found = measured_plan(PLANS["fp16"], [measurement(w2__in=5_000.0)])
    (entry,) = (entry for entry in found.layers if entry.layer == "w2")
    assert [(item.point, item.peak, item.calls) for item in entry.evidence] == [("w2:in", 5000, 1), ("w2:out", 1, 1)]


def test_what_a_plan_overflows_by() -> None:
    item = measurement(w2__in=1e6, w1__out=7e4)
    assert overflows(PLANS["fp16-plain"].of([LAYOUT]), item) == [("w2:in", 1e6), ("w1:out", 7e4)]
    assert largest(PLANS["fp16-plain"].of([LAYOUT]), item) == ("w2:in", 1e6)
    assert overflows(PLANS["fp32"].of([LAYOUT]), item) == []
