"""Float16 that is never black: checkpoints in which plain float16 overflows, and what a measured plan makes of them.

Torch computes float16 as a GPU does; ONNX Runtime on the CPU computes such graphs in float32 and hides every overflow.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from fakes.stress import STRESSES, run_plan, stressed, write_stressed
from l2p_calib.plans.float16 import Measurement, measured_plan, overflows
from l2p_calib.plans.plan import PLANS, PrecisionPlan
from l2p_calib.statistics.ranges import NetworkStatistics, network_statistics
from l2p_calib.statistics.torch_hooks import counting
from l2p_export.checkpoint.demo import write_demo_checkpoint
from l2p_export.checkpoint.loading import LoadedModel, load_model
from l2p_export.precision.plans import network_points, plain_plan, weight_peaks
from l2p_export.proof.cases import Case, case_inputs
from l2p_export.proof.reference import run_reference
from parity.models import relative_error

if TYPE_CHECKING:
    from numpy.typing import NDArray

    State = dict[str, NDArray[np.float32]]

pytestmark = pytest.mark.usefixtures("one_thread")

# Measured 1.0e-3 to 1.4e-3.
CLOSE = 5e-3


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> State:
    path = tmp_path_factory.mktemp("good") / "demo.safetensors"
    write_demo_checkpoint(path, 16)
    return dict(load_file(path))


def measured(loaded: LoadedModel) -> tuple[dict[str, NDArray[Any]], list[Measurement]]:
    """One case in torch float32, with what was measured on the way."""
    model, found = loaded.model, {}

    @contextmanager
    def observe(network: str, module: Any) -> Iterator[None]:
        with counting(module, network_points(model, network)) as counters:
            yield
            found[network] = network_statistics(network, "0", counters)

    inputs = {"case": case_inputs(model.spec, Case("case", 2, 3, 7, stored=True), seed=0)}
    results = run_reference(loaded, inputs, lambda done: None, observe)
    return results["case"], [measurement(loaded, name, found[name]) for name in found]


def measurement(loaded: LoadedModel, network: str, statistics: NetworkStatistics) -> Measurement:
    peaks = weight_peaks(loaded.checkpoint.tensors, tuple(loaded.model.network_shapes(network)))
    return Measurement(loaded.model.layout(network), "0", peaks, statistics)


def test_a_good_checkpoint_needs_no_more_than_the_usual_scales(good: State, tmp_path: Path) -> None:
    loaded = load_model(write_stressed(tmp_path / "good.safetensors", good))
    case, measurements = measured(loaded)
    plan = measured_plan(PLANS["fp16"], measurements).plan
    assert {rule.layer for rule in plan.rules} == {"t_embedder.mlp.0", "t_embedder.mlp.2"}
    assert {scale.exponent for scale in plan.scales} == {-6}
    assert len(plan.scales) == 2 * 8
    for chosen in (plan, plain_plan(loaded.model, "fp16-plain")):
        assert relative_error(run_plan(loaded, chosen, case), case["head.prediction"]) <= CLOSE
        assert not any(overflows(chosen, item) for item in measurements)


@pytest.mark.parametrize("name", STRESSES)
def test_a_stressed_checkpoint(good: State, tmp_path: Path, name: str) -> None:
    """It draws the same in float32 and in the measured plan, and nothing in plain float16."""
    loaded = load_model(write_stressed(tmp_path / "stressed.safetensors", good, name))
    plain = load_model(write_stressed(tmp_path / "good.safetensors", good))
    case, measurements = measured(loaded)
    expected, _ = measured(plain)
    assert relative_error(case["head.prediction"], expected["head.prediction"]) <= 1e-4
    cast = plain_plan(loaded.model, "fp16-plain")
    black = run_plan(loaded, cast, case)
    assert not np.isfinite(black).all()
    networks = [item.layout.network for item in measurements if overflows(cast, item)]
    assert networks[0] == STRESSES[name].network
    plan = measured_plan(PLANS["fp16"], measurements).plan
    assert not any(overflows(plan, item, limit=65504 / 4) for item in measurements)
    assert relative_error(run_plan(loaded, plan, case), case["head.prediction"]) <= CLOSE


def test_half_of_the_defence_is_not_enough(good: State, tmp_path: Path) -> None:
    """What the comparisons above rest on: without its scales, or without its float32 layers, the plan overflows."""
    names = ("products of the trunk", "residual and bottleneck")
    loaded = load_model(write_stressed(tmp_path / "stressed.safetensors", good, *names))
    case, measurements = measured(loaded)
    plan = measured_plan(PLANS["fp16"], measurements).plan
    assert relative_error(run_plan(loaded, plan, case), case["head.prediction"]) <= CLOSE
    for half in (
        PrecisionPlan("fp16", "fp16", "float16", plan.rules),
        PrecisionPlan("fp16", "fp16", "float16", plain_plan(loaded.model, "fp16").rules, plan.scales),
    ):
        assert any(overflows(half, item) for item in measurements)
        assert not np.isfinite(run_plan(loaded, half, case)).all()


def test_powers_of_two_cancel(good: State) -> None:
    """The generator changes weights and says which: every stress multiplies some by more than a thousand."""
    for name in STRESSES:
        changed = stressed(good, name)
        ratios = {float((changed[key][value != 0] / value[value != 0]).max()) for key, value in good.items()}
        assert max(ratios) >= 2**13, name
        assert all(np.log2(ratio) % 1 == 0 for ratio in ratios), name


def test_a_large_residual_raises_no_layer_of_a_block(good: State, tmp_path: Path) -> None:
    """A trunk in float32 would take twice the memory; its residual, and what writes and reads it, is enough."""
    loaded = load_model(write_stressed(tmp_path / "stressed.safetensors", good, "residual and bottleneck"))
    _, measurements = measured(loaded)
    rules = {rule.layer for rule in measured_plan(PLANS["fp16"], measurements).plan.rules}
    residuals = {f"residual.{network}" for network in ("caption", "stem", "trunk", "tail")}
    embedders = {"all_x_embedder.16-1", "cap_embedder.1", "local_decoder.bottleneck.0"}
    assert rules - {"t_embedder.mlp.0", "t_embedder.mlp.2"} == residuals | embedders
