"""Plans that people edit: what is wrong in them is said, and nothing of it reaches a graph."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from l2p_calib.layout import Attention, Branch, QuantizableLayer, QuantizationLayout
from l2p_calib.plans.file import (
    Float8,
    LayerPlan,
    NetworkDigest,
    PlanFile,
    check_digests,
    check_layers,
    plan_to_bytes,
    read_plan,
)
from l2p_calib.plans.plan import FLOAT8, InputScale, LayerRule, LayerScale
from l2p_runtime.errors import ArtifactError, UsageError

LAYERS = ("w1", "w3", "w2", "layers.1.w2", "residual.trunk")
PRODUCTS = (
    QuantizableLayer("w1", "w1:in", "w1w3"),
    QuantizableLayer("w3", "w1:in", "w1w3"),
    QuantizableLayer("w2", "w2:in", "w2"),
)
LAYOUT = QuantizationLayout("trunk", LAYERS, (), (Branch("w3", "w2", usual="w3"),), PRODUCTS)
PLAN = PlanFile(
    "fp16-mine",
    "fp16",
    "float16",
    4.0,
    (NetworkDigest("trunk", "ab12"),),
    (LayerPlan("w1", "float32", 0, "by hand"), LayerPlan("w3", "float16", -8), LayerPlan("w2", "float16")),
)


def test_a_file_reads_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_bytes(plan_to_bytes(PLAN))
    found = read_plan(tmp_path / "p.json")
    assert found == PLAN
    assert found.sha256 == PLAN.sha256
    check_layers(found, [LAYOUT])
    check_digests(found, {"trunk": "ab12", "stem": "x"})
    assert found.plan.rules == (LayerRule("w1", "float32", "by hand"),)
    assert found.plan.scales == (LayerScale("w3", -8),)
    assert (found.plan.exponent("w3"), found.plan.exponent("w2")) == (-8, 0)


EIGHTHS = PlanFile(
    "fp8-mine",
    "fp8",
    "float16",
    4.0,
    (),
    (LayerPlan("w1", "float16"), LayerPlan("w3", FLOAT8, -6, "", (), Float8(0.25, "amax")), LayerPlan("w2", "float16")),
)


def layer(data: Any, **changes: object) -> None:
    data["layers"][1] |= changes


@pytest.mark.parametrize(
    ("damage", "needle"),
    [
        (lambda data: data.update(schema=9), "schema version 9"),
        (lambda data: data.update(name="In8"), "cannot be called 'In8'"),
        (lambda data: data.update(base="int8"), "base is 'int8', expected one of 'fp32'"),
        (lambda data: data.update(name="bf16"), "plan `bf16` states the base `fp16`"),
        (lambda data: data.update(name="fp16-../x"), "cannot be called"),
        (lambda data: data.update(default="float32"), "has the default float32, expected float16"),
        (lambda data: data.update(headroom=0), "headroom is 0"),
        (lambda data: data.update(headroom=float("nan")), "headroom is nan, expected a finite number"),
        (lambda data: layer(data, dtype="float8"), "expected one of 'float32', 'float16', 'bfloat16', 'float8_e4m3fn'"),
        (lambda data: layer(data, exponent=float("nan")), "exponent is nan, expected int"),
        (lambda data: layer(data, exponent=0.5), "exponent is 0.5, expected int"),
        (lambda data: layer(data, exponent=-25), "a scale of 0 or infinity in float16"),
        (lambda data: layer(data, exponent=10**400), "a scale of 0 or infinity in float16"),
        (lambda data: layer(data, scale=0), "unknown keys scale"),
        (lambda data: layer(data, layer="w1"), "`w1` stands twice"),
        (lambda data: data.pop("networks"), "lacks networks"),
    ],
)
def test_a_plan_that_is_wrong_in_itself(tmp_path: Path, damage: Any, needle: str) -> None:
    data = json.loads(plan_to_bytes(PLAN))
    damage(data)
    (tmp_path / "p.json").write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match=needle):
        read_plan(tmp_path / "p.json")


def test_a_file_with_a_layer_in_fp8(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_bytes(plan_to_bytes(EIGHTHS))
    found = read_plan(tmp_path / "p.json")
    assert found == EIGHTHS
    check_layers(found, [LAYOUT])
    assert found.plan.inputs == (InputScale("w3", 0.25),)
    assert [(found.plan.dtype(name), found.plan.carrier(name)) for name in ("w1", "w3.weight")] == [
        ("float16", "float16"),
        (FLOAT8, "float16"),
    ]
    assert found.plan.dtypes == ("float16", FLOAT8)
    # What a file of an earlier version has not, is not in FP8.
    data = json.loads(plan_to_bytes(PLAN))
    for entry in data["layers"]:
        del entry["float8"]
    (tmp_path / "p.json").write_text(json.dumps(data))
    assert read_plan(tmp_path / "p.json") == PLAN


@pytest.mark.parametrize(
    ("damage", "needle"),
    [
        (lambda data: layer(data, float8=None), f"`w3` is in {FLOAT8} and has no `float8`"),
        (lambda data: layer(data, dtype="float16"), "`w3` is in float16 and has `float8`"),
        (lambda data: layer(data, dtype="float8"), "expected one of .*'float8_e4m3fn'"),
        (lambda data: data.update(name="mine", base="fp16"), f"is in {FLOAT8}, and the plan's base is `fp16`"),
        (lambda data: scale(data, 0), "input_scale is 0, expected 5.96e-08 to 65504"),
        (lambda data: scale(data, -0.25), "input_scale is -0.25"),
        (lambda data: scale(data, 1e-9), "input_scale is 1e-09"),
        (lambda data: scale(data, 1e6), r"input_scale is 1e\+06"),
        (lambda data: scale(data, float("nan")), "input_scale is nan, expected a finite number"),
        (lambda data: scale(data, float("inf")), "input_scale is inf, expected a finite number"),
        (lambda data: scale(data, "0.25"), "input_scale is '0.25', expected float"),
        (lambda data: data["layers"][1]["float8"].update(zero_point=1), "unknown keys zero_point"),
    ],
)
def test_a_layer_in_fp8_that_is_wrong(tmp_path: Path, damage: Any, needle: str) -> None:
    data = json.loads(plan_to_bytes(EIGHTHS))
    damage(data)
    (tmp_path / "p.json").write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match=needle):
        read_plan(tmp_path / "p.json")


def scale(data: Any, value: object) -> None:
    data["layers"][1]["float8"]["input_scale"] = value


def test_fp8_where_no_product_is() -> None:
    def eighths(*layers: tuple[str, float]) -> PlanFile:
        found = tuple(LayerPlan(name, FLOAT8, 0, "", (), Float8(scale, "by hand")) for name, scale in layers)
        return PlanFile("fp8-mine", "fp8", "float16", 4.0, (), found)

    check_layers(eighths(("w1", 0.5), ("w3", 0.5), ("w2", 0.25)), [LAYOUT])
    with pytest.raises(
        ArtifactError, match=r"has `residual\.trunk` in float8_e4m3fn, which only linear layers"
    ) as caught:
        check_layers(eighths(("residual.trunk", 1.0)), [LAYOUT])
    assert caught.value.hint == "as `w1`; set this one to float16"
    with pytest.raises(ArtifactError, match=r"`w1` and `w3` read the same values, and their input_scale is 0\.5 and 1"):
        check_layers(eighths(("w1", 0.5), ("w3", 1.0)), [LAYOUT])


ATTENTION = Attention(
    "attention",
    (
        QuantizableLayer("attention.query", "attention.query:out", "attention"),
        QuantizableLayer("attention.key", "attention.key:out", "attention"),
        QuantizableLayer("attention.value", "to_v:out", "attention"),
    ),
)
ATTENTIVE = replace(LAYOUT, attentions=(ATTENTION,))
INPUTS = PlanFile(
    "fp8-mine",
    "fp8",
    "float16",
    4.0,
    (),
    tuple(
        LayerPlan(part.layer, FLOAT8, 0, "", (), Float8(scale, "by hand"))
        for part, scale in zip(ATTENTION.inputs, (0.5, 0.25, 2.0), strict=True)
    ),
)


def test_a_file_with_attention_in_fp8(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_bytes(plan_to_bytes(INPUTS))
    found = read_plan(tmp_path / "p.json")
    assert found == INPUTS
    check_layers(found, [ATTENTIVE])
    names = [part.layer for part in ATTENTION.inputs]
    assert found.plan.inputs == tuple(map(InputScale, names, (0.5, 0.25, 2.0)))
    assert [found.plan.dtype(name) for name in (*names, "attention", "attention.norm_q")] == [FLOAT8] * 3 + [
        "float16"
    ] * 2
    with pytest.raises(ArtifactError, match=r"speaks of `attention\.query`, which the model has not"):
        check_layers(found, [LAYOUT])


@pytest.mark.parametrize(
    ("damage", "needle"),
    [
        (lambda data: data["layers"].pop(1), r"`attention\.key` in float16, .* must be all float8_e4m3fn, or none"),
        (lambda data: layer(data, dtype="float16", float8=None), r"`attention\.key` in float16, .* or none"),
        (lambda data: [entry.update(dtype="float32", float8=None) for entry in data["layers"]], "computes in float16"),
        (lambda data: layer(data, dtype="float32", float8=None), "computes in float16, and reads that or float8"),
        (lambda data: layer(data, exponent=-1), r"scales `attention\.key`, and nothing behind it"),
        (lambda data: layer(data, float8=None), r"`attention\.key` is in float8_e4m3fn and has no `float8`"),
        (lambda data: scale(data, 0), "input_scale is 0"),
        (lambda data: scale(data, float("nan")), "input_scale is nan, expected a finite number"),
        (lambda data: data.update(name="mine", base="fp16"), "the plan.s base is `fp16`"),
    ],
)
def test_attention_in_fp8_that_is_wrong(tmp_path: Path, damage: Any, needle: str) -> None:
    data = json.loads(plan_to_bytes(INPUTS))
    damage(data)
    (tmp_path / "p.json").write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match=needle):
        check_layers(read_plan(tmp_path / "p.json"), [ATTENTIVE])


@pytest.mark.parametrize("text", [b"", b"\xff", b"[" * 100_000, b"[]"])
def test_a_file_that_is_no_plan(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "p.json").write_bytes(text)
    with pytest.raises(ArtifactError, match=r"plan `.*p\.json`"):
        read_plan(tmp_path / "p.json")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no plan"):
        read_plan(tmp_path / "p.json")


def plan_of(*layers: LayerPlan) -> PlanFile:
    return PlanFile("fp16-mine", "fp16", "float16", 4.0, (NetworkDigest("trunk", "ab12"),), layers)


def test_a_plan_that_does_not_fit_the_model() -> None:
    with pytest.raises(ArtifactError, match=r"speaks of `layer\.1\.w2`, which the model has not") as caught:
        check_layers(plan_of(LayerPlan("layer.1.w2", "float32")), [LAYOUT])
    assert caught.value.hint == "did you mean `layers.1.w2`?"
    with pytest.raises(ArtifactError, match="scales `w1`, and nothing behind it would undo that") as caught:
        check_layers(plan_of(LayerPlan("w1", "float16", -1)), [LAYOUT])
    assert "as `w2`" in caught.value.hint


def test_another_trunks_plan() -> None:
    with pytest.raises(ArtifactError, match="was made for trunk ab12, the checkpoint has trunk cd34") as caught:
        check_digests(PLAN, {"trunk": "cd34"})
    assert "remove `trunk`" in caught.value.hint
    with pytest.raises(ArtifactError, match="the checkpoint has no network `trunk`"):
        check_digests(PLAN, {"stem": "ab12"})
    check_digests(PlanFile("fp16", "fp16", "float16", 4.0, (), ()), {"trunk": "cd34"})


def test_a_name_says_nothing_of_the_base(tmp_path: Path) -> None:
    data = json.loads(plan_to_bytes(PLAN)) | {"name": "fp32-mine"}
    (tmp_path / "p.json").write_text(json.dumps(data))
    found = read_plan(tmp_path / "p.json").plan
    assert (found.name, found.base, found.ref.base) == ("fp32-mine", "fp16", "fp16")


def test_a_file_of_an_earlier_version_has_its_base_in_its_name(tmp_path: Path) -> None:
    data = json.loads(plan_to_bytes(PLAN))
    del data["base"]
    (tmp_path / "p.json").write_text(json.dumps(data))
    assert read_plan(tmp_path / "p.json") == PLAN
    (tmp_path / "p.json").write_text(json.dumps(data | {"name": "mine"}))
    with pytest.raises(ArtifactError, match="does not state its base") as caught:
        read_plan(tmp_path / "p.json")
    assert 'add one, as "base": "fp16"; bases: fp32, ' in caught.value.hint
