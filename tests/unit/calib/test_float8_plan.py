"""A plan with products in FP8 from what was measured: scales, what stays in float16, and what cannot be known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from l2p_calib.float8_plan import float8_plan
from l2p_calib.layout import Branch, NetworkLayout, Point, Product
from l2p_calib.measured import Measurement, largest, overflows
from l2p_calib.plans import FLOAT8, PLANS, InputScale, LayerRule, PrecisionPlan
from l2p_calib.statistics import RangeCounter, network_statistics
from l2p_runtime.errors import ArtifactError, HostError

LAYOUT = NetworkLayout(
    "trunk",
    ("b.feed_forward.w1", "b.feed_forward.w3", "b.feed_forward.w2", "b.norm", "residual.trunk"),
    (
        Point("b.feed_forward.w1:in", ("b.feed_forward.w1", "b.feed_forward.w3", "residual.trunk")),
        Point("b.feed_forward.w1:out", ("b.feed_forward.w1",)),
        Point(
            "b.feed_forward.w2:in",
            ("b.feed_forward.w1", "b.feed_forward.w3", "b.feed_forward.w2"),
            ("b.feed_forward.w3",),
        ),
    ),
    (Branch("b.feed_forward.w3", "b.feed_forward.w2", usual="b.feed_forward.w3"),),
    (
        Product("b.feed_forward.w1", "b.feed_forward.w1:in", "b w1w3"),
        Product("b.feed_forward.w3", "b.feed_forward.w1:in", "b w1w3"),
        Product("b.feed_forward.w2", "b.feed_forward.w2:in", "b w2"),
    ),
)
W1, W3, W2 = LAYOUT.layers[:3]


def measurement(**peaks: float) -> Measurement:
    """Even values up to 1 at each point, or up to what is given by its layer: `w1_in=8`; 0 is a point of zeros."""
    counters = {point.name: RangeCounter() for point in LAYOUT.points}
    for name, counter in counters.items():
        peak = peaks.get(name.removeprefix("b.feed_forward.").replace(":", "_"), 1.0)
        counter.add(np.linspace(-1, 1, 1001, dtype=np.float32) * np.float32(peak))
    weights = {f"{layer}.weight": 1.0 for layer in LAYOUT.layers[:3]}
    return Measurement(LAYOUT, "sha", weights, network_statistics("trunk", "sha", counters))


def test_products_get_the_scale_of_what_they_read() -> None:
    found = float8_plan(PLANS["fp8"], [measurement(w1_in=8.0)])
    layers = {entry.layer: entry for entry in found.layers}
    assert [layers[name].dtype for name in (W1, W3, W2)] == [FLOAT8] * 3
    assert layers["b.norm"].dtype == layers["residual.trunk"].dtype == "float16"
    # Even values: nothing is won by cutting some off.
    assert found.plan.inputs == (InputScale(W1, 8 / 448), InputScale(W3, 8 / 448), InputScale(W2, 1 / 448))
    assert found.plan.exponent(W3) == -6
    float8 = layers[W1].float8
    assert float8 is not None
    assert (float8.method, [choice.method for choice in float8.choices]) == (
        "amax",
        ["amax", "percentile 99.99", "percentile 99.9", "mse"],
    )
    assert f"b.feed_forward.w1:in by amax with an error of {float8.choices[0].error:.2%}" in layers[W1].reason
    assert "a norm undoes 2^-6 exactly" in layers[W3].reason


def test_what_is_kept_stays_in_float16_with_its_reason() -> None:
    found = float8_plan(PLANS["fp8"], [measurement()], kept={W2: "kept in float16: because"})
    layers = {entry.layer: entry for entry in found.layers}
    assert (layers[W2].dtype, layers[W2].float8, layers[W2].reason) == ("float16", None, "kept in float16: because")
    assert found.plan.inputs == (InputScale(W1, 1 / 448), InputScale(W3, 1 / 448))


def test_what_float16_cannot_hold_is_not_in_fp8_either() -> None:
    found = float8_plan(PLANS["fp8"], [measurement(w1_out=20_000.0)])
    layers = {entry.layer: entry for entry in found.layers}
    assert (layers[W1].dtype, layers[W1].float8) == ("float32", None)
    assert layers[W3].dtype == FLOAT8
    # An FP8 product makes float16 all the same, and is audited as such.
    over = measurement(w1_out=70_000.0)
    plain = float8_plan(PLANS["fp8-plain"], [over]).plan
    assert plain.dtype(W1) == FLOAT8
    assert overflows(plain, over) == [("b.feed_forward.w1:out", 70_000.0)]
    assert largest(plain, measurement(w1_out=9.0)) == ("b.feed_forward.w1:out", 9.0)


def test_inputs_that_are_all_zero_have_no_scale() -> None:
    found = float8_plan(PLANS["fp8"], [measurement(w2_in=0.0)])
    layers = {entry.layer: entry for entry in found.layers}
    assert layers[W2].dtype == "float16"
    assert layers[W2].reason == "b.feed_forward.w2:in was 0 throughout, which gives no scale"


def test_tiny_inputs_have_the_least_scale_that_float16_holds() -> None:
    found = float8_plan(PLANS["fp8"], [measurement(w2_in=1e-8)])
    assert found.plan.inputs[2] == InputScale(W2, 2.0**-24)


def test_the_plain_plan_chooses_nothing() -> None:
    found = float8_plan(PLANS["fp8-plain"], [measurement()])
    layers = {entry.layer: entry for entry in found.layers}
    assert not found.plan.scales
    assert all(layers[name].dtype == FLOAT8 for name in (W1, W3, W2))
    assert [choice.method for choice in layers[W1].float8.choices] == ["amax"]  # type: ignore[union-attr]


def test_nan_and_nothing_at_all() -> None:
    for name in ("fp8", "fp8-plain"):
        with pytest.raises(ArtifactError, match="held NaN"):
            float8_plan(PLANS[name], [measurement(w1_in=float("nan"))])
    with pytest.raises(HostError, match="FP8 needs to know what `trunk` computes with") as caught:
        float8_plan(PLANS["fp8"], [replace(measurement(), statistics=None)])
    assert "--statistics" in caught.value.hint


def test_the_end_of_a_name_in_a_rule() -> None:
    plan = PrecisionPlan("x", "float16", (LayerRule("*.feed_forward.w1", FLOAT8, "a"),))
    assert plan.dtype("layers.3.feed_forward.w1.weight") == plan.dtype("layers.3.feed_forward.w1") == FLOAT8
    assert plan.dtype("layers.3.feed_forward.w10") == plan.dtype("feed_forward.w1") == "float16"
    assert plan.of_layers(["layers.3.feed_forward.w1.weight"]).rules == (LayerRule("*.feed_forward.w1", FLOAT8, ""),)
    assert not plan.of_layers(["layers.3.feed_forward.w2.weight"]).rules
    # A byte for each weight, and two for the scale of each output.
    assert plan.weight_bytes({"b.feed_forward.w1.weight": (8, 4), "b.feed_forward.w2.weight": (8, 4)}) == 48 + 64
