from __future__ import annotations

from l2p_calib.ledger import threshold_of
from l2p_calib.plans.plan import FLOAT8, PLANS, LayerRule, LayerScale, PrecisionPlan


def test_the_longest_rule_that_names_a_layer_wins() -> None:
    plan = PrecisionPlan(
        "x",
        "fp16",
        "float16",
        (LayerRule("layers.1", "float32", "a"), LayerRule("layers.1.attention", "float16", "b")),
    )
    assert plan.dtype("layers.1") == "float32"
    assert plan.dtype("layers.1.feed_forward.w1.weight") == "float32"
    assert plan.dtype("layers.1.attention.to_q.weight") == "float16"
    assert plan.dtype("layers.10.attention.to_q.weight") == "float16"


def test_plain_plans() -> None:
    assert PLANS["fp32"].dtype("t_embedder") == "float32"
    assert PLANS["fp16"].dtype("t_embedder.mlp.0.weight") == "float32"
    assert PLANS["fp16"].dtype("residual") == "float16"
    assert (PLANS["fp32"].opset, PLANS["fp16"].opset) == (20, 23)


def test_a_plans_digest_follows_its_content() -> None:
    digests = {PrecisionPlan("x", "fp16", "float16").ref.digest, PrecisionPlan("x", "fp32", "float32").ref.digest}
    assert len(digests) == 2
    assert PLANS["fp16"].ref == PLANS["fp16"].ref


def test_what_a_plan_says_of_some_layers() -> None:
    """Graphs are equal where this is: reasons and other layers do not matter."""
    rules = (
        LayerRule("layers.2", "float32", "because"),
        LayerRule("residual", "float32", "c"),
        LayerRule("head", "float32", "d"),
    )
    plan = PrecisionPlan("x", "fp16", "float16", rules, (LayerScale("layers.3.w3", -6), LayerScale("layers.1.w3", -6)))
    trunk = plan.of_layers(["layers.1.w3", "layers.1.w3.weight", "layers.2.w3.weight", "residual.trunk"])
    assert [rule.layer for rule in trunk.rules] == ["layers.2", "residual"]
    assert not any(rule.reason for rule in trunk.rules)
    assert trunk.scales == (LayerScale("layers.1.w3", -6),)
    other = PrecisionPlan(
        "x", "fp16", "float16", (LayerRule("residual", "float32", "z"), LayerRule("layers.2", "float32", ""))
    )
    assert other.of_layers(["layers.2.w3.weight", "residual.trunk"]) == trunk.of_layers(
        ["layers.2.w3.weight", "residual.trunk"]
    )


def test_plain_float16_stays_reachable() -> None:
    assert PLANS["fp16-plain"].rules == PLANS["fp16"].rules
    assert PLANS["fp16-plain"].scales == ()
    assert threshold_of("fp16-plain") == threshold_of("fp16")


def test_attention_is_in_fp8_under_one_name_alone() -> None:
    """The rules name what attention multiplies, and neither the norms nor the products beside it."""
    inputs = [f"layers.3.attention.{name}" for name in ("query", "key", "value")]
    others = [f"layers.3.{name}" for name in ("attention", "attention.norm_q.weight", "attention.to_q", "ffn_norm1")]
    plan, without = PLANS["fp8-attention"], PLANS["fp8"]
    assert [plan.dtype(name) for name in inputs] == [FLOAT8] * 3
    assert [plan.carrier(name) for name in inputs] == ["float16"] * 3
    assert [without.dtype(name) for name in inputs] == ["float16"] * 3
    assert [plan.dtype(name) for name in others] == [without.dtype(name) for name in others]
    assert (
        plan.of_layers(["layers.3.attention.to_q.weight"]).rules
        == without.of_layers(["layers.3.attention.to_q.weight"]).rules
    )
    assert threshold_of("fp8-attention", "trunk") == threshold_of("fp8", "trunk")


def test_an_fp8_plan_is_judged_by_what_it_rounds() -> None:
    assert threshold_of("fp8", "trunk") == threshold_of("fp8")
    assert threshold_of("fp8", "end-to-end").relative < threshold_of("fp8").relative < 1
    for network in ("head", "text_encoder", "stem.modulation"):
        assert threshold_of("fp8", network) == threshold_of("fp8-plain", network) == threshold_of("fp16")
    assert threshold_of("fp8-plain", "end-to-end") == threshold_of("fp8-plain") != threshold_of("fp8")
    assert threshold_of("fp16", "end-to-end") == threshold_of("fp16")
