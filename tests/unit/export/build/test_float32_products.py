"""Linear layers that a plan computes in float32: what an engine for Turing cannot multiply."""

from __future__ import annotations

from dataclasses import replace

import pytest

from l2p_calib.plans.plan import FLOAT8, LayerRule, PrecisionPlan
from l2p_export.checkpoint.demo import demo_dimensions
from l2p_export.families.z_image_l2p import ZImageModel
from l2p_export.precision.plans import float32_products, plain_plan

MODEL = ZImageModel(demo_dimensions(16))


@pytest.mark.parametrize("base", ["fp16", "fp16-plain", "bf16", "fp8"])
def test_what_is_float32_in_every_plan_multiplies_one_row(base: str) -> None:
    plan = plain_plan(MODEL, base)  # type: ignore[arg-type]
    assert plan.dtype("t_embedder.mlp.0") == "float32"
    assert float32_products(MODEL, plan) == ()


def test_a_plan_in_float32_has_every_layer_over_tokens() -> None:
    found = float32_products(MODEL, plain_plan(MODEL, "fp32"))
    assert {"layers.0.attention.to_q", "layers.0.feed_forward.w2", "cap_embedder.1"} < set(found)
    assert not [layer for layer in found if "adaLN" in layer or layer.startswith(("t_embedder", "local_decoder"))]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (LayerRule("layers.1.feed_forward.w2", "float32", "raised"), ("layers.1.feed_forward.w2",)),
        (LayerRule("residual.trunk", "float32", "raised"), ()),
        (LayerRule("local_decoder.up4.1", "float32", "raised"), ()),
        (LayerRule("layers.1.adaLN_modulation.0", "float32", "raised"), ()),
        (LayerRule("layers.1.feed_forward.w2", FLOAT8, "rounded"), ()),
    ],
)
def test_a_raised_layer_counts_if_it_multiplies_tokens(rule: LayerRule, expected: tuple[str, ...]) -> None:
    plan: PrecisionPlan = plain_plan(MODEL, "fp16")
    assert float32_products(MODEL, replace(plan, rules=(*plan.rules, rule))) == expected
