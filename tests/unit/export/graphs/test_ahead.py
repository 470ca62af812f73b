"""Helpers that trace ahead: the same graphs as without them, and nothing is left to a helper that fails."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest

from l2p_engines.store.stages import Home, StageRunner, find_stage, stages
from l2p_export.build.bundle import check_build
from l2p_export.checkpoint.demo import demo_dimensions
from l2p_export.families.z_image_l2p import ZImageModel
from l2p_export.graphs.ahead import ToTrace, tracing_ahead
from l2p_export.graphs.export import trace_key, trace_stage
from l2p_export.precision.plans import plain_plan
from l2p_runtime.errors import UsageError
from l2p_runtime.progress import Silent


@pytest.fixture(scope="module")
def wanted() -> list[ToTrace]:
    """Two that are traced in a second each: they have no blocks."""
    model = ZImageModel(replace(demo_dimensions(16), layers=2, context_refiners=0))
    specs = {spec.name: spec for spec in model.networks}
    return [ToTrace(model, specs[name], plain_plan(model, "fp32")) for name in ("tail", "caption")]


def trace(home: Home, item: ToTrace) -> tuple[bytes, list[str]]:
    run = StageRunner(home)
    stage = trace_stage(run, item.model, item.network, item.plan, Silent())
    return run.path(stage.files[0]).read_bytes(), run.made


@pytest.fixture(scope="module")
def alone(wanted: list[ToTrace], tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    home = Home(tmp_path_factory.mktemp("alone"))
    return [trace(home, item)[0] for item in wanted]


def test_a_helper_makes_what_the_caller_would(wanted: list[ToTrace], alone: list[bytes], tmp_path: Path) -> None:
    home = Home(tmp_path)
    with tracing_ahead(home, wanted, 2):
        (helper,) = multiprocessing.active_children()
        while find_stage(home, trace_key(wanted[1].model, wanted[1].network, wanted[1].plan)) is None:
            assert helper.is_alive()
            helper.join(0.2)
        found, made = trace(home, wanted[1])
        assert (found, made) == (alone[1], [])
    assert not helper.is_alive()


def test_the_caller_makes_what_helpers_do_not(wanted: list[ToTrace], alone: list[bytes], tmp_path: Path) -> None:
    home = Home(tmp_path)
    with tracing_ahead(home, wanted, 2):
        (helper,) = multiprocessing.active_children()
        helper.kill()
        made = [trace(home, item) for item in wanted]
    assert made == [(data, [f"trace {item.network.name}.fp32"]) for data, item in zip(alone, wanted, strict=True)]


@pytest.mark.parametrize("processes", [1, 3])
def test_no_more_helpers_than_work(wanted: list[ToTrace], tmp_path: Path, processes: int) -> None:
    with tracing_ahead(Home(tmp_path), wanted[:1], processes):
        assert not multiprocessing.active_children()
    assert not list(stages(tmp_path))


def test_no_jobs() -> None:
    with pytest.raises(UsageError, match="0 jobs, expected 1 or more"), check_build(None, ("4k",), (), None, jobs=0):
        pass
