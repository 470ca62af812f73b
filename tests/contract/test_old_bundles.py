"""Bundles of older schemas: 3 had no fused graphs; 2 also gave the trained grid one side; 1 also had texts for
comparisons and for plans' bases."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from conftest import Bundles
from l2p_export.proof.verify import verify_bundle
from l2p_runtime.bundle import open_bundle
from l2p_runtime.contract import manifest_from_bytes
from l2p_runtime.contract.codec import from_json
from l2p_runtime.contract.ledger import Comparison
from l2p_runtime.errors import ArtifactError
from l2p_runtime.progress import Silent


@pytest.fixture
def old(bundles: Bundles, tmp_path: Path) -> Path:
    """A bundle as schema 1 held it."""
    shutil.copytree(bundles.path("tiny-16"), tmp_path / "old", copy_function=shutil.copyfile)
    path = tmp_path / "old" / "bundle.json"
    data = json.loads(path.read_bytes())
    data["schema"] = 1
    take_fused(data)
    give_one_side(data)
    for plan in data["plans"]:
        del plan["base"]
    for entry in data["ledger"]:
        entry["stage"] = str(from_json(Comparison, entry.pop("comparison")))
    path.write_text(json.dumps(data))
    return tmp_path / "old"


def take_fused(data: dict[str, Any]) -> None:
    """Files may lie beside those that a bundle lists."""
    data["files"] = [file for file in data["files"] if not file["path"].endswith(".cpu.onnx")]
    data["ledger"] = [entry for entry in data["ledger"] if entry["comparison"]["subject"] != "fused graph"]
    for record in data["graphs"]:
        del record["fused"]


def give_one_side(data: dict[str, Any]) -> None:
    rotary = data["model"]["rotary"]
    rotary["base_grid"] = rotary["base_grid"][0]
    del data["base_grid"]


def test_schema_3_had_no_fused_graphs(bundles: Bundles) -> None:
    data = json.loads((bundles.path("tiny-16") / "bundle.json").read_bytes())
    take_fused(data)
    manifest = manifest_from_bytes(json.dumps(data | {"schema": 3}).encode())
    assert {record.fused for record in manifest.graphs} == {None}


@pytest.mark.parametrize("grid", [64, 32])
def test_schema_2_gave_the_trained_grid_one_side(bundles: Bundles, grid: int) -> None:
    data = json.loads((bundles.path("tiny-16") / "bundle.json").read_bytes())
    give_one_side(data)
    data |= {"schema": 2}
    data["model"]["rotary"]["base_grid"] = grid
    manifest = manifest_from_bytes(json.dumps(data).encode())
    assert manifest.model.rotary.base_grid == (grid, grid)
    assert manifest.base_grid is None


@pytest.mark.parametrize("grid", [None, [64], {}, "64", True, 0, 2**40])
def test_a_grid_that_is_none(bundles: Bundles, grid: object) -> None:
    data = json.loads((bundles.path("tiny-16") / "bundle.json").read_bytes())
    give_one_side(data)
    data |= {"schema": 2}
    data["model"]["rotary"]["base_grid"] = grid
    with pytest.raises(ArtifactError):
        manifest_from_bytes(json.dumps(data).encode())


def edit(bundle: Path, key: str, change: Any) -> None:
    data = json.loads((bundle / "bundle.json").read_bytes())
    data[key] = change(data[key])
    (bundle / "bundle.json").write_text(json.dumps(data))


def test_an_old_bundle_opens_and_verifies(old: Path, bundles: Bundles) -> None:
    opened, new = open_bundle(old), open_bundle(bundles.path("tiny-16"))
    data = json.loads((new.root / "bundle.json").read_bytes())
    take_fused(data)
    assert opened.manifest == manifest_from_bytes(json.dumps(data).encode())
    assert opened.digest != new.digest
    assert {entry.status for entry in verify_bundle(opened, "onnx", "fp32", Silent())} <= {"passed", "not run"}


def test_a_plan_that_follows_no_base(old: Path) -> None:
    edit(old, "plans", lambda plans: [{**plans[0], "name": "mine"}, *plans[1:]])
    with pytest.raises(ArtifactError, match="lacks base"):
        open_bundle(old)


@pytest.mark.parametrize(
    "change", [lambda ledger: [{**ledger[0], "stage": "a -> b"}], lambda ledger: {}, lambda ledger: [7]]
)
def test_a_ledger_that_is_none(old: Path, change: Any) -> None:
    edit(old, "ledger", change)
    with pytest.raises(ArtifactError):
        open_bundle(old)
