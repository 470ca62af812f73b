"""FP8 by the command line: a sweep and its plan, a build, what it tells of a layer, and what is refused."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from conftest import run_cli, write_profile
from golden import tiny_checkpoint
from l2p_calib.plans.file import read_plan
from l2p_calib.plans.plan import FLOAT8, PLANS
from l2p_calib.statistics.ranges import CALLS_MIN, Statistics
from l2p_engines.builders.builder import build_engine
from l2p_engines.builders.engines import EngineOptions
from l2p_engines.builders.request import EngineRequest, EngineSpec
from l2p_engines.builders.shapes import engine_profiles
from l2p_engines.builders.trt import library_version
from l2p_export.build.bundle import Built, build, check_build
from l2p_export.checkpoint.loading import load_model
from l2p_export.graphs.stored import bundle_digests
from l2p_export.precision import sweep as sensitivity
from l2p_export.precision.calibrate import calibrate, check_calibration
from l2p_export.precision.explain import explain
from l2p_export.precision.plans import PrecisionRequest, _given
from l2p_export.precision.sweep import NAME
from l2p_runtime import Pipeline
from l2p_runtime.bundle import open_bundle
from l2p_runtime.contract import Target
from l2p_runtime.contract.codec import from_json
from l2p_runtime.errors import ArtifactError, UsageError
from l2p_runtime.progress import Silent
from l2p_runtime.tensorfile import open_tensorfile, write_tensorfile

if TYPE_CHECKING:
    from conftest import Bundles

pytestmark = pytest.mark.usefixtures("one_thread")

# Random weights draw with the head above all: all products in FP8 make 2e-3 of the prediction.
GATE = 0.0014
SAMPLES = ("--samples", "1", "--size", "32x32")
LAYER = "layers.2.feed_forward.w2"
ATTENTION = "layers.2.attention"
INPUTS = [f"{ATTENTION}.{name}" for name in ("query", "key", "value")]
SWEPT = "fp8-attention"
PLAN = "fp8-trunk"


@dataclass
class SweepResult:
    """A calibration with a sweep: its files and what it printed."""

    statistics: Path
    folder: Path
    printed: Any


@pytest.fixture(scope="module")
def swept(bundles: Bundles, tmp_path_factory: pytest.TempPathFactory) -> SweepResult:
    root = tmp_path_factory.mktemp("swept")
    statistics, folder = root / "statistics.json", root / "sweep"
    stamps = stop_after_five_groups(bundles, statistics, folder)
    command = ("calibrate", bundles.path("tiny-16"), *SAMPLES, "--out", statistics, "--sensitivity", folder)
    result = run_cli(*command, "--precision", SWEPT, "--gate", str(GATE), "--json")
    assert result.returncode == 0, result.stderr
    assert not (root / "statistics.json.work").exists()
    # It went on where it was stopped.
    assert len(stamps) == 5
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    return SweepResult(statistics, folder, json.loads(result.stdout))


def stop_after_five_groups(bundles: Bundles, statistics: Path, folder: Path) -> dict[Path, int]:
    """A sweep that somebody stops: the files that it leaves, with the time of each."""
    plan = check_calibration(open_bundle(bundles.path("tiny-16")), statistics, samples=1, sizes=[(32, 32)])
    measure, asked = sensitivity._Sweeper.measure, []

    def stopped(self: Any, layers: Any) -> Any:
        asked.append(layers)
        if len(asked) > 5:
            raise KeyboardInterrupt
        return measure(self, layers)

    def sweep(samples: Path, found: Statistics) -> None:
        sensitivity.sweep_bundle(plan, samples, found, folder, GATE, Silent(), SWEPT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sensitivity._Sweeper, "measure", stopped)
        with pytest.raises(KeyboardInterrupt):
            calibrate(plan, Silent(), sweep)
    return {path: path.stat().st_mtime_ns for path in (folder / "measurements").iterdir()}


@pytest.fixture(scope="module")
def built(bundles: Bundles, swept: SweepResult, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A bundle with the trunk in FP8; tracing takes seconds a network, and the others are traced for fp16 already."""
    out = tmp_path_factory.mktemp("float8") / "bundle"
    data = json.loads((swept.folder / f"{NAME}.json").read_text()) | {"name": PLAN}
    trunk = tuple(
        f"layers.{index}." for index in range(*open_bundle(bundles.path("tiny-16")).manifest.model.trunk_layers)
    )
    for entry in data["layers"]:
        if not entry["layer"].startswith(trunk):
            entry.update({"dtype": entry["dtype"].replace(FLOAT8, "float16"), "float8": None})
    path = out.with_suffix(".json")
    path.write_text(json.dumps(data))
    return build_here(bundles, out, plan_files=(path,))


