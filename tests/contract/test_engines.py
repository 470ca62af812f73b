"""Engines as a user meets them: built for named targets, once; listed, checked, packed; refused at once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from conftest import run_cli, seed_store, write_profile
from contract.test_store_cli import HEAD_BIAS, refuse, snapshot
from l2p_runtime.bundle import open_bundle, verify_files
from l2p_runtime.contract import NETWORKS, manifest_from_bytes, manifest_to_bytes
from l2p_runtime.errors import ArtifactError

if TYPE_CHECKING:
    import subprocess

    from conftest import Bundles


class Farm:
    """One store, and the bundles of several adapters of one source built in it."""

    def __init__(self, root: Path, store: Path) -> None:
        self.root, self.store = root, root / "store"
        seed_store(store, self.store)
        for patch in (64, 128):
            write_profile(root / f"p{patch}.toml", patch)

    def build(
        self, name: str, patch: int, *options: str | Path, profile: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        profile = profile or self.root / f"p{patch}.toml"
        command = [self.root / f"{name}.safetensors", "--profile", profile, "--store", self.store]
        result = run_cli("build", *command, "--out", self.root / name, *options)
        assert "Traceback" not in result.stderr
        return result


@pytest.fixture(scope="module")
def farm(bundles: Bundles, tmp_path_factory: pytest.TempPathFactory) -> Farm:
    kinds = {"small": "tiny-64", "large": "tiny-128"}
    paths = {name: bundles.checkpoint(kind) for name, kind in kinds.items()}
    made = Farm(tmp_path_factory.mktemp("farm"), bundles.store)
    for name, path in paths.items():
        shutil.copyfile(path, made.root / f"{name}.safetensors")
    state = load_file(made.root / "small.safetensors")
    save_file(state | {HEAD_BIAS: state[HEAD_BIAS] + np.float32(0.125)}, made.root / "tuned.safetensors")
    return made


@pytest.fixture(scope="module")
def small(farm: Farm) -> Path:
    result = farm.build("small", 64, "--target", "rtx-sm89")
    assert result.returncode == 0, result.stderr
    assert all(f"engine `{network}.fp32.rtx1.7-sm89`: done in" in result.stderr for network in NETWORKS)
    return farm.root / "small"


def records(bundle: Path) -> dict[str, Any]:
    return {record["network"]: record for record in json.loads((bundle / "bundle.json").read_bytes())["engines"]}


def test_a_build_holds_an_engine_of_every_network(small: Path) -> None:
    bundle = open_bundle(small)
    verify_files(bundle, lambda done: None)
    found = bundle.manifest.engines
    assert {record.network for record in found} == set(NETWORKS)
    assert {(record.plan, record.target) for record in found} == {("fp32", "rtx1.7-sm89")}
    assert all(record.library_version.startswith("1.7.") for record in found)
    image = next(part for part in records(small)["stem"]["profiles"][0]["inputs"] if part["name"] == "image")
    assert (image["min"], image["opt"], image["max"]) == ([1, 3, 64, 64], [1, 3, 128, 128], [1, 3, 512, 512])
    told = run_cli("inspect", small)
    assert "rtx1.7-sm89" in told.stdout


def test_an_unchanged_build_does_nothing(farm: Farm, small: Path) -> None:
    before = snapshot(farm.root)
    again = farm.build("small", 64, "--target", "rtx-sm89")
    assert again.returncode == 0, again.stderr
    assert "is up to date: nothing to do" in again.stderr
    assert "engine `" not in again.stderr
    assert snapshot(farm.root) == before


def test_an_adapter_of_another_patch_finds_the_trunk_built(farm: Farm, small: Path) -> None:
    result = farm.build("large", 128, "--target", "rtx-sm89")
    assert result.returncode == 0, result.stderr
    built = {network for network in NETWORKS if f"engine `{network}.fp32" in result.stderr}
    assert built.isdisjoint({"trunk", "tail", "caption"}), "tokens are tokens, whatever the patch"
    assert {"stem", "head"} <= built
    assert records(farm.root / "large")["trunk"]["engine"] == records(small)["trunk"]["engine"]


def test_a_changed_head_is_one_engine(farm: Farm, small: Path) -> None:
    result = farm.build("tuned", 64, "--target", "rtx-sm89", "--json")
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    assert [label for label in facts["made"] if label.startswith("engine ")] == ["engine head.fp32.rtx1.7-sm89"]
    assert facts["targets"] == ["rtx1.7-sm89"]
    assert facts["engines"] == len(NETWORKS)


def test_a_size_that_is_not_square_and_two_profiles_in_one_engine(farm: Farm, small: Path) -> None:
    wide, tall = farm.root / "wide.toml", farm.root / "tall.toml"
    for path, height, width in ((wide, 128, 256), (tall, 512, 192)):
        path.write_text(
            f"patch_px = 64\nheight_px = {{ min = 64, opt = {height}, max = {height} }}\n"
            f"width_px = {{ min = 64, opt = {width}, max = {width} }}\n"
            "sampling = { steps = 2, guidance = 1.0, shift = 3.0 }\n"
        )
    out = farm.root / "both"
    shutil.copyfile(farm.root / "small.safetensors", farm.root / "both.safetensors")
    result = farm.build("both", 64, "--target", "rtx-sm120", "--profile", tall, profile=wide)
    assert result.returncode == 0, result.stderr
    profiles = records(out)["stem"]["profiles"]
    images = [next(part["max"] for part in profile["inputs"] if part["name"] == "image") for profile in profiles]
    assert images == [[1, 3, 128, 256], [1, 3, 512, 192]]


def test_verify_says_what_it_did_not_run(small: Path) -> None:
    result = run_cli("verify", small, "--json")
    assert result.returncode == 0, result.stderr
    entries = [e for e in json.loads(result.stdout)["ledger"] if e["comparison"]["subject"] == "engine"]
    assert {(entry["network"], entry["case"]) for entry in entries} >= {(network, "outputs") for network in NETWORKS}
    assert {entry["status"] for entry in entries} == {"not run"}


def test_a_pack_for_a_target_has_engines_and_no_graphs(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    result = run_cli("pack", small, "--target", "RTX-sm89", "--out", out, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["targets"] == ["rtx1.7-sm89"]
    assert sorted(path.name for path in out.iterdir() if path.name != ".build.lock") == [
        "bundle.json",
        "engines",
        "reference",
    ]
    embeddings = tmp_path / "e.npy"
    np.save(embeddings, np.zeros((3, 40), np.float32))
    command = ("generate", out, "--embeddings", embeddings, "--size", "64x64", "--out", tmp_path / "x.png")
    refuse(run_cli(*command, "--backend", "onnx"), 4, "has no graph of", "packed for rtx1.7-sm89")
    assert run_cli(*command).returncode in {3, 4}
    refuse(run_cli("pack", out, "--target", "onnx-cpu", "--out", tmp_path / "y"), 2, "packed for engines")
    refuse(run_cli("pack", small, "--target", "rtx-sm120", "--out", tmp_path / "y"), 2, "rtx1.7-sm89")
    again = run_cli("pack", out, "--out", tmp_path / "copy", "--json")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "copy" / "bundle.json").read_bytes() == (out / "bundle.json").read_bytes()


@pytest.mark.parametrize(
    ("options", "code", "needles"),
    [
        (("--target", "rtx-sm90"), 2, ("does not build for", "sm90", "sm89")),
        (("--target", "sm89"), 2, ("no target 'sm89'", "rtx-{sm75")),
        (("--target", ""), 2, ("names no target",)),
        (("--target", "rtx-sm75", "--precision", "bf16"), 2, ("does not compute in BF16",)),
        (
            ("--target", "rtx-sm75"),
            2,
            ("rtx1.7-sm75 has no matrix products in FP32", "plan `fp32`", "--precision fp16"),
        ),
        (("--target", "rtx-sm75", "--dry-run"), 2, ("no matrix products in FP32", "--backend onnx-cuda")),
        (("--target", "rtx-sm89,rtx-sm75", "--precision", "fp16", "--precision", "fp32"), 2, ("sm75", "plan `fp32`")),
        (("--target", "this"), 3, ("no NVIDIA driver or no GPU",)),
        (("--backend", "tensorrt"), 3, ("no NVIDIA driver or no GPU",)),
        (("--backend", "tensorrt", "--target", "tensorrt-sm90"), 3, ("TensorRT is not installed", "pip install")),
        (("--backend", "onnx", "--target", "rtx-sm89"), 2, ("but no engine is built",)),
        (("--weight-streaming",), 2, ("but no engine is built", "--target")),
        (("--backend", "tensorrt", "--target", "rtx-sm89"), 2, ("does not build for rtx1.7-sm89",)),
        (("--target", "rtx-sm89", "--version-compatible"), 2, ("no engine that runs on other versions",)),
        (("--target", "portable", "--hardware-compatible"), 2, ("no hardware compatibility levels",)),
        (("--target", "rtx-sm89", "--head-memory", "1KiB"), 2, ("raise --head-memory",)),
        (("--target", "rtx-sm89", "--workspace", "lots"), 2, ("is no size in bytes",)),
        (("--target", "rtx-sm89", "--optimization-level", "6"), 2, ("6",)),
    ],
)
def test_what_cannot_be_built_is_refused_before_any_work(
    options: tuple[str, ...], code: int, needles: tuple[str, ...], farm: Farm, tmp_path: Path
) -> None:
    command = ("build", farm.root / "small.safetensors", "--profile", farm.root / "p64.toml", "--out", tmp_path / "out")
    refuse(run_cli(*command, *options), code, *needles)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_names_the_targets(farm: Farm, tmp_path: Path) -> None:
    command = ("build", farm.root / "small.safetensors", "--profile", farm.root / "p64.toml", "--out", tmp_path / "x")
    result = run_cli(*command, "--target", "rtx-sm120,portable", "--dry-run", "--json")
    assert json.loads(result.stdout)["targets"] == ["rtx1.7-sm120", "rtx1.7-portable"]
    assert "engines for rtx1.7-sm120" in run_cli(*command, "--target", "rtx-sm120", "--dry-run").stdout
    assert run_cli(*command, "--target", "rtx-sm75", "--precision", "fp16", "--dry-run").returncode == 0


@pytest.mark.parametrize("damage", ["graph", "network", "target", "inputs", "path"])
def test_a_bundle_whose_engines_do_not_belong_is_refused(small: Path, damage: str) -> None:
    data = json.loads((small / "bundle.json").read_bytes())
    record = data["engines"][0]
    record |= {
        "graph": {"graph_sha256": "0" * 64},
        "network": {"network": "vae"},
        "target": {"target": "rtx1.7-sm90"},
        "inputs": {"profiles": [{"inputs": []}]},
        "path": {"engine": "../../etc/passwd"},
    }[damage]
    with pytest.raises(ArtifactError):
        manifest_from_bytes(json.dumps(data).encode())


def test_a_manifest_with_engines_reads_back_as_it_was_written(small: Path) -> None:
    data = (small / "bundle.json").read_bytes()
    assert manifest_to_bytes(manifest_from_bytes(data)) == data
