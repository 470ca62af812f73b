"""The whole pipeline on a bundle's engines, over fakes of the driver and of the library: same pixels as on the host."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import Bundles
from fakes.cuda import FakeDriver, fake_device, fake_driver
from fakes.engine_bundles import add_engines
from fakes.tensorrt_runtime import FakeLibrary
from l2p_engines.forecast.calls import CallSize
from l2p_engines.forecast.cards import find_card
from l2p_export.performance.bench import _bounds as bounds_of
from l2p_export.performance.bench import bench
from l2p_export.proof.verify import verify_bundle
from l2p_runtime import Pipeline, networks
from l2p_runtime.backends import cuda
from l2p_runtime.backends.cuda import CudaDevice
from l2p_runtime.bundle import open_bundle
from l2p_runtime.contract import NETWORKS
from l2p_runtime.errors import ArtifactError, HostError, UsageError
from l2p_runtime.progress import Silent

EMBEDS = np.linspace(-1, 1, 9 * 40, dtype=np.float32).reshape(9, 40)
CALL: dict[str, Any] = {"prompt_embeds": EMBEDS, "height": 128, "width": 64, "seed": 3, "steps": 2, "guidance": 1.0}
HEAD_ROWS = 7


@pytest.fixture(scope="module")
def compiled(bundles: Bundles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of tiny-16 with a fake engine for sm89 of every network of its fp32 plan; the head's takes 7 rows."""
    root = tmp_path_factory.mktemp("compiled") / "bundle"
    shutil.copytree(bundles.path("tiny-16"), root)
    add_engines(root, "fp32", head_rows=HEAD_ROWS)
    return root


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> CudaDevice:
    made = fake_device()
    monkeypatch.setattr(cuda, "open_cuda", lambda index, install: made)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", FakeLibrary(fake_driver(made)))
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    return made


@pytest.mark.parametrize(("dtype", "guidance"), [("uint8", 1.0), ("uint16", 3.0), ("float16", 3.0)])
def test_the_same_pixels_as_on_the_host(device: CudaDevice, compiled: Path, dtype: str, guidance: float) -> None:
    call = CALL | {"dtype": dtype, "guidance": guidance, "negative_embeds": EMBEDS[::-1]}
    with Pipeline.open(compiled, backend="onnx", plan="fp32") as pipe:
        expected = pipe.generate(**call)
    with Pipeline.open(compiled) as pipe:
        assert pipe._networks.opened.backend.name == "rtx"
        assert pipe.plan == "fp32"
        found = pipe.generate(**call)
    assert found.dtype == expected.dtype
    # Stripes change the order of no sum, but a convolution may be run another way: half a step of a pixel at most.
    assert np.abs(found.astype(np.float64) - expected.astype(np.float64)).max() <= (1e-3 if dtype == "float16" else 1)
    assert not fake_driver(device).held_bytes, "close gives everything back"


def test_the_head_is_cut_to_what_its_engine_takes(device: CudaDevice, compiled: Path) -> None:
    with Pipeline.open(compiled) as pipe:
        stripes = pipe._networks.plan_call(1, (8, 4), 32, 2)
        assert max(stripe.read_stop - stripe.read_first for stripe in stripes) == HEAD_ROWS
        noisy = np.random.default_rng(0).standard_normal((1, 3, 128, 64), dtype=np.float32)
        found = pipe.denoise(noisy, 0.5, EMBEDS)
    with Pipeline.open(compiled, backend="onnx", plan="fp32") as pipe:
        np.testing.assert_allclose(found, pipe.denoise(noisy, 0.5, EMBEDS), rtol=1e-4, atol=1e-5)


def test_networks_take_turns_on_the_device(device: CudaDevice, compiled: Path) -> None:
    with Pipeline.open(compiled) as pipe:
        expected = pipe.generate(**CALL)
        sizes = pipe._networks.held_bytes
    device = fake_device()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "open_cuda", lambda index, install: device)
        patch.setitem(sys.modules, "tensorrt_rtx", FakeLibrary(fake_driver(device)))
        with Pipeline.open(compiled, memory_budget=max(sizes.values()) + (60 << 20)) as pipe:
            pipe._networks.budget_bytes = sum(sizes.values()) - 1 + (60 << 20)
            assert np.array_equal(pipe.generate(**CALL), expected)


@pytest.mark.parametrize(
    ("call", "needle"),
    [
        ({"height": 256, "width": 64}, "`stem` was built for `image` from"),
        ({"height": 64, "width": 256}, "16 token columns"),
        ({"prompt_embeds": np.zeros((600, 40), np.float32)}, "600 tokens"),
    ],
)
def test_sizes_that_no_engine_takes_are_refused_first(
    device: CudaDevice, compiled: Path, call: dict[str, Any], needle: str
) -> None:
    with Pipeline.open(compiled) as pipe:
        before = fake_driver(device).launches
        with pytest.raises(UsageError, match=needle.replace("[", r"\[")):
            pipe.generate(**(CALL | call))
        assert fake_driver(device).launches == before
        assert pipe.generate(**(CALL | {"steps": 1})).shape == (128, 64, 3)