def build_here(bundles: Bundles, out: Path, *precisions: str, checkpoint: Path | None = None, **more: Any) -> Built:
    """A build in this process, which finds traces of what is not in FP8 in the session's store."""
    profile = write_profile(out.with_suffix(".toml"), 16)
    checkpoint = checkpoint or bundles.checkpoint("tiny-16")
    with check_build(checkpoint, (str(profile),), precisions, out, store=bundles.store, **more) as plan:
        return build(plan, Silent())


def test_the_sweep_ranks_groups_and_keeps_the_worst(swept: SweepResult) -> None:
    found = json.loads((swept.folder / "sensitivity.json").read_text())
    # Ten blocks of five groups, attention among them.
    assert len(found["groups"]) == 50
    assert sum(item["group"].endswith(" attention") for item in found["groups"]) == 10
    errors = [item["deviation"]["error"] for item in found["groups"]]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] > 0
    assert [item["is_kept"] for item in found["groups"]] == [index < found["kept"] for index in range(50)]
    steps = {step["kept"]: step["deviation"]["error"] for step in found["steps"]}
    assert steps[found["kept"]] <= GATE
    assert 0 < found["kept"] < 50
    assert steps[found["kept"] - 1] > GATE
    told = swept.printed["sensitivity"]
    assert told["kept"] == [item["group"] for item in found["groups"][: found["kept"]]]
    assert (told["error"], told["gate"], told["groups"]) == (steps[found["kept"]], GATE, 50)
    assert all(0 < item["deviation"]["image_psnr_db"] < 999 for item in found["groups"])
    with (swept.folder / "sensitivity.csv").open(newline="") as file:
        assert [row["group"] for row in csv.DictReader(file)] == [item["group"] for item in found["groups"]]
    assert (swept.folder / "sensitivity.png").read_bytes()[:4] == b"\x89PNG"


def test_the_plan_of_a_sweep_keeps_what_it_says(swept: SweepResult) -> None:
    plan = read_plan(swept.folder / f"{NAME}.json")
    kept = {layer for item in json.loads((swept.folder / "sensitivity.json").read_text())["groups"] if item["is_kept"]
            for layer in item["layers"]}  # fmt: skip
    layers = {entry.layer: entry for entry in plan.layers}
    assert {name for name, entry in layers.items() if "kept in float16" in entry.reason} == kept
    assert all(layers[name].dtype == "float16" for name in kept)
    eighths = {name for name, entry in layers.items() if entry.dtype == FLOAT8}
    # Seven products and three inputs of attention in each of ten blocks.
    assert len(eighths) + len(kept) == 100
    assert not any(0 < sum(f"{name}.{part}" in kept for part in ("query", "key", "value")) < 3
                   for name in {name.rpartition(".")[0] for name in kept})  # fmt: skip
    assert "in FP8 makes an error of 0.0" in layers[min(kept)].reason
    assert f"{GATE:g} is allowed" in layers[min(kept)].reason


def test_every_measurement_is_kept(swept: SweepResult) -> None:
    steps = json.loads((swept.folder / "sensitivity.json").read_text())["steps"]
    # The last of the ranking alone is measured already, should it come to that.
    assert len(list((swept.folder / "measurements").iterdir())) in (50 + len(steps), 49 + len(steps))
    names = ("sensitivity.json", "sensitivity.csv", f"{NAME}.json", "sensitivity.png")
    assert swept.printed["sensitivity"]["files"] == [str(swept.folder / name) for name in names]


def test_a_bundle_in_fp8(bundles: Bundles, built: Built) -> None:
    manifest = built.bundle.manifest
    # What has no products in FP8 was traced for fp16.
    assert {label for label in built.made if label.startswith("trace")} <= {f"trace trunk.{PLAN}"}
    check_ledger(built, PLAN, ("trunk",))
    weights = open_tensorfile(built.bundle.path(manifest.graph("trunk", PLAN).weights))
    assert {info.dtype for info in weights.tensors.values()} == {"F8_E4M3", "F16"}
    plan = read_plan(built.bundle.path(manifest.plan(PLAN).file or ""))
    rounded = {entry.layer for entry in plan.layers if entry.dtype == FLOAT8 and entry.layer.endswith(".query")}
    assert rounded
    assert {name.removesuffix(":out/scale") for name in weights.tensors if ".query" in name} == rounded
    pictures = [draw(bundles.path("tiny-16"), "fp32"), draw(built.bundle.root, PLAN, bundles.store)]
    assert pictures[0].std() > 20
    # Of 255; the head of random weights draws most of it.
    assert np.abs(pictures[1] - pictures[0]).max() <= 8


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layers"), [("fp8", 70), ("fp8-attention", 100)])
def test_every_product_in_fp8(bundles: Bundles, tmp_path: Path, name: str, layers: int) -> None:
    built = build_here(bundles, tmp_path / "bundle", name)
    check_ledger(built, name, ("caption", "stem", "trunk", "tail"))
    plan = read_plan(built.bundle.path(built.bundle.manifest.plan(name).file or ""))
    assert sum(entry.dtype == FLOAT8 for entry in plan.layers) == layers
    checked = run_cli("verify", built.bundle.root, "--store", bundles.store, "--json")
    assert checked.returncode == 0, checked.stderr


