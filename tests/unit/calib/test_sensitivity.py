"""The ranking of groups and the fewest that are kept, with a denoiser that is a sum."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l2p_calib.sensitivity import (
    Deviation,
    Sensitivity,
    relative_errors,
    sensitivity_to_csv,
    sensitivity_to_json,
    sweep,
)
from l2p_runtime.errors import UsageError


def run(errors: dict[str, float], gate: float) -> tuple[Sensitivity, list[tuple[str, ...]]]:
    """Groups of two layers, whose errors add up by their squares."""
    asked: list[tuple[str, ...]] = []

    def measure(layers: Sequence[str]) -> Deviation:
        asked.append(tuple(layers))
        groups = {layer.rpartition(".")[0] for layer in layers}
        error = math.sqrt(sum(errors[group] ** 2 for group in groups))
        return Deviation(error, 2 * error, 30.0)

    groups = {name: [f"{name}.a", f"{name}.b"] for name in errors}
    return sweep(groups, gate, "a test", measure, lambda done: None), asked


@settings(deadline=None)
@given(st.lists(st.floats(0.001, 0.5), min_size=1, max_size=12), st.floats(0.0005, 0.9))
def test_the_fewest_of_the_worst_are_kept(values: list[float], gate: float) -> None:
    errors = {f"g{index}": value for index, value in enumerate(values)}
    found, asked = run(errors, gate)
    assert [item.deviation.error for item in found.groups] == pytest.approx(sorted(values, reverse=True))

    def left(kept: int) -> float:
        return math.sqrt(sum(value**2 for value in sorted(values, reverse=True)[kept:]))

    assert left(found.kept) <= gate
    assert found.kept == 0 or left(found.kept - 1) > gate
    assert [item.is_kept for item in found.groups] == [index < found.kept for index in range(len(values))]
    # One less was measured, not inferred.
    assert found.kept == 0 or found.kept - 1 in {step.kept for step in found.steps}
    assert len(asked) <= len(values) + 2 + math.ceil(math.log2(len(values) + 1))


def test_reasons_hold_the_figures() -> None:
    found, _ = run({"layers.1 w2": 0.03, "layers.2 w2": 0.01}, 0.02)
    why = "kept in float16: only layers.1 w2 in FP8 makes an error of 0.03; all groups make 0.0316, 0.02 is allowed"
    assert found.reasons == {"layers.1 w2.a": why, "layers.1 w2.b": why}
    table = list(csv.reader(io.StringIO(sensitivity_to_csv(found))))
    assert table == [
        ["group", "error", "worst", "image_psnr_db", "right", "kept"],
        ["layers.1 w2", "0.03", "0.06", "30.00", "", "1"],
        ["layers.2 w2", "0.01", "0.02", "30.00", "", "0"],
    ]
    data = json.loads(sensitivity_to_json(found))
    assert (data["kept"], data["gate"], data["schema"], data["source"]) == (1, 0.02, 1, "a test")


def test_a_group_that_costs_a_picture_is_the_worst() -> None:
    errors, right = {"large": 0.03, "wrong": 0.001, "small": 0.002}, {"large": 8, "wrong": 6, "small": 7}

    def measure(layers: Sequence[str]) -> Deviation:
        return Deviation(
            max((errors[layer] for layer in layers), default=0.0), 0.0, 30.0, min(map(right.get, layers), default=7)
        )

    found = sweep({name: [name] for name in errors}, 0.01, "a test", measure, lambda done: None, right=7)
    assert [item.group for item in found.groups] == ["wrong", "large", "small"]
    assert "only wrong in FP8 makes an error of 0.001 and costs 1 of 7 right pictures; all" in found.reasons["wrong"]
    assert "costs" not in found.reasons["large"]
    assert [item.is_kept for item in found.groups] == [True, True, False]
    rows = list(csv.DictReader(io.StringIO(sensitivity_to_csv(found))))
    assert [row["right"] for row in rows] == ["6", "8", "7"]


def test_nothing_to_sweep() -> None:
    found, _ = run({}, 0.02)
    assert (found.kept, found.groups, found.reasons) == (0, (), {})


@pytest.mark.parametrize("gate", [0.0, -1.0, 1.0, math.nan])
def test_a_gate_that_says_nothing(gate: float) -> None:
    with pytest.raises(UsageError, match="--gate is"):
        run({"a": 0.1}, gate)


def test_errors_of_samples_together_and_of_the_worst() -> None:
    assert relative_errors([(1.0, 100.0), (3.0, 300.0)]) == (0.1, 0.1)
    assert relative_errors([(0.0, 1.0), (1.0, 1.0)]) == (math.sqrt(0.5), 1.0)
    assert relative_errors([(4.0, 0.0)]) == (2.0, 2.0)
    assert all(map(math.isnan, relative_errors([(math.nan, 1.0), (0.0, 1.0)])))
