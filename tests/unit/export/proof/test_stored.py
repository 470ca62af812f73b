from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from l2p_export.checkpoint.demo import demo_dimensions
from l2p_export.families.z_image_l2p import ZImageModel
from l2p_export.proof.cases import Case, case_inputs
from l2p_export.proof.stored import PIXEL_STEP, WHOLE_PIXELS_MAX, pixel_step, read_case, write_case
from l2p_runtime.bundle import Bundle
from l2p_runtime.contract import ReferenceCase
from l2p_runtime.errors import ArtifactError
from l2p_runtime.tensorfile import write_tensorfile

MODEL = ZImageModel(demo_dimensions(64))
SMALL, LARGE = Case("small", 3, 2, 7, stored=True), Case("large", 17, 16, 33, stored=True)
SEED = 5

Values = dict[str, NDArray[Any]]


def made(case: Case) -> Values:
    """A case with something in place of what torch would make of it."""
    values = case_inputs(MODEL.spec, case, SEED)
    sequence = len(values["rope_cos"])
    sizes = {"B": 1, "h": case.rows, "w": case.columns, "r": case.rows, "s": sequence}
    sizes["t"] = MODEL.spec.padded(case.caption_tokens) // MODEL.spec.sequence_multiple
    rng = np.random.default_rng(0)
    for network in MODEL.networks:
        for output in network.outputs:
            values[f"{network.name}.{output.name}"] = rng.standard_normal(output.resolve(sizes), np.float32)
    return values


def bundle_at(folder: Path) -> Bundle:
    networks = {spec.name: spec for spec in MODEL.networks}
    manifest = SimpleNamespace(model=MODEL.spec, networks=MODEL.networks, network=networks.__getitem__)
    return cast("Bundle", SimpleNamespace(manifest=manifest, path=folder.__truediv__))


def record(case: Case) -> ReferenceCase:
    return ReferenceCase(case.name, "case", case.rows * 64, case.columns * 64, case.caption_tokens)


def test_a_small_case_is_stored_whole(tmp_path: Path) -> None:
    values = made(SMALL)
    write_case(tmp_path / "case", values, SEED)
    found = read_case(bundle_at(tmp_path), record(SMALL))
    assert found.keys() == values.keys()
    assert all(np.array_equal(found[name], value) for name, value in values.items())
    assert pixel_step(found) == 1


def test_a_large_case_is_stored_by_its_seed_and_some_pixels(tmp_path: Path) -> None:
    values = made(LARGE)
    assert values["image"][0, 0].size > WHOLE_PIXELS_MAX
    write_case(tmp_path / "case", values, SEED)
    assert "image" not in load_file(tmp_path / "case")
    assert (tmp_path / "case").stat().st_size < 0.2 * sum(value.nbytes for value in values.values())
    found = read_case(bundle_at(tmp_path), record(LARGE))
    assert pixel_step(found) == PIXEL_STEP
    del found["pixel_step"]
    assert found.keys() == values.keys()
    expected = values | {"head.prediction": values["head.prediction"][:, :, ::PIXEL_STEP, ::PIXEL_STEP]}
    assert all(np.array_equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("patch", [16, 64, 128, 160])
def test_every_place_within_a_patch_is_among_the_pixels(patch: int) -> None:
    assert set(np.arange(0, 16 * patch, PIXEL_STEP) % patch) == set(range(patch))


DAMAGE: dict[str, tuple[Callable[[Values], object], str]] = {
    "no image and no seed": (lambda v: v.pop("noise_seed"), "does not hold case `large`: head.prediction, image"),
    "both": (lambda v: v.update(image=np.zeros((1, 3, 4, 4), np.float32)), "image"),
    "seed of another dtype": (lambda v: v.update(noise_seed=np.zeros(1, np.float32)), "noise_seed"),
    "no seed in it": (lambda v: v.update(noise_seed=np.zeros(0, np.int64)), "noise_seed"),
    "negative seed": (lambda v: v.update(noise_seed=np.asarray([-1])), "has the seed -1"),
    "whole prediction": (
        lambda v: v.update({"head.prediction": np.zeros((1, 3, 1088, 1024), np.float32)}),
        "head.prediction",
    ),
    "mask of numbers": (lambda v: v.update(caption_mask=v["caption_mask"].astype(np.int64)), "caption_mask"),
    "no tokens": (lambda v: v.pop("trunk.tokens_out"), "trunk.tokens_out"),
    "one more": (lambda v: v.update(more=np.zeros(1, np.float32)), "more"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_files_that_hold_something_else(tmp_path: Path, damage: str) -> None:
    write_case(tmp_path / "case", made(LARGE), SEED)
    change, needle = DAMAGE[damage]
    values = load_file(tmp_path / "case")
    change(values)
    write_tensorfile(tmp_path / "case", values)
    with pytest.raises(ArtifactError, match=needle):
        read_case(bundle_at(tmp_path), record(LARGE))


def test_sizes_that_nobody_could_allocate(tmp_path: Path) -> None:
    write_case(tmp_path / "case", made(LARGE), SEED)
    with pytest.raises(ArtifactError, match="does not hold case `x`"):
        read_case(bundle_at(tmp_path), ReferenceCase("x", "case", 64 << 40, 64 << 40, 33))


def test_the_grid_is_the_manifests(tmp_path: Path) -> None:
    write_case(tmp_path / "case", made(SMALL) | {"grid": np.asarray([99, -1], np.int64)}, SEED)
    assert read_case(bundle_at(tmp_path), record(SMALL))["grid"].tolist() == [3, 2]