def check_ledger(built: Built, plan: str, rounded: tuple[str, ...]) -> None:
    """Everything passed, by thresholds of its own, and what is in FP8 is not a copy of the float16 graph."""
    stage = f"torch float32 -> {plan} graph"
    entries = {(e.network, e.case): e for e in built.bundle.manifest.ledger if str(e.comparison) == stage}
    assert {entry.status for entry in entries.values()} == {"passed"}
    assert (entries["trunk", "padded"].threshold, entries["end-to-end", "padded"].threshold) == (0.2, 0.1)
    assert entries["head", "padded"].threshold == entries["stem.modulation", "padded"].threshold == 0.02
    assert "FP8" in entries["trunk", "padded"].reason
    assert all((entries[name, "padded"].relative or 0) > 0.005 for name in rounded)


def test_an_engine_for_ada_is_compiled_from_it(built: Built, tmp_path: Path) -> None:
    manifest = built.bundle.manifest
    record, spec = manifest.graph("trunk", PLAN), manifest.network("trunk")
    shapes = engine_profiles(spec, manifest.model, manifest.profiles)
    target = Target("rtx", library_version("rtx"), "sm89")
    wanted = EngineSpec(spec, PLAN, target, shapes, ("float16", FLOAT8))
    weights = built.bundle.path(record.weights)
    made = build_engine(EngineRequest(wanted, built.bundle.path(record.graph), weights.stat().st_size), tmp_path / "e")
    assert made.size_bytes > weights.stat().st_size


def test_what_is_told_of_a_layer(bundles: Bundles, built: Built, swept: SweepResult) -> None:
    plan = read_plan(built.bundle.path(built.bundle.manifest.plan(PLAN).file or ""))
    rounded = next(e.layer for e in plan.layers if e.dtype == FLOAT8 and e.layer.endswith("w2"))
    (found,) = explain(built.bundle.root, rounded, bundles.store)
    assert (found.plan, found.dtype, found.exponent) == (PLAN, FLOAT8, 0)
    assert found.float8 is not None
    assert f"{rounded}:in by {found.float8.method} with an error of" in found.reason
    result = run_cli("calibrate", swept.folder / f"{NAME}.json", "--explain", LAYER)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"{NAME}: {LAYER} in float")
    assert f"  {LAYER}:in: largest " in result.stdout
    whole = explain(bundles.path("tiny-16"), LAYER)
    assert [(item.plan, item.dtype) for item in whole] == [("fp32", "float32"), ("fp16", "float16")]
    wrong = run_cli("calibrate", bundles.path("tiny-16"), "--explain", "layers.2.feedforward.w2", "--json")
    assert wrong.returncode == 2
    assert f"did you mean `{LAYER}`" in wrong.stderr
    inputs = explain(swept.folder / f"{NAME}.json", ATTENTION)
    assert [item.layer for item in inputs] == INPUTS
    assert explain(swept.folder / f"{NAME}.json", INPUTS[1]) == (inputs[1],)
    # A plan that does not list it.
    alone = explain(bundles.path("tiny-16"), ATTENTION)
    assert [(item.plan, item.layer, item.dtype) for item in alone] == [
        ("fp32", ATTENTION, "float32"),
        ("fp16", ATTENTION, "float16"),
    ]
    with pytest.raises(UsageError, match=r"knows no layer `layers\.99\.attention`"):
        explain(bundles.path("tiny-16"), "layers.99.attention")
    missing = run_cli("calibrate", bundles.path("tiny-16"))
    assert (missing.returncode, "--out is missing" in missing.stderr) == (2, True)


def test_a_sweep_of_what_has_no_fp8(bundles: Bundles, tmp_path: Path) -> None:
    wrong = run_cli("calibrate", bundles.path("tiny-16"), "--out", tmp_path / "s.json", "--precision", "fp16")
    assert wrong.returncode == 2
    assert "'fp16' is not one of 'fp8', 'fp8-attention'" in wrong.stderr


