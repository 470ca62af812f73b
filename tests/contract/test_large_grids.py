"""Pictures beyond the trained grid: where the grid is stated, positions by time, and coarse to fine."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file, save_file

from conftest import Bundles, link_traces, run_cli
from l2p_export.tensors.metadata import trained_grid
from l2p_runtime import ArtifactError, CancelledError, Coarse, Pipeline, TimeDependent, UsageError
from l2p_runtime.backends.host import HostDevice
from l2p_runtime.bundle import open_bundle
from l2p_runtime.coarse import mix_enlarged
from l2p_runtime.contract import RotarySpec
from l2p_runtime.noise import normal_noise
from l2p_runtime.policies import Frequencies, native

EMBEDS = np.random.default_rng(0).standard_normal((5, 40), np.float32)
OTHERS = np.random.default_rng(1).standard_normal((40, 40), np.float32)
ASKED: dict[str, Any] = {"prompt_embeds": EMBEDS, "steps": 2, "dtype": "float16"}


@pytest.fixture(scope="module")
def pipe(bundles: Bundles) -> Any:
    with Pipeline.open(bundles.path("tiny-16"), backend="onnx") as opened:
        yield opened


@pytest.mark.parametrize(
    ("text", "grid"), [("16x16", (16, 16)), (" 8 x 12 ", (8, 12)), ("8,12", (8, 12)), (None, None)]
)
def test_metadata_states_the_grid(text: str | None, grid: tuple[int, int] | None) -> None:
    assert trained_grid({} if text is None else {"l2p.base_grid": text}) == grid


@pytest.mark.parametrize("text", ["", "16", "0x16", "16x", "-1x4", "16x16x16", "1.5x2", "9999999999x1"])
def test_metadata_that_states_no_grid(text: str) -> None:
    with pytest.raises(ArtifactError, match=r"l2p\.base_grid"):
        trained_grid({"l2p.base_grid": text})


def test_a_grid_travels_from_the_checkpoint_and_flags_overrule_it(bundles: Bundles, tmp_path: Path) -> None:
    bundles.path("tiny-16")
    save_file(load_file(bundles.checkpoint("tiny-16")), tmp_path / "c.safetensors", {"l2p.base_grid": "4x6"})
    build = ("build", tmp_path / "c.safetensors", "--profile", bundles.root / "tiny-16.toml", "--out", tmp_path / "b")
    link_traces(bundles.store, tmp_path / "b")
    for flags, grid in (((), (4, 6)), (("--base-grid", "8x3"), (8, 3))):
        assert run_cli(*build, *flags).returncode == 0
        manifest = open_bundle(tmp_path / "b").manifest
        assert manifest.base_grid == manifest.model_on().rotary.base_grid == grid
        assert manifest.model.rotary.base_grid == (64, 64)
        assert f"trained_grid: {grid[0]} x {grid[1]} tokens\n" in run_cli("inspect", tmp_path / "b").stdout
    assert "of the family" in run_cli("inspect", bundles.path("tiny-16")).stdout
    for grid_text in ("0x8", "8", "8x513"):
        refused = run_cli(*build, "--base-grid", grid_text, "--dry-run")
        assert refused.returncode in (2, 4), grid_text
        assert "grid" in refused.stderr


@pytest.mark.parametrize("grid", [(0, 4), (4, 513), (4,), 4, "4x4", (4, True), (1.5, 2)])
def test_a_grid_that_is_none(grid: Any, pipe: Pipeline) -> None:
    with pytest.raises(UsageError, match="grid"):
        pipe.generate(height=32, width=32, base_grid=grid, **ASKED)


def test_the_trained_grid_decides_where_auto_stretches(pipe: Pipeline) -> None:
    drawn = [pipe.generate(height=64, width=96, base_grid=grid, **ASKED) for grid in (None, (4, 6), (2, 3))]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    linear = pipe.generate(height=64, width=96, base_grid=(2, 3), positions="linear", **ASKED)
    np.testing.assert_array_equal(drawn[2], linear)
    assert (drawn[2] != drawn[0]).any()


def test_a_function_of_time_is_called_once_a_step_for_each_axis(pipe: Pipeline) -> None:
    called: list[tuple[int, float]] = []

    def policy(rotary: RotarySpec, axis: int, grid: int, time: float) -> Frequencies:
        called.append((axis, round(time, 6)))
        return native(rotary, axis, grid)

    asked = {**ASKED, "negative_embeds": OTHERS, "guidance": 2.0, "steps": 3, "shift": 1.0}
    drawn = pipe.generate(height=32, width=48, positions=TimeDependent(policy), **asked)
    assert called == [(axis, round(step / 3, 6)) for step in range(3) for axis in range(3)]
    np.testing.assert_array_equal(drawn, pipe.generate(height=32, width=48, positions="native", **asked))


def test_a_function_that_fails_leaves_the_pipeline_usable(pipe: Pipeline) -> None:
    def late(rotary: RotarySpec, axis: int, grid: int, time: float) -> Frequencies:
        if time > 0:
            raise ZeroDivisionError("mine")
        return native(rotary, axis, grid)

    with pytest.raises(ZeroDivisionError, match="mine"):
        pipe.generate(height=32, width=32, positions=TimeDependent(late), **ASKED)
    assert np.isfinite(pipe.generate(height=32, width=32, **ASKED)).all()


def test_coarse_to_fine_is_two_drawings_with_one_mix(pipe: Pipeline) -> None:
    """Restated with single denoising calls."""
    found = pipe.generate(
        height=96, width=64, seed=5, coarse=Coarse(48, 32, renoise=0.8, steps=2), **{**ASKED, "shift": 1.0}
    )

    def noise(height: int, width: int) -> NDArray[np.float32]:
        return normal_noise(5, rows=(0, height), cols=(0, width))[np.newaxis]

    def steps(image: NDArray[np.float32], sigmas: list[float]) -> None:
        for sigma, following in itertools.pairwise(sigmas):
            image -= np.float32(following - sigma) * pipe.denoise(image, np.float32(1 - sigma), EMBEDS)

    small, image = noise(48, 32), noise(96, 64)
    steps(small, [1.0, 0.5, 0.0])
    mix_enlarged(HostDevice(), image, small, 0.8)
    steps(image, [0.8, 0.4, 0.0])
    expected = (np.clip(image[0], -1, 1).transpose(1, 2, 0) + 1) / 2
    np.testing.assert_allclose(found, expected, atol=2e-3)


def test_coarse_previews_and_progress(pipe: Pipeline) -> None:
    shown: list[tuple[int, int, tuple[int, ...]]] = []
    taken: list[tuple[int, int]] = []
    pipe.generate(
        height=64,
        width=64,
        coarse=Coarse(32, 32, steps=2),
        preview=lambda step, steps, pixels: shown.append((step, steps, pixels.shape)),
        progress=lambda done, steps: taken.append((done, steps)),
        **ASKED,
    )
    assert shown == [(step, 4, (64, 64, 3)) for step in (2, 3, 4)]
    assert taken == [(step, 4) for step in (1, 2, 3, 4)]


@pytest.mark.parametrize("coarse", [(32, 32), "32x32", 32, Coarse])
def test_a_coarse_image_that_is_none(coarse: Any, pipe: Pipeline) -> None:
    with pytest.raises(UsageError, match="expected Coarse"):
        pipe.generate(height=64, width=64, coarse=coarse, **ASKED)


def test_fine_guidance_asks_for_a_negative(pipe: Pipeline) -> None:
    with pytest.raises(UsageError, match=r"guidance 3\.0 needs"):
        pipe.generate(height=64, width=64, coarse=Coarse(32, 32, guidance=3.0), **ASKED)
    both = {**ASKED, "negative_embeds": OTHERS}
    pictures = [
        pipe.generate(height=64, width=64, coarse=Coarse(32, 32, guidance=guidance), **both) for guidance in (1.0, 3.0)
    ]
    assert (pictures[0] != pictures[1]).any()


def test_cancelling_between_the_passes(pipe: Pipeline) -> None:
    done: list[int] = []
    with pytest.raises(CancelledError):
        pipe.generate(
            height=64,
            width=64,
            coarse=Coarse(32, 32),
            progress=lambda step, steps: done.append(step),
            cancelled=lambda: len(done) == 2,
            **ASKED,
        )
    assert done == [1, 2]


def test_the_command_draws_coarse_to_fine(bundles: Bundles, tmp_path: Path) -> None:
    np.save(tmp_path / "e.npy", EMBEDS)
    base = ("generate", bundles.path("tiny-16"), "--embeddings", tmp_path / "e.npy", "--size", "64x64")
    out = ("--out", tmp_path / "x.png")
    result = run_cli(*base, "--coarse", "32x32", "--renoise", "0.7", "--fine-steps", "1", *out)
    assert result.returncode == 0, result.stderr
    with Image.open(tmp_path / "x.png") as image:
        facts = json.loads(image.text["parameters"])
    assert facts["coarse"] == {"height": 32, "width": 32, "renoise": 0.7, "steps": 1, "guidance": 1.0}
    for wrong, said in (
        (("--coarse", "64x64"), "smaller than 64x64"),
        (("--coarse", "33x32"), "does not divide"),
        (("--coarse", "big"), "--coarse is 'big'"),
        (("--renoise", "0.5"), "belong to --coarse"),
        (("--coarse", "32x32", "--renoise", "1"), "renoise is 1.0"),
        (("--coarse", "32x32", "--fine-steps", "0"), "steps is 0"),
        (("--base-grid", "4x"), "--base-grid is '4x'"),
    ):
        refused = run_cli(*base, *wrong, *out)
        assert refused.returncode == 2, wrong
        assert said in refused.stderr


def test_a_coarse_image_is_checked_before_a_server_is_asked(tmp_path: Path) -> None:
    base = (
        "generate",
        "--server",
        "grpc://127.0.0.1:9",
        "--prompt",
        "a",
        "--size",
        "64x64",
        "--out",
        tmp_path / "x.png",
    )
    for wrong, said in (
        (("--coarse", "64x64"), "smaller than 64x64"),
        (("--coarse", "32x32", "--renoise", "1"), "renoise is 1.0"),
        (("--fine-steps", "2"), "belong to --coarse"),
        (("--base-grid", "4x"), "--base-grid is '4x'"),
    ):
        refused = run_cli(*base, *wrong)
        assert refused.returncode == 2, wrong
        assert said in refused.stderr
