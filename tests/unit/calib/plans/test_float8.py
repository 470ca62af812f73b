"""A plan with products in FP8 from what was measured: scales, what stays in float16, and what cannot be known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from l2p_calib.layout import Attention, Branch, Point, QuantizableLayer, QuantizationLayout
from l2p_calib.plans.file import check_layers, plan_to_bytes
from l2p_calib.plans.float8 import float8_plan
from l2p_calib.plans.float16 import Measurement, largest, measured_plan, overflows
from l2p_calib.plans.plan import FLOAT8, PLANS, InputScale, LayerRule, PrecisionPlan
from l2p_calib.statistics.ranges import RangeCounter, network_statistics
from l2p_runtime.errors import ArtifactError, HostError

LAYOUT = QuantizationLayout(
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
        QuantizableLayer("b.feed_forward.w1", "b.feed_forward.w1:in", "b w1w3"),
        QuantizableLayer("b.feed_forward.w3", "b.feed_forward.w1:in", "b w1w3"),
        QuantizableLayer("b.feed_forward.w2", "b.feed_forward.w2:in", "b w2"),
    ),
)
W1, W3, W2 = LAYOUT.layers[:3]

QUERY, KEY, VALUE = (f"b.attention.{name}" for name in ("query", "key", "value"))
ATTENTION = Attention(
    "b.attention",
    (
        QuantizableLayer(QUERY, f"{QUERY}:out", "b attention"),
        QuantizableLayer(KEY, f"{KEY}:out", "b attention"),
        QuantizableLayer(VALUE, "b.attention.to_v:out", "b attention"),
    ),
)
ATTENTIVE = replace(
    LAYOUT,
    points=(*LAYOUT.points, *(Point(part.reads) for part in ATTENTION.inputs)),
    attentions=(ATTENTION,),
)


def measurement(layout: QuantizationLayout = LAYOUT, **peaks: float) -> Measurement:
    """Even values up to 1 at each point, or up to what is given by its layer: `w1_in=8`; 0 is a point of zeros."""
    counters = {point.name: RangeCounter() for point in layout.points}
    for name, counter in counters.items():
        short = name.removeprefix("b.feed_forward.").removeprefix("b.attention.")
        peak = peaks.get(short.replace(":", "_"), 1.0)
        counter.add(np.linspace(-1, 1, 1001, dtype=np.float32) * np.float32(peak))
    weights = {f"{layer}.weight": 1.0 for layer in LAYOUT.layers[:3]}
    return Measurement(layout, "sha", weights, network_statistics("trunk", "sha", counters))


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


def test_each_input_of_attention_gets_a_scale() -> None:
    found = float8_plan(PLANS["fp8-attention"], [measurement(ATTENTIVE, query_out=8.0, key_out=4.0, to_v_out=2.0)])
    layers = {entry.layer: entry for entry in found.layers}
    assert found.plan.inputs[3:] == (InputScale(QUERY, 8 / 448), InputScale(KEY, 4 / 448), InputScale(VALUE, 2 / 448))
    assert [layers[name].dtype for name in (QUERY, KEY, VALUE)] == [FLOAT8] * 3
    assert layers[VALUE].reason.startswith("b.attention.to_v:out by amax with an error of ")
    assert [(item.point, item.peak) for item in layers[VALUE].evidence] == [("b.attention.to_v:out", 2.0)]
    check_layers(found, [ATTENTIVE])


@pytest.mark.parametrize("name", ["fp8", "fp8-plain", "fp16"])
def test_a_plan_without_attention_says_nothing_of_it(name: str) -> None:
    """Its bytes are those of a model whose attention nobody thinks of, and older statistics are enough for it."""
    complete = measured_plan if name == "fp16" else float8_plan
    alone = plan_to_bytes(complete(PLANS[name], [measurement()]))
    assert plan_to_bytes(complete(PLANS[name], [measurement(ATTENTIVE)])) == alone
    older = replace(measurement(ATTENTIVE), statistics=measurement().statistics)
    assert plan_to_bytes(complete(PLANS[name], [older])) == alone


@pytest.mark.parametrize("zero", ["query:out", "key:out", "to_v:out"])
def test_attention_with_an_input_of_zeros_is_not_rounded(zero: str) -> None:
    found = float8_plan(PLANS["fp8-attention"], [measurement(ATTENTIVE, **{zero.replace(":", "_"): 0.0})])
    layers = {entry.layer: entry for entry in found.layers}
    for name in (QUERY, KEY, VALUE):
        assert (layers[name].dtype, layers[name].float8) == ("float16", None)
        assert layers[name].reason == f"b.attention.{zero} was 0 throughout, which gives no scale"
    assert layers[W1].dtype == FLOAT8


def test_attention_that_is_kept_or_was_not_measured() -> None:
    kept = dict.fromkeys((QUERY, KEY, VALUE), "kept in float16: because")
    found = float8_plan(PLANS["fp8-attention"], [measurement(ATTENTIVE)], kept=kept)
    told = {entry.layer: (entry.dtype, entry.reason) for entry in found.layers if entry.layer in kept}
    assert told == dict.fromkeys(kept, ("float16", "kept in float16: because"))
    older = replace(measurement(ATTENTIVE), statistics=measurement().statistics)
    with pytest.raises(ArtifactError, match=r"`b\.attention\.query:out` is, and the statistics of `trunk` lack it"):
        float8_plan(PLANS["fp8-attention"], [older])


def test_scales_of_weights_take_room() -> None:
    plan = PrecisionPlan("x", "fp16", "float16", (LayerRule("b.feed_forward.w1", FLOAT8, "a"),))
    # A byte for each weight, and two for the scale of each output.
    assert plan.weight_bytes({"b.feed_forward.w1.weight": (8, 4), "b.feed_forward.w2.weight": (8, 4)}) == 48 + 64
