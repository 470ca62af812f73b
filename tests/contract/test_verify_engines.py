"""`verify` on engines, over fakes of the driver and of the library: what it runs, reads, loads and lists."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from conftest import Bundles
from fakes.cuda import fake_device, fake_driver
from fakes.engine_bundles import add_engines
from fakes.tensorrt_runtime import FakeLibrary
from l2p_calib.ledger import require_passed
from l2p_export.cli.verify import command
from l2p_export.proof.engine_layers import CASE as LAYER_PRECISION
from l2p_export.proof.verify import verify_bundle
from l2p_runtime.backends import cuda
from l2p_runtime.bundle import open_bundle
from l2p_runtime.contract import NETWORKS, BasePrecision, LedgerEntry, build_comparison, engine_comparison
from l2p_runtime.contract.codec import to_json
from l2p_runtime.errors import ParityError
from l2p_runtime.progress import Silent

TENSORRT_VERSION = "11.0.2.1"
TENSORRT = "tensorrt11.0-sm89"
BASES: dict[str, BasePrecision] = {"fp32": "fp32", "fp16": "fp16"}
FLOAT32, FLOAT16 = "Row major linear FP32 format", "Row major linear FP16 format"


@pytest.fixture
def bundle(bundles: Bundles, tmp_path: Path) -> Path:
    """A copy of tiny-16, whose profile takes 16 to 128 px; it stores 32x48, 64x128 and 16x16."""
    return Path(shutil.copytree(bundles.path("tiny-16"), tmp_path / "bundle"))


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> dict[str, FakeLibrary]:
    """Both libraries on one GPU."""
    device = fake_device()
    monkeypatch.setattr(cuda, "open_cuda", lambda index, install: device)
    made = {"rtx": FakeLibrary(fake_driver(device)), "tensorrt": FakeLibrary(fake_driver(device), TENSORRT_VERSION)}
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", made["rtx"])
    monkeypatch.setitem(sys.modules, "tensorrt", made["tensorrt"])
    return made


def verified(bundle: Path, backend: str) -> list[LedgerEntry]:
    return verify_bundle(open_bundle(bundle), backend, None, Silent())


def precisions(ledger: list[LedgerEntry]) -> dict[str, LedgerEntry]:
    """Network to the entry on its layers; one each."""
    found = [entry for entry in ledger if entry.case == LAYER_PRECISION]
    assert len({entry.network for entry in found}) == len(found)
    return {entry.network: entry for entry in found}


def edit(bundle: Path, change: Callable[[Any], object]) -> None:
    data = json.loads((bundle / "bundle.json").read_text())
    change(data)
    (bundle / "bundle.json").write_text(json.dumps(data))


def test_layers_of_the_plans_dtype_pass(libraries: dict[str, FakeLibrary], bundle: Path) -> None:
    add_engines(bundle, "fp16", layers=[[FLOAT16], [FLOAT16, "Int64"], [FLOAT32]])
    ledger = verified(bundle, "rtx")
    require_passed(ledger, BASES)
    found = precisions(ledger)
    assert found.keys() == set(NETWORKS)
    assert {str(entry.comparison) for entry in found.values()} == {"fp16 graph -> rtx1.7-sm89 engine"}
    assert {(entry.status, entry.reason) for entry in found.values()} == {
        ("passed", "layers output float16 in 2, float32 in 1, int64 in 1")
    }


@pytest.mark.parametrize("facts", [{}, {"detailed": False}, {"layers": [[FLOAT32]] * 20}])
def test_fused_regions_are_no_failure(libraries: dict[str, FakeLibrary], bundle: Path, facts: dict[str, Any]) -> None:
    add_engines(bundle, "fp16", **facts)
    ledger = verified(bundle, "rtx")
    require_passed(ledger, BASES)
    assert {entry.status for entry in precisions(ledger).values()} == {"not run"}


def test_an_inspector_that_says_nothing_is_no_failure(libraries: dict[str, FakeLibrary], bundle: Path) -> None:
    add_engines(bundle, "fp16", layers=[[FLOAT16]])
    libraries["rtx"].fail("create_engine_inspector", None)
    found = precisions(verified(bundle, "rtx"))
    assert {(entry.status, entry.reason) for entry in found.values()} == {
        ("not run", "the library tells no layer's precision: 0 of 0 tell nothing")
    }


def test_a_silent_fallback_to_float32_fails(libraries: dict[str, FakeLibrary], bundle: Path) -> None:
    add_engines(bundle, "fp16", target=TENSORRT, version=TENSORRT_VERSION, layers=[[FLOAT32]] * 12)
    ledger = verified(bundle, "tensorrt")
    with pytest.raises(ParityError, match=r"trunk in fp16 graph -> tensorrt11\.0-sm89 engine on layer precision"):
        require_passed(ledger, BASES)
    assert {entry.status for entry in precisions(ledger).values()} == {"failed"}
    # Results are right all the same: only the layers tell.
    assert {entry.status for entry in ledger if entry.relative is not None} == {"passed"}
    result = CliRunner().invoke(command, [str(bundle), "--backend", "tensorrt", "--quiet"])
    assert isinstance(result.exception, ParityError)
    assert "failed: no layer outputs float16, as the plan says: layers output float32 in 12" in result.stdout


def test_the_table_says_what_layers_output(libraries: dict[str, FakeLibrary], bundle: Path) -> None:
    add_engines(bundle, "fp16", layers=[[FLOAT16]])
    result = CliRunner().invoke(command, [str(bundle), "--backend", "rtx", "--quiet"])
    assert result.exception is None
    (line,) = (line for line in result.stdout.splitlines() if LAYER_PRECISION in line and " trunk " in line)
    assert line.split() == [
        *("fp16", "graph", "->", "rtx1.7-sm89", "engine", "layer", "precision", "trunk", "passed:"),
        *("layers", "output", "float16", "in", "1"),
    ]


def test_what_was_compared_is_not_listed_as_left_by_the_build(libraries: dict[str, FakeLibrary], bundle: Path) -> None:
    add_engines(bundle, "fp32")
    other = LedgerEntry(build_comparison("fp32", "rtx1.7-sm120"), "trunk", "outputs", "not run", "no GPU")
    edit(bundle, lambda data: data["ledger"].append(to_json(other)))
    ledger = verified(bundle, "rtx")
    compared = {entry.network for entry in ledger if entry.comparison == engine_comparison("fp32", "rtx1.7-sm89")}
    assert compared >= set(NETWORKS)
    left = {
        (str(entry.comparison), entry.network, entry.case)
        for entry in ledger
        if entry.comparison.baseline == "graph" and entry.comparison.plan == "fp32"
    }
    assert left == {
        *(("fp32 graph -> rtx1.7-sm89 engine", network, "weight bytes") for network in NETWORKS),
        *(("fp32 graph -> rtx1.7-sm89 engine", network, LAYER_PRECISION) for network in NETWORKS),
        (str(other.comparison), "trunk", "outputs"),
    }


def test_portable_engines_are_named_by_what_they_were_built_for(
    libraries: dict[str, FakeLibrary], bundle: Path
) -> None:
    add_engines(bundle, "fp16", target="rtx1.7-portable", layers=[[FLOAT16]])
    ledger = verified(bundle, "rtx")
    assert {str(entry.comparison) for entry in precisions(ledger).values()} == {"fp16 graph -> rtx1.7-portable engine"}
    assert not [entry for entry in ledger if entry.case == "outputs"]


def test_nothing_is_loaded_where_no_case_fits(libraries: dict[str, FakeLibrary], bundle: Path) -> None:
    add_engines(bundle, "fp32")

    def beyond(data: Any) -> None:
        for record in data["engines"]:
            for part in record["profiles"][0]["inputs"]:
                if part["name"] == "image":
                    part["min"] = part["opt"] = part["max"]

    edit(bundle, beyond)
    ledger = verified(bundle, "rtx")
    assert not libraries["rtx"].calls["deserialize_cuda_engine"]
    assert {entry.status for entry in ledger} == {"not run"}
    stage = "torch float32 -> fp32 rtx1.7-sm89 engine"
    refused = {entry.case: entry.reason for entry in ledger if str(entry.comparison) == stage}
    assert refused.keys() == {"padded", "full", "16x16"}
    assert all("do not take" in reason or "no engine of the head takes" in reason for reason in refused.values())
    assert {entry.reason for entry in precisions(ledger).values()} == {
        "no stored case was run on this engine, and it was not opened"
    }
    assert {entry.network for entry in ledger if entry.case == "outputs"} == set(NETWORKS)


def test_each_engine_is_loaded_once(libraries: dict[str, FakeLibrary], bundle: Path) -> None:
    add_engines(bundle, "fp32")
    verified(bundle, "rtx")
    assert libraries["rtx"].calls["deserialize_cuda_engine"] == len(NETWORKS)
    assert not libraries["rtx"].alive["engines"]


def test_a_head_of_few_rows_is_run_by_stripes(libraries: dict[str, FakeLibrary], bundle: Path) -> None:
    add_engines(bundle, "fp32", head_rows=7)
    ledger = verified(bundle, "rtx")
    found = {entry.case: entry.status for entry in ledger if entry.network == "head" and entry.relative is not None}
    assert found == {"padded": "passed", "full": "passed", "16x16": "passed"}
    heads = [name for name in libraries["rtx"].ran if name.startswith("head.")]
    assert len(heads) == 2 * (1 + 8 + 1), "8 rows in stripes of one row and its halo"


def test_a_head_that_cannot_be_cut_so_small_is_listed(libraries: dict[str, FakeLibrary], bundle: Path) -> None:
    add_engines(bundle, "fp32")

    def shorten(data: Any) -> None:
        (head,) = (record for record in data["engines"] if record["network"] == "head")
        for part in head["profiles"][0]["inputs"]:
            rows = 5 if part["name"] == "tokens" else 80
            axis = 1 if part["name"] == "tokens" else 2
            part["opt"][axis], part["max"][axis] = min(part["opt"][axis], rows), rows

    edit(bundle, shorten)
    ledger = verified(bundle, "rtx")
    (full,) = (entry for entry in ledger if entry.case == "full" and entry.comparison.target == "rtx1.7-sm89")
    assert (full.status, full.reason) == (
        "not run",
        "the engine of `head` takes 5 token rows at once, too few to cut 8",
    )
    assert {entry.status for entry in ledger if (entry.case, entry.network) == ("padded", "head")} == {"passed"}