def test_statistics_of_an_earlier_version(bundles: Bundles, swept: SweepResult) -> None:
    """They lack query, key and value; a plan that does not quantize these still takes them."""
    loaded = load_model(bundles.checkpoint("tiny-16"))
    digests = bundle_digests(open_bundle(bundles.path("tiny-16")), Silent())
    data = json.loads(swept.statistics.read_text())
    for item in data["networks"]:
        item["points"] = [point for point in item["points"] if not point["point"].endswith((".query:out", ".key:out"))]
        for point in item["points"]:
            point["ranges"]["calls"] = CALLS_MIN
    older = from_json(Statistics, data)
    for name in ("fp16", "fp8"):
        assert set(_given(PrecisionRequest((PLANS[name],), (), older), loaded.model, digests)) == set(digests)
    with pytest.raises(ArtifactError, match=r"do not match its layers: .*attention\.key:out"):
        _given(PrecisionRequest((PLANS["fp8-attention"],), (), older), loaded.model, digests)


def test_what_is_refused(bundles: Bundles, built: Built, swept: SweepResult, tmp_path: Path) -> None:
    whole = json.loads((swept.folder / f"{NAME}.json").read_text())
    out = tmp_path / "x"

    def edited(number: int, old: str, **changes: Any) -> dict[str, Any]:
        """The plan with one layer changed, or renamed."""
        data = json.loads(json.dumps(whole))
        entry = next(entry for entry in data["layers"] if entry["layer"] == old)
        entry.update(changes)
        path = tmp_path / f"edited{number}.json"
        path.write_text(json.dumps(data))
        return {"plan_files": (path,)}

    float8 = {"input_scale": 0.01, "method": "by hand", "choices": []}
    for arguments, needle in (
        (edited(1, LAYER, layer="layers.2.feed_forward.w4"), r"speaks of `layers\.2\.feed_forward\.w4`"),
        (edited(2, "layers.2.ffn_norm2", dtype=FLOAT8, float8=float8), r"has `layers\.2\.ffn_norm2` in float8_e4m3fn"),
        (edited(3, LAYER, dtype=FLOAT8, float8=float8 | {"input_scale": 0.0}), "input_scale is 0"),
        (edited(4, INPUTS[0], layer="layers.2.attention.querry"), r"speaks of `layers\.2\.attention\.querry`"),
        (edited(5, INPUTS[0], dtype="float32", float8=None), "attention computes in float16"),
    ):
        with pytest.raises(ArtifactError, match=needle):
            build_here(bundles, out, **arguments)
    plan = {"plan_files": (swept.folder / f"{NAME}.json",)}
    options = EngineOptions((Target("rtx", "1.7", "sm86"),))
    for asked in ({"precisions": ("fp8",)}, plan):
        with pytest.raises(UsageError, match=r"target rtx1\.7-sm86 does not compute in FP8; .* sm89"):
            build_here(bundles, out, *asked.get("precisions", ()), engines=options, **(plan if asked is plan else {}))
    other = write_other(tmp_path / "other.safetensors")
    with pytest.raises(ArtifactError, match=f"plan `{NAME}` was made for trunk"):
        build_here(bundles, out, checkpoint=other, **plan)
    with pytest.raises(ArtifactError, match="the statistics are of other networks"):
        build_here(bundles, out, "fp8", checkpoint=other, statistics=(trunk_alone(swept.statistics, tmp_path),))
    assert not (out / "bundle.json").exists()
    with pytest.raises(ArtifactError, match="has no fp32 graphs"):
        check_calibration(open_bundle(built.bundle.root, bundles.store), tmp_path / "s.json")


def write_other(path: Path) -> Path:
    """The same checkpoint with one weight of the trunk changed."""
    state = {name: np.array(value) for name, value in tiny_checkpoint.checkpoint(16).items()}
    state[f"{LAYER}.weight"] = state[f"{LAYER}.weight"] * np.float32(1.5)
    write_tensorfile(path, state)
    return path


def trunk_alone(statistics: Path, folder: Path) -> Path:
    data = json.loads(statistics.read_text())
    data["networks"] = [item for item in data["networks"] if item["network"] == "trunk"]
    path = folder / "trunk.json"
    path.write_text(json.dumps(data))
    return path


def draw(bundle: Path, plan: str, store: Path | None = None) -> Any:
    embeds = np.random.default_rng(0).standard_normal((9, 40)).astype(np.float32)
    with Pipeline.open(bundle, "onnx", plan=plan, store=store) as pipe:
        return pipe.generate(prompt_embeds=embeds, height=32, width=48, seed=1).astype(int)
