"""`calibrate`, and builds that take what it measured, a plan from a file, or a checkpoint that overflows float16."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest

from conftest import run_cli, write_profile
from fakes.stress import write_stressed
from golden import tiny_checkpoint
from l2p_calib.statistics.onnx_values import count_graph, point_values
from l2p_calib.statistics.ranges import network_statistics, read_statistics
from l2p_calib.statistics.torch_hooks import counting
from l2p_engines.builders.engines import EngineOptions
from l2p_export.build.bundle import Built, build, check_build
from l2p_export.checkpoint.loading import load_model
from l2p_export.graphs.names import published_names
from l2p_export.graphs.stored import bundle_digests, bundle_model
from l2p_export.precision import calibrate as calibration
from l2p_export.precision.plans import network_points
from l2p_export.proof.cases import network_inputs
from l2p_export.proof.reference import run_reference
from l2p_export.proof.stored import read_case
from l2p_runtime import Pipeline
from l2p_runtime.bundle import open_bundle
from l2p_runtime.contract import Target
from l2p_runtime.errors import ArtifactError, ParityError, UsageError
from l2p_runtime.progress import Silent

if TYPE_CHECKING:
    from conftest import Bundles

pytestmark = pytest.mark.usefixtures("one_thread")

STRESSES = ("products of the trunk", "convolution of the head")


@pytest.fixture(scope="module")
def statistics(bundles: Bundles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("calibrate") / "statistics.json"
    result = run_cli("calibrate", bundles.path("tiny-16"), "--samples", 5, "--size", "32x48", "--out", out)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{out}\n"
    assert "captions are noise" in result.stderr
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    return out


def build_here(bundles: Bundles, checkpoint: Path, out: Path, *precisions: str, **more: Any) -> Built:
    """A build in this process, which finds its traces in the session's store."""
    profile = write_profile(out.with_suffix(".toml"), 16)
    with check_build(checkpoint, (str(profile),), precisions, out, store=bundles.store, **more) as plan:
        return build(plan, Silent())


def test_what_was_measured(bundles: Bundles, statistics: Path) -> None:
    found = read_statistics(statistics)
    opened = open_bundle(bundles.path("tiny-16"))
    model = bundle_model(opened)
    assert found.source == "5 calls, 2 captions of noise, 32x48"
    assert {item.network: item.sha256 for item in found.networks} == bundle_digests(opened, Silent())
    for item in found.networks:
        assert [point.point for point in item.points] == sorted(network_points(model, item.network))
        assert item.calls == 5
        assert all(point.ranges.peak > 0 and not point.ranges.non_finite for point in item.points)
    again = run_cli("calibrate", bundles.path("tiny-16"), "--samples", 5, "--size", "32x48", "--out", statistics)
    assert again.returncode == 0
    assert read_statistics(statistics) == found


def test_graphs_and_torch_are_measured_alike(bundles: Bundles, tmp_path: Path) -> None:
    """The same call through hooks on the torch modules and through further outputs of the graphs."""
    opened = open_bundle(bundles.path("tiny-16"))
    loaded = load_model(bundles.checkpoint("tiny-16"))
    case = read_case(opened, opened.manifest.references[0])
    in_torch: dict[str, Any] = {}

    @contextmanager
    def observe(network: str, module: Any) -> Iterator[None]:
        with counting(module, network_points(loaded.model, network)) as counters:
            yield
            in_torch[network] = network_statistics(network, "", counters)

    inputs = {name: value for name, value in case.items() if "." not in name}
    reference = run_reference(loaded, {"case": inputs}, lambda done: None, observe)["case"]
    for network, expected in in_torch.items():
        path = opened.path(opened.manifest.graph(network, "fp32").graph)
        graph = onnx.load(str(path), load_external_data=False).graph
        points = point_values(graph, loaded.model.layout(network), published_names)
        feeds = [lambda network=network: network_inputs(network, reference, reference)]  # type: ignore[misc]
        # In two groups, as where memory is short.
        counters = count_graph(path, points, feeds, 3 << 29, lambda index, made: None, lambda done: None)
        found = network_statistics(network, "", counters)
        for a, b in zip(found.points, expected.points, strict=True):
            assert (a.point, a.ranges.count) == (b.point, b.ranges.count)
            # Float32 sums in another order.
            assert a.ranges.peak == pytest.approx(b.ranges.peak, rel=1e-4), a.point