def test_another_gpu_is_told_what_to_build(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("rtx", "auto"):
        device = fake_device(capability=(12, 0))
        monkeypatch.setattr(cuda, "open_cuda", lambda index, install, device=device: device)
        monkeypatch.setitem(sys.modules, "tensorrt_rtx", FakeLibrary(fake_driver(device)))
        if name == "rtx":
            with pytest.raises(
                ArtifactError, match=r"no engine of `caption` in plan `fp32` for rtx1\.7-sm120"
            ) as caught:
                Pipeline.open(compiled, backend=name, plan="fp32")
            assert "--target rtx-sm120" in caught.value.hint
        else:
            monkeypatch.setattr("l2p_runtime.backends.onnx_cuda.open_device", _no_gpu_build)
            with Pipeline.open(compiled, backend=name) as pipe:
                assert pipe._networks.opened.backend.name == "onnx", "auto goes on to what runs"
        assert not fake_driver(device).held_bytes


def _no_gpu_build(index: int) -> None:
    raise HostError("ONNX Runtime has no CUDA provider")


def test_a_plan_without_engines_is_refused(device: CudaDevice, compiled: Path) -> None:
    with pytest.raises(ArtifactError, match="in plan `fp16`"):
        Pipeline.open(compiled, backend="rtx", plan="fp16")


def test_verify_compares_engines_with_torch(device: CudaDevice, compiled: Path) -> None:
    ledger = verify_bundle(open_bundle(compiled), "rtx", None, Silent())
    stage = "torch float32 -> fp32 rtx1.7-sm89 engine"
    run = [entry for entry in ledger if str(entry.comparison) == stage]
    assert {entry.network for entry in run if entry.status == "passed"} >= {*NETWORKS, "end-to-end"}
    graphs = [entry for entry in ledger if entry.comparison.subject == "graph"]
    assert graphs
    assert {entry.status for entry in graphs} == {"not run"}


def test_bench_times_engines(device: CudaDevice, compiled: Path) -> None:
    found = bench(open_bundle(compiled), "rtx", None, (64, 64), 9, 2, Silent())
    assert [timing.network for timing in found.timings] == [*NETWORKS, "step"]
    assert all(len(timing.seconds) == 2 and min(timing.seconds) > 0 for timing in found.timings)
    assert sum(timing.median for timing in found.timings[:-1]) <= 1.5 * found.timings[-1].median
    assert found.peak_bytes > 0


def test_the_fake_is_a_driver() -> None:
    assert isinstance(fake_driver(fake_device()), FakeDriver)


@pytest.mark.parametrize(("base", "forbidden"), [("fp32", "fused_call_memory"), ("fp16", "call_memory")])
def test_memory_is_forecast_by_the_base_of_a_plan(
    base: str, forbidden: str, device: CudaDevice, compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan's name says nothing: `fp32-mine` may be a float16 plan."""
    shutil.copytree(compiled, tmp_path / "bundle")
    path = tmp_path / "bundle" / "bundle.json"
    data = json.loads(path.read_bytes().replace(b'"plan": "fp32"', b'"plan": "fp32-mine"'))
    (plan,) = (plan for plan in data["plans"] if plan["name"] == "fp32")
    plan |= {"name": "fp32-mine", "base": base}
    path.write_text(json.dumps(data))
    monkeypatch.setattr(networks, forbidden, None)
    with Pipeline.open(tmp_path / "bundle", plan="fp32-mine") as pipe:
        assert pipe.generate(**CALL).shape == (128, 64, 3)


def test_bounds_follow_the_base_of_a_plan(bundles: Bundles) -> None:
    opened, call = open_bundle(bundles.path("tiny-16")), CallSize(64, 64, 32)
    plans = tuple(
        plan if plan.name == "fp32" else replace(plan, base="fp8-attention") for plan in opened.manifest.plans
    )
    swept = replace(opened, manifest=replace(opened.manifest, plans=plans))
    assert bounds_of(opened, "fp16", call, find_card("RTX 3090"))
    assert not bounds_of(swept, "fp16", call, find_card("RTX 3090")), "a card without FP8 does not run it"
    fp16, fp8 = (bounds_of(item, "fp16", call, find_card("RTX 4090"))["trunk"] for item in (opened, swept))
    assert fp8.compute_seconds is not None
    assert fp16.compute_seconds is not None
    assert fp8.compute_seconds < fp16.compute_seconds
