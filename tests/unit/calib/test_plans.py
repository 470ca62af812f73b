from __future__ import annotations

from l2p_calib.plans import PLANS, LayerRule, PrecisionPlan


def test_the_longest_rule_that_names_a_layer_wins() -> None:
    plan = PrecisionPlan(
        "x",
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
    digests = {PrecisionPlan("x", "float16").ref.digest, PrecisionPlan("x", "float32").ref.digest}
    assert len(digests) == 2
    assert PLANS["fp16"].ref == PLANS["fp16"].ref