def test_a_calibration_that_was_stopped_goes_on(bundles: Bundles, statistics: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.json"
    opened = open_bundle(bundles.path("tiny-16"))
    plan = calibration.check_calibration(opened, out, samples=5, sizes=[(48, 32)])
    measure, measured = calibration._measure, []

    def stop_at_the_tail(plan: Any, network: str, *more: Any) -> Any:
        if network == "tail":
            raise KeyboardInterrupt
        measured.append(network)
        return measure(plan, network, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "_measure", stop_at_the_tail)
        with pytest.raises(KeyboardInterrupt):
            calibration.calibrate(plan, Silent())
    work = tmp_path / "s.json.work"
    assert measured == ["caption", "stem", "trunk"]
    stamps = {name: (work / f"{name}.json").stat().st_mtime_ns for name in measured}
    assert not out.exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "_draw", lambda *arguments: None)
        patch.setattr(calibration.shutil, "rmtree", lambda *arguments, **more: None)
        calibration.calibrate(plan, Silent())
    assert {name: (work / f"{name}.json").stat().st_mtime_ns for name in measured} == stamps
    assert out.read_bytes() == statistics.read_bytes()


def test_what_calibrate_refuses(bundles: Bundles, tmp_path: Path) -> None:
    bundle, out = bundles.path("tiny-16"), tmp_path / "s.json"
    (tmp_path / "p.txt").write_text("a cat\n")
    for arguments, code, needle in (
        (("--samples", 0), 2, "--samples is 0"),
        (("--size", "40x16"), 2, "no multiple of 16 pixels"),
        (("--prompts", tmp_path / "p.txt"), 2, "the bundle has no text encoder"),
    ):
        result = run_cli("calibrate", bundle, "--out", out, *arguments)
        assert (result.returncode, needle in result.stderr) == (code, True), result.stderr
    dry = run_cli("calibrate", bundle, "--out", out, "--dry-run")
    assert dry.stdout == f"would measure 16 calls, 4 captions of noise, 16x16, 32x16, and write {out}\n"
    dry = run_cli("calibrate", bundle, "--out", out, "--dry-run", "--json")
    assert json.loads(dry.stdout) == {
        "statistics": str(out),
        "source": "16 calls, 4 captions of noise, 16x16, 32x16",
    }
    assert not out.exists()


def test_a_build_takes_statistics_of_its_own_weights_alone(bundles: Bundles, statistics: Path, tmp_path: Path) -> None:
    checkpoint, out = bundles.checkpoint("tiny-16"), tmp_path / "b"
    built = build_here(bundles, checkpoint, out, "fp16", statistics=(statistics,))
    # Nothing is traced or exported again: the plan says the same of every network.
    assert built.made == ("plan fp16", "proof fp16")
    (entry,) = (e for e in built.bundle.manifest.ledger if (e.case, e.network) == ("ranges", "trunk"))
    # Five calls of the file, and the build's own seven.
    assert "is the most of 12 calls; float16 holds 65504" in entry.reason
    again = build_here(bundles, checkpoint, out, "fp16", statistics=(statistics,))
    assert (again.is_new, again.made) == (False, ())

    other = write_stressed(tmp_path / "other.safetensors", tiny_checkpoint.checkpoint(16), "products of the trunk")
    data = json.loads(statistics.read_text())
    data["networks"] = [item for item in data["networks"] if item["network"] == "trunk"]
    (tmp_path / "trunk.json").write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match="the statistics are of other networks: they hold trunk"):
        build_here(bundles, other, tmp_path / "c", "fp16", statistics=(tmp_path / "trunk.json",))
    data["networks"][0]["points"][0]["ranges"]["calls"] = 3
    (tmp_path / "trunk.json").write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match="come from 3 calls"):
        build_here(bundles, checkpoint, tmp_path / "c", "fp16", statistics=(tmp_path / "trunk.json",))
    assert not (tmp_path / "c").exists()


