from __future__ import annotations

import math
from pathlib import Path

import pytest

from conftest import write_profile
from l2p_export.build.bundle import check_build
from l2p_export.checkpoint.demo import write_demo_checkpoint
from l2p_export.tensors.metadata import licence, sampling_defaults
from l2p_runtime.contract import Sampling
from l2p_runtime.errors import ArtifactError, UsageError


def test_the_demo_is_of_the_profiles_variant(tmp_path: Path) -> None:
    with check_build(None, ("4k",), ("fp32", "fp16"), None) as plan:
        assert plan.out == Path("demo-4k.bundle")
        assert plan.loaded.model.spec.variant == "4k"
        assert plan.is_trained
        full, half = (plan.weight_bytes(item) for item in plan.plans)
        # All is half as large but the time embedding, which stays float32.
        shapes = plan.loaded.model.network_shapes("stem")
        time = sum(math.prod(shape) for name, shape in shapes.items() if name.startswith("t_embedder"))
        assert half == full / 2 + 2 * time


def test_the_demo_is_the_same_every_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_demo_checkpoint(tmp_path / name, 16)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("profile", ["1k", "4k", "8k", "8k-zeroshot", "10k"])
def test_every_built_in_profile_has_a_demo(profile: str) -> None:
    with check_build(None, (profile,), ("fp32",), None) as plan:
        plan.profiles[0].check_model(plan.loaded.model.spec)


def test_profiles_of_other_patches_are_refused(tiny_path: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(UsageError, match="is for 64 px patches, the checkpoint has 16"),
        check_build(tiny_path, ("4k",), ("fp32",), None),
    ):
        pass
    profile = str(write_profile(tmp_path / "mine.toml", 16))
    with check_build(tiny_path, (profile, profile), ("fp32",), None) as plan:
        assert len(plan.profiles) == 1
        assert plan.profiles[0].name == "mine"
        assert plan.out == Path("tiny-mine.bundle")


def test_unknown_precisions_are_listed() -> None:
    with pytest.raises(UsageError, match="no precision `int3`"), check_build(None, ("4k",), ("int3",), None):
        pass


def test_sampling_comes_from_the_checkpoint_first() -> None:
    fallback = Sampling(50, 4.0, 3.0)
    assert sampling_defaults({"l2p.steps": "4", "l2p.guidance": "1"}, fallback) == Sampling(4, 1.0, 3.0)
    assert sampling_defaults({}, fallback) == fallback
    for bad in ({"l2p.steps": "four"}, {"l2p.steps": "0"}, {"l2p.shift": "nan"}):
        with pytest.raises(ArtifactError, match="sampling metadata"):
            sampling_defaults(bad, fallback)


def test_licences_are_taken_as_stated() -> None:
    assert licence({"license": "Apache-2.0"}) == "Apache-2.0"
    assert licence({}) == ""
