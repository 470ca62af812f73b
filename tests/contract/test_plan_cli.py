"""`plan`: the forecast as text and as numbers, before anything is downloaded or built."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from conftest import run_cli, write_profile
from l2p_export.cli.plan import command
from l2p_runtime.errors import L2PError, UsageError


def plan(*arguments: object) -> Result:
    """Run the command in this process: a fresh one takes half a second."""
    return CliRunner().invoke(command, list(map(str, arguments)))


def facts(*arguments: object) -> Any:
    result = plan(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_published_model_is_planned_without_a_checkpoint(tmp_path: Path) -> None:
    result = run_cli("plan", "--profile", "4k", "--device", "rtx4090", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    text = result.stdout
    assert "6,210,711,491 parameters" in text
    assert "none given" in text
    assert re.search(r"4096x4096 +128 +4,096 +4,224 +48.2 +8.74 +1.23 +58.2", text)
    assert re.search(r"fp16 bf16 +1\d\.\d GiB, head whole +\d+\.\d GiB, head whole", text)
    assert "4096x4096   fp32   one network at a time; or --precision fp16" in text
    assert "not a measurement" in text
    assert max(map(len, text.splitlines())) <= 132
    assert not any(line != line.rstrip() for line in text.splitlines())
    assert not list(tmp_path.iterdir())


def test_json_has_the_same_as_numbers() -> None:
    found = facts("--profile", "8k", "--vram", "12GiB", "--memory", "8GiB", "--precision", "fp16", "--precision", "fp8")
    assert found["precisions"] == ["fp16", "fp8"]
    assert found["weights"]["trunk"]["bytes"]["fp16"] == 2 * 3_618_206_720
    assert [item["total_flops"] > 5e13 for item in found["calls"]] == [True, True]
    assert found["build"]["memory_bytes"] == 8 << 30
    assert found["card"]["memory_bytes"] == 12 << 30
    assert found["card"]["bounds"] == []
    half, eighth = found["card"]["placements"][:2]
    assert not half["all_networks"]["fits"]
    assert half["one_network"]["stripes"] > 1
    assert {(item["precision"], item["residence"]) for item in half["instead"]} == {("fp16", "one"), ("fp8", "all")}
    assert eighth["all_networks"]["fits"]
    assert found["cpu"]["placements"][0]["one_network"]["fits"] is False


def test_every_setting_it_names_does_fit() -> None:
    """What it says would fit is asked again, as a user would."""
    for item in facts("--profile", "10k", "--vram", "16GiB")["card"]["placements"]:
        assert item["all_networks"]["fits"] or item["instead"]
        for setting in item["instead"]:
            call = setting["call"]
            size = f"{call['width_px']}x{call['height_px']}"
            again = facts("--profile", "10k", "--vram", "16GiB", "--size", size, "--precision", setting["precision"])
            (placement,) = again["card"]["placements"]
            assert placement["all_networks" if setting["residence"] == "all" else "one_network"]["fits"]


def test_a_checkpoint_is_planned_from_its_header(tiny_path: Path, tmp_path: Path) -> None:
    assert facts(tiny_path)["subject"]["profiles"][0]["name"] == "1k"
    profile = write_profile(tmp_path / "mine.toml", 16)
    found = facts(tiny_path, "--profile", profile, "--device", "h100")
    assert found["subject"]["checkpoint"] == str(tiny_path)
    assert sum(weights["parameters"] for weights in found["weights"].values()) == 9_159_147
    assert found["forwards_per_step"] == 1
    assert all(item["all_networks"]["fits"] for item in found["card"]["placements"])
    text = plan(tiny_path, "--profile", profile).stdout
    assert str(tiny_path) in text
    assert "all networks" in text


def test_a_text_encoder_counts_as_a_network(tmp_path: Path) -> None:
    from conftest import write_text_encoder, write_tiny_checkpoint

    checkpoint, folder = write_tiny_checkpoint(tmp_path / "tiny.safetensors", 16), write_text_encoder(tmp_path / "q")
    found = facts(checkpoint, "--text-encoder", folder)
    assert "text_encoder" in found["weights"]
    assert found["calls"][0]["flops"]["text_encoder"]["attention"] > 0


def test_sizes_are_asked_for_and_may_lie_outside_the_profile() -> None:
    result = plan("--profile", "4k", "--size", "512x640", "--size", "4096x2048", "--precision", "fp16")
    assert result.exit_code == 0
    assert re.search(r"512x640 +512 +80 ", result.stdout)
    assert "512x640: outside the profiles" in result.stdout


def test_it_reports_although_nothing_fits() -> None:
    result = plan("--profile", "10k", "--vram", "1GiB", "--memory", "1GiB")
    assert result.exit_code == 0
    assert "nothing that was tried" in result.stdout
    assert "do not fit" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 132


def test_a_card_without_fp8_says_so() -> None:
    result = plan("--profile", "1k", "--device", "RTX 3060")
    assert re.search(r"fp8 +does not run there", result.stdout)
    assert "bandwidth alone" in result.stdout
    older = facts("--profile", "1k", "--device", "2080 ti")["card"]["placements"]
    assert {item["precision"] for item in older if item["runs"]} == {"fp32", "fp16"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--profile", "4k", "--device", "RTX 4091"), "no card `RTX 4091`"),
        (("--profile", "4k", "--device", "4090", "--vram", "12GiB"), "both --device and --vram"),
        (("--profile", "4k", "--size", "1000x1000"), "does not divide by 64"),
        (("--profile", "4k", "--size", "4096"), "WIDTHxHEIGHT"),
        (("--profile", "4k", "--vram", "0"), "no size in bytes"),
        (("--profile", "4k", "--memory", "much"), "no size in bytes"),
        (("--profile", "4k", "--profile", "1k"), "16 px patches"),
        (("--profile", "5k"), "no profile `5k`"),
        (("--profile", "4k", "--source", "."), "none was given"),
        ((), "neither a checkpoint nor a profile"),
    ],
)
def test_wrong_arguments_are_usage_errors(arguments: tuple[str, ...], says: str) -> None:
    error = plan(*arguments).exception
    assert isinstance(error, UsageError)
    assert says in str(error)
    assert error.hint or "size" in says or "WIDTH" in says


def test_a_profile_for_another_patch_is_refused(tiny_path: Path, tmp_path: Path) -> None:
    assert "64 px patches" in str(plan(tiny_path, "--profile", "4k").exception)
    odd = tmp_path / "odd.toml"
    odd.write_text("patch_px = 32\nheight_px = {min=32, opt=64, max=96}\nwidth_px = {min=32, opt=64, max=96}\n")
    assert "which no published model has" in str(plan("--profile", odd).exception)


def test_wrong_usage_is_exit_code_2_on_stderr(tmp_path: Path) -> None:
    for arguments in (("--precision", "fp4"), ("--device", "toaster")):
        result = run_cli("plan", "--profile", "4k", *arguments)
        assert result.returncode == 2
        assert result.stdout == ""
        assert "Traceback" not in result.stderr
    assert isinstance(plan(tmp_path / "absent.safetensors").exception, L2PError)
