"""Plans that people edit: what is wrong in them is said, and nothing of it reaches a graph."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from l2p_calib.layout import Branch, NetworkLayout
from l2p_calib.planfile import LayerPlan, NetworkDigest, PlanFile, check_digests, check_layers, plan_to_bytes, read_plan
from l2p_calib.plans import PLANS, LayerRule, LayerScale, base_plan
from l2p_runtime.errors import ArtifactError, UsageError

LAYERS = ("w1", "w3", "w2", "layers.1.w2", "residual.trunk")
LAYOUT = NetworkLayout("trunk", LAYERS, (), (Branch("w3", "w2", usual="w3"),))
PLAN = PlanFile(
    "fp16-mine",
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


def layer(data: Any, **changes: object) -> None:
    data["layers"][1] |= changes


@pytest.mark.parametrize(
    ("damage", "needle"),
    [
        (lambda data: data.update(schema=9), "schema version 9"),
        (lambda data: data.update(name="int8"), "cannot be called 'int8'"),
        (lambda data: data.update(name="fp16-../x"), "cannot be called"),
        (lambda data: data.update(default="float32"), "has the default float32, expected float16"),
        (lambda data: data.update(headroom=0), "headroom is 0"),
        (lambda data: data.update(headroom=float("nan")), "headroom is nan, expected a finite number"),
        (lambda data: layer(data, dtype="float8"), "expected one of 'float32', 'float16', 'bfloat16'"),
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


@pytest.mark.parametrize("text", [b"", b"\xff", b"[" * 100_000, b"[]"])
def test_a_file_that_is_no_plan(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "p.json").write_bytes(text)
    with pytest.raises(ArtifactError, match=r"plan `.*p\.json`"):
        read_plan(tmp_path / "p.json")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no plan"):
        read_plan(tmp_path / "p.json")


def plan_of(*layers: LayerPlan) -> PlanFile:
    return PlanFile("fp16-mine", "float16", 4.0, (NetworkDigest("trunk", "ab12"),), layers)


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
    check_digests(PlanFile("fp16", "float16", 4.0, (), ()), {"trunk": "cd34"})


def test_the_base_of_a_name() -> None:
    assert base_plan("fp16-mine") is PLANS["fp16"]
    assert base_plan("fp16-plain") is PLANS["fp16-plain"]
    assert base_plan("mine") is None
