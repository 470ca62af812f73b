from __future__ import annotations

import pytest

from l2p_export.proof.engine_layers import CASE, HANDFUL, judge_layers
from l2p_runtime.backends.trt_layers import LayerPrecision
from l2p_runtime.contract import BasePrecision, PlanRef

RTX, TENSORRT = "rtx1.7-sm89", "tensorrt11.0-sm90"


def layers(*outputs: tuple[str, int]) -> list[LayerPrecision]:
    """So many layers of each dtype."""
    return [LayerPrecision(f"{dtype} {i}", "gemm", (dtype,)) for dtype, count in outputs for i in range(count)]


MANY = HANDFUL + 1
BORDERS = layers(("float32", HANDFUL))
ALL_FLOAT32 = [*layers(("float32", MANY), ("int64", 2)), LayerPrecision("wait", "signal")]


@pytest.mark.parametrize(
    ("plan", "target", "found", "status", "needle"),
    [
        ("fp16", RTX, layers(("float16", 1), ("float32", 40)), "passed", "layers output float16 in 1, float32 in 40"),
        ("fp16", TENSORRT, layers(("float16", 1), ("float32", 40)), "passed", "float16 in 1"),
        ("bf16", RTX, layers(("bfloat16", 3)), "passed", "layers output bfloat16 in 3"),
        ("fp16", TENSORRT, ALL_FLOAT32, "failed", "no layer outputs float16, as the plan says: layers output float32"),
        ("bf16", TENSORRT, ALL_FLOAT32, "failed", "bfloat16"),
        ("fp16", TENSORRT, layers(("bfloat16", MANY)), "failed", "no layer outputs float16"),
        # RTX lists the borders of what it fused, however many there are.
        ("fp16", RTX, ALL_FLOAT32, "not run", "float32 in 9, int64 in 2; 1 of 12 tell nothing"),
        ("fp16", TENSORRT, BORDERS, "not run", "no layer that the library shows outputs float16"),
        ("fp16", TENSORRT, [*ALL_FLOAT32, LayerPrecision("name alone")], "not run", "float32 in 9"),
        ("fp16", TENSORRT, [*ALL_FLOAT32, LayerPrecision("x", "gemm", ("new",))], "not run", "2 of 13 tell nothing"),
        ("fp16", RTX, [LayerPrecision("a"), LayerPrecision("b")], "not run", "layer's precision: 2 of 2 tell nothing"),
        ("fp16", TENSORRT, [], "not run", "0 of 0 tell nothing"),
        ("fp16", TENSORRT, layers(("int64", 20)), "not run", "the library tells no layer's precision"),
        ("fp32", TENSORRT, ALL_FLOAT32, "passed", "float32 in 9"),
        ("fp32", TENSORRT, BORDERS, "not run", "do not tell that all is computed in float32"),
        ("fp32", RTX, ALL_FLOAT32, "not run", "do not tell that all is computed in float32"),
        ("fp32", TENSORRT, [*ALL_FLOAT32, *layers(("float16", 1))], "not run", "float16 in 1"),
    ],
)
def test_layers_beside_their_plan(
    plan: BasePrecision, target: str, found: list[LayerPrecision], status: str, needle: str
) -> None:
    entry = judge_layers("trunk", PlanRef("mine", "0", plan), target, found)
    assert (str(entry.comparison), entry.network, entry.case) == (f"mine graph -> {target} engine", "trunk", CASE)
    assert entry.status == status
    assert needle in entry.reason


@pytest.mark.parametrize(
    ("found", "status"),
    [
        (layers(("float8_e4m3fn", 1), ("float16", 20)), "passed"),
        # A network that the plan keeps in 16 bits looks like this, and so does one whose FP8 was dropped.
        (layers(("float16", 20)), "not run"),
        (ALL_FLOAT32, "failed"),
    ],
)
def test_a_plan_in_8_bits(found: list[LayerPrecision], status: str) -> None:
    assert judge_layers("trunk", PlanRef("fp8", "0", "fp8"), TENSORRT, found).status == status


def test_a_layer_of_two_outputs_is_counted_once_for_each_dtype() -> None:
    entry = judge_layers(
        "trunk", PlanRef("fp16", "0", "fp16"), RTX, [LayerPrecision("a", "kgen", ("float16", "float16", "int64"))]
    )
    assert entry.reason == "layers output float16 in 1, int64 in 1"
