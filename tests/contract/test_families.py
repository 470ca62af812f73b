"""Every family keeps the contract; and one that shares nothing with Z-Image goes the whole way from file to picture."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import l2p_export.families
from contract.family import FamilyContract, NetworksContract
from fakes.tiny_family import TINY, TinyModel, with_layers, write_tiny_checkpoint
from l2p_calib.plans.file import read_plan
from l2p_calib.plans.plan import FLOAT8
from l2p_calib.statistics.ranges import read_statistics
from l2p_export.checkpoint.demo import demo_dimensions
from l2p_export.cli.main import main
from l2p_export.families import FAMILIES, Networks
from l2p_export.families.qwen3 import Qwen3Model
from l2p_export.families.qwen3.dimensions import TextEncoderConfig, TextEncoderDimensions
from l2p_export.families.z_image_l2p import Z_IMAGE_L2P, ZImageModel
from l2p_runtime import Pipeline
from l2p_runtime.bundle import open_bundle

PROFILE = """\
patch_px = 8
height_px = { min = 16, opt = 24, max = 64 }
width_px = { min = 16, opt = 24, max = 64 }
caption_tokens = { min = 32, opt = 32, max = 64 }
sampling = { steps = 2, guidance = 1.0, shift = 3.0 }
"""


class TestZImage(FamilyContract):
    family = Z_IMAGE_L2P

    def make(self) -> ZImageModel:
        return ZImageModel(demo_dimensions(16))


class TestTiny(FamilyContract):
    family = TINY

    def make(self) -> TinyModel:
        return with_layers(4)


class TestQwen3(NetworksContract):
    def make(self) -> Networks:
        sizes = TextEncoderDimensions(
            vocabulary=50, width=24, layers=3, heads=4, kv_heads=2, head_width=8, ffn_width=40
        )
        return Qwen3Model(TextEncoderConfig(sizes, rope_theta=1e4, norm_epsilon=1e-6))


def test_every_family_is_held_to_the_contract() -> None:
    held = {kind.family.name for kind in FamilyContract.__subclasses__()}
    assert held >= {family.name for family in FAMILIES}


@pytest.fixture(scope="module")
def registered() -> Iterator[None]:
    """The one line that a new family takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(l2p_export.families, "FAMILIES", (*FAMILIES, TINY))
        yield


@pytest.fixture(scope="module")
def checkpoint(registered: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "tiny.toml").write_text(PROFILE)
    return write_tiny_checkpoint(folder / "tiny.safetensors")


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    """Built in float32 and FP8."""
    profile, out = checkpoint.with_suffix(".toml"), checkpoint.with_suffix(".bundle")
    run_here("build", checkpoint, "--profile", profile, "--precision", "fp32", "--precision", "fp8", "--out", out)
    return out


def run_here(*arguments: str | Path) -> str:
    result = CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def facts(*arguments: str | Path) -> Any:
    return json.loads(run_here(*arguments, "--json"))


def test_a_new_family_is_inspected(checkpoint: Path) -> None:
    found = facts("inspect", checkpoint, "--digest")
    assert (found["kind"], found["family"], found["variant"]) == ("checkpoint", "tiny", "only")
    assert found["model"]["trunk_layers"] == [1, 3]
    assert len(found["trunk_sha256"]) == 64


def test_a_new_family_is_planned(checkpoint: Path) -> None:
    found = facts("plan", checkpoint, "--profile", checkpoint.with_suffix(".toml"), "--device", "rtx4090")
    flops = found["calls"][0]["flops"]
    assert all(flops[network]["linear"] > 0 for network in ("caption", "stem", "trunk", "tail", "head"))
    assert flops["trunk"]["attention"] > 0
    sizes = found["weights"]["trunk"]["bytes"]
    assert sizes["fp8"] < sizes["fp16"] < sizes["fp32"]


def test_a_new_family_is_built_in_fp8(bundle: Path) -> None:
    opened = open_bundle(bundle)
    assert {entry.status for entry in opened.manifest.ledger} == {"passed"}
    assert [plan.name for plan in opened.manifest.plans] == ["fp32", "fp8"]
    plan = read_plan(opened.path(opened.manifest.plan("fp8").file or ""))
    eighths = {entry.layer for entry in plan.layers if entry.dtype == FLOAT8}
    assert len(eighths) == 6 * 4
    assert {entry.layer for entry in plan.layers if entry.dtype == "float32"} == {"clock"}


def test_a_new_family_is_calibrated(bundle: Path, tmp_path: Path) -> None:
    """Every point is found in the ONNX graphs too, rotations without a weight of their own among them."""
    out = tmp_path / "statistics.json"
    run_here("calibrate", bundle, "--out", out, "--samples", "1", "--size", "24x16")
    points = {item.point for network in read_statistics(out).networks for item in network.points}
    model = TinyModel()
    assert points == {point.name for spec in model.networks for point in model.layout(spec.name).points}
    told = run_here("calibrate", bundle, "--explain", "enc.1.look")
    assert told.startswith("fp32: enc.1.look in float32")
    assert "fp8: enc.1.look in float16" in told


def test_a_new_family_is_verified_and_draws(bundle: Path) -> None:
    assert run_here("verify", bundle)
    embeds = np.random.default_rng(0).standard_normal((5, TinyModel().caption_width), np.float32)
    pictures = []
    for plan in ("fp32", "fp8"):
        with Pipeline.open(bundle, backend="onnx", plan=plan) as pipe:
            pictures.append(pipe.generate(prompt_embeds=embeds, height=40, width=24, seed=1).astype(np.float32))
    assert pictures[0].shape == (40, 24, 3)
    assert pictures[0].std() > 1
    assert 0 < np.abs(pictures[1] - pictures[0]).mean() < 8
