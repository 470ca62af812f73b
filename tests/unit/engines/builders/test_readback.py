"""What an engine's size tells of its weights, and what it cannot tell."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l2p_engines.builders.readback import WEIGHT_BYTES_THRESHOLD, read_back
from l2p_engines.builders.request import EngineSpec
from l2p_engines.builders.shapes import engine_profiles
from l2p_engines.profiles import load_profile
from l2p_export.families.z_image_l2p import ZImageModel
from l2p_export.families.z_image_l2p.dimensions import published_dimensions
from l2p_runtime.contract import Target
from l2p_runtime.errors import ParityError

MODEL = ZImageModel(published_dimensions("4k"))
TRUNK = next(spec for spec in MODEL.networks if spec.name == "trunk")
SPEC = EngineSpec(TRUNK, "fp16", Target("rtx", "1.7", "sm89"), engine_profiles(TRUNK, MODEL.spec, [load_profile("4k")]))


@pytest.mark.parametrize(
    ("weights", "engine"),
    [(7_236_446_208, 7_254_526_356), (727_536_640, 730_336_756), (1_809_111_552, 1_814_501_132)],
)
def test_engines_that_were_measured_pass(weights: int, engine: int) -> None:
    entry = read_back(SPEC, weights, engine)
    assert entry.status == "passed"
    assert (str(entry.comparison), entry.network, entry.case) == (
        "fp16 graph -> rtx1.7-sm89 engine",
        "trunk",
        "weight bytes",
    )
    assert "compute precision not verified" in entry.reason
    assert entry.relative is not None
    assert entry.threshold is not None
    assert entry.relative < entry.threshold


@given(st.integers(100_000_000, 10**11), st.sampled_from([0.5, 2.0, 4.0]))
def test_weights_of_another_precision_fail_the_build(weights: int, factor: float) -> None:
    with pytest.raises(ParityError, match="stored them in another precision"):
        read_back(SPEC, weights, round(weights * factor) + 5_000_000)


@given(st.integers(0, 19_999_999), st.integers(0, 10**8))
def test_what_kernels_hide_is_not_run(weights: int, engine: int) -> None:
    entry = read_back(SPEC, weights, engine)
    assert entry.status == "not run"
    assert f"{weights:,} bytes" in entry.reason


def test_every_profile_may_bring_kernels() -> None:
    weights = 10**9
    engine = round(weights * (1 + WEIGHT_BYTES_THRESHOLD)) + 15_000_000
    with pytest.raises(ParityError):
        read_back(SPEC, weights, engine)
    assert read_back(replace(SPEC, profiles=SPEC.profiles * 2), weights, engine).status == "passed"