def test_float16_that_would_be_black(bundles: Bundles, tmp_path: Path) -> None:
    """Plain float16 is refused with exit code 5, fp16 draws what fp32 draws, without being told."""
    checkpoint = write_stressed(tmp_path / "stressed.safetensors", tiny_checkpoint.checkpoint(16), *STRESSES)
    profile = write_profile(tmp_path / "p.toml", 16)
    command = ("build", checkpoint, "--profile", profile, "--precision", "fp16-plain", "--out", tmp_path / "plain")
    plain = run_cli(*command, "--store", bundles.store)
    assert plain.returncode == 5
    assert "plan `fp16-plain` overflows: float16 holds 65504, and in float32 layers." in plain.stderr
    assert "--precision fp16 scales and raises what needs it" in plain.stderr
    assert not (tmp_path / "plain").exists()
    out = tmp_path / "b"
    built = build_here(bundles, checkpoint, out, "fp32", "fp16")
    # The usual scales bring the trunk down, so that its trace is found; the head is another one.
    assert {label for label in built.made if label.startswith("trace")} <= {"trace head.fp16"}
    ref = built.bundle.manifest.plan("fp16")
    whole = json.loads(built.bundle.path(ref.file or "").read_text())
    layers = {entry["layer"]: entry for entry in whole["layers"]}
    assert layers["layers.2.feed_forward.w3"]["exponent"] == -6
    assert layers["local_decoder.up4.1"]["dtype"] == "float32"
    assert "local_decoder.up4.1:out reaches" in layers["local_decoder.up4.1"]["reason"]
    assert layers["local_decoder.up3.1"]["dtype"] == "float16"
    good, *pictures = draw(bundles.path("tiny-16"), "fp32"), draw(out, "fp32"), draw(out, "fp16")
    assert good.std() > 20
    for picture in pictures:
        # Of 255.
        assert np.abs(picture - good).max() <= 3

    packed = run_cli("pack", out, "--plan", "fp16", "--out", tmp_path / "packed")
    assert packed.returncode == 0, packed.stderr
    (plan,) = (tmp_path / "packed" / "plans").iterdir()
    assert json.loads(plan.read_text()) == whole
    check_hand_edited_plans(bundles, checkpoint, whole, tmp_path)


def check_hand_edited_plans(bundles: Bundles, checkpoint: Path, whole: Any, tmp_path: Path) -> None:
    """A bundle's own plan, edited: taken under another name, refused where it would overflow or is another's."""

    def edited(name: str, old: str = "", new: str = "", **layers: Any) -> dict[str, Any]:
        data = json.loads(json.dumps(whole).replace(old, new) if old else json.dumps(whole)) | {"name": name}
        for entry in data["layers"]:
            entry.update(layers.get(entry["layer"].replace(".", "_"), {}))
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(data))
        return {"plan_files": (path,)}

    out = tmp_path / "x"
    worse = edited("fp16-worse", local_decoder_up4_1={"dtype": "float16"})
    with pytest.raises(ParityError, match=r"plan `fp16-worse` overflows: .* in float32 local_decoder\.up4\.1:out"):
        build_here(bundles, checkpoint, out, **worse)
    with pytest.raises(ArtifactError, match="plan `fp16-mine` was made for"):
        build_here(bundles, bundles.checkpoint("tiny-16"), out, **edited("fp16-mine"))
    with pytest.raises(ArtifactError, match=r"speaks of `layers\.2\.feed_forward\.w4`"):
        build_here(
            bundles, checkpoint, out, **edited("fp16-typo", "layers.2.feed_forward.w3", "layers.2.feed_forward.w4")
        )
    with pytest.raises(ArtifactError, match=r"scales `layers\.2\.feed_forward\.w1`, and nothing behind it"):
        build_here(bundles, checkpoint, out, **edited("fp16-w1", layers_2_feed_forward_w1={"exponent": -6}))
    with pytest.raises(UsageError, match="two plans are called `fp16`"):
        build_here(bundles, checkpoint, out, "fp16", **edited("fp16"))
    target = Target("rtx", "1.7", "sm75")
    with pytest.raises(UsageError, match="does not compute in BF16"):
        build_here(
            bundles,
            checkpoint,
            out,
            engines=EngineOptions((target,)),
            **edited("fp16-bf16", local_decoder_up4_1={"dtype": "bfloat16"}),
        )
    assert not out.exists()
    dry = run_cli(
        "build",
        checkpoint,
        "--profile",
        tmp_path / "p.toml",
        "--plan",
        tmp_path / "fp16-mine.json",
        "--dry-run",
        "--json",
    )
    assert list(json.loads(dry.stdout)["weight_bytes"]) == ["fp16-mine"]


def draw(bundle: Path, plan: str) -> Any:
    embeds = np.random.default_rng(0).standard_normal((9, 40)).astype(np.float32)
    with Pipeline.open(bundle, "onnx", plan=plan) as pipe:
        return pipe.generate(prompt_embeds=embeds, height=32, width=48, seed=1).astype(int)
