"""What a build of engines is refused for before it starts, and the head that its engines take."""

from __future__ import annotations

import pytest

from l2p_calib.plans.plan import PLANS
from l2p_engines.builders import engines
from l2p_engines.builders.builder import build_memory_bytes
from l2p_engines.builders.engines import HEAD_BYTES, EngineOptions, require_engine_resources, require_engines_possible
from l2p_engines.builders.shapes import HeadBudget, stripe_rows
from l2p_engines.forecast.calls import ENGINE_KERNEL_BYTES
from l2p_engines.profiles import load_profile
from l2p_export.families.z_image_l2p import ZImageModel
from l2p_export.families.z_image_l2p.dimensions import published_dimensions
from l2p_runtime.contract import Target
from l2p_runtime.errors import HostError, UsageError

GIB = 1 << 30
TARGETS = (Target("rtx", "1.7", "sm89"), Target("rtx", "1.7", "sm120"))
WEIGHTS = {("trunk", "fp16"): 2 * GIB, ("head", "fp16"): GIB // 2}


@pytest.fixture(autouse=True)
def free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "available_host_bytes", lambda: 64 * GIB)


def test_too_little_memory_names_the_largest_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    require_engine_resources(EngineOptions(TARGETS), WEIGHTS, 64 * GIB, "out")
    monkeypatch.setattr(engines, "available_host_bytes", lambda: build_memory_bytes(2 * GIB) - 1)
    with pytest.raises(HostError, match=r"engine of `trunk` in fp16 needs about [\d,]+ bytes of memory, [\d,]+ are"):
        require_engine_resources(EngineOptions(TARGETS), WEIGHTS, 64 * GIB, "out")


def test_the_disk_holds_an_engine_for_every_target() -> None:
    needed = 2 * (sum(WEIGHTS.values()) + len(WEIGHTS) * ENGINE_KERNEL_BYTES)
    require_engine_resources(EngineOptions(TARGETS), WEIGHTS, needed, "out")
    require_engine_resources(EngineOptions(TARGETS[:1]), WEIGHTS, needed // 2, "out")
    with pytest.raises(HostError, match=rf"`out` has {needed - 1:,} bytes free, the engines need about {needed:,}"):
        require_engine_resources(EngineOptions(TARGETS), WEIGHTS, needed - 1, "out")


@pytest.mark.parametrize(("options", "weights"), [(EngineOptions(), WEIGHTS), (EngineOptions(TARGETS), {})])
def test_nothing_to_build_needs_nothing(
    options: EngineOptions, weights: dict[tuple[str, str], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "available_host_bytes", lambda: 0)
    require_engine_resources(options, weights, 0, "out")


def test_a_head_that_cannot_be_cut_is_built_whole_unless_a_budget_is_asked_for() -> None:
    model = ZImageModel(published_dimensions("10k")).spec
    assert model.head.halo_rows is None
    call = (model, [load_profile("10k")], [PLANS["fp16"]], {"fp16": ()})
    require_engines_possible(EngineOptions(TARGETS), *call)
    with pytest.raises(UsageError, match="profile `10k`") as caught:
        require_engines_possible(EngineOptions(TARGETS, head_bytes=1 << 20), *call)
    assert caught.value.hint == "raise --head-memory"


def test_a_head_that_can_be_cut_is_cut_to_the_default_budget() -> None:
    """At 8192 px a whole head takes more than the default."""
    model = ZImageModel(published_dimensions("8k")).spec
    call = (model, [load_profile("8k")], [PLANS["fp16"]], {"fp16": ()})
    require_engines_possible(EngineOptions(TARGETS), *call)
    rows = [stripe_rows(model, load_profile("8k"), budget) for budget in (None, HeadBudget(HEAD_BYTES, "fp16"))]
    assert rows[1] < rows[0]
