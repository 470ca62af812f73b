"""The published model's own predictions, through bundles built by the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from golden import tiny_checkpoint
from l2p_export.checkpoint.loading import load_model
from l2p_export.proof.cases import Case, case_inputs
from l2p_export.proof.reference import run_reference
from l2p_runtime import Pipeline

if TYPE_CHECKING:
    from conftest import Bundles

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny_patch16.npz"
GRIDS = [(1, 1), (1, 7), (4, 8), (5, 3), (9, 11)]
SOME = [(1, 1, 1), (1, 7, 33), (5, 3, 512), (4, 8, 32)]
CASES = {
    "tiny-16": [(*grid, length) for grid in GRIDS for length in (1, 32, 33, 512)],
    "tiny-64": SOME,
    "tiny-128": SOME,
    "demo-160": SOME,
}
"""Kind of bundle to token rows, token columns and caption tokens."""


@pytest.mark.parametrize("kind", ["tiny-16", "tiny-16-fused"])
def test_fp32_predictions_are_the_published_ones(bundles: Bundles, kind: str) -> None:
    # 6e-7 measured; a caption path that is wrong shows at 1e-3 only.
    assert _golden_error(bundles.path(kind), "fp32") < 5e-6


def test_fp16_predictions_stay_near_the_published_ones(bundles: Bundles) -> None:
    # 6e-4 measured.
    assert 1e-5 < _golden_error(bundles.path("tiny-16"), "fp16") < 3e-3


def test_a_wrong_caption_is_seen(bundles: Bundles) -> None:
    with np.load(GOLDEN) as golden, Pipeline.open(bundles.path("tiny-16")) as pipe:
        wrong = pipe.denoise(golden["0.image"], golden["0.time"], golden["0.caption"][:, :-1])
        assert np.abs(wrong - golden["0.prediction"]).max() > 1e-4


@pytest.mark.parametrize(("kind", "cases"), CASES.items())
def test_every_grid_and_caption_equals_torch(bundles: Bundles, kind: str, cases: list[tuple[int, int, int]]) -> None:
    with Pipeline.open(bundles.path(kind)) as pipe:
        model = pipe.bundle.manifest.model
        step = model.head.row_multiple
        inputs = {
            f"{rows}x{columns} tokens, caption of {length}": case_inputs(
                model, Case("", rows * step, columns * step, length, stored=False), seed=length
            )
            for rows, columns, length in cases
        }
        references = run_reference(load_model(bundles.checkpoint(kind)), inputs, lambda amount: None)
        for (name, case), (_, _, length) in zip(inputs.items(), cases, strict=True):
            expected = references[name]["head.prediction"]
            found = pipe.denoise(case["image"], case["time"], case["prompt_embeds"][:, :length])
            # 3e-6 measured at values up to 5.
            assert np.abs(found - expected).max() <= 2e-5 * max(1.0, np.abs(expected).max()), name


def test_a_batch_equals_its_images_one_by_one(bundles: Bundles) -> None:
    rng = np.random.default_rng(3)
    images = rng.standard_normal((3, 3, 80, 48), dtype=np.float32)
    captions = [rng.standard_normal((length, 40), dtype=np.float32) for length in (3, 17, 32)]
    times = np.asarray([0.0, 0.4, 1.0], np.float32)
    with Pipeline.open(bundles.path("tiny-16")) as pipe:
        together = pipe.denoise(images, times, captions)
        for index in range(3):
            alone = pipe.denoise(images[index : index + 1], times[index], captions[index])
            assert np.abs(together[index] - alone[0]).max() < 2e-6


@pytest.mark.parametrize(
    ("kind", "size"), [("tiny-16", (336, 208)), ("tiny-64", (1216, 320)), ("tiny-128", (1408, 256))]
)
def test_stripes_equal_the_whole(bundles: Bundles, kind: str, size: tuple[int, int]) -> None:
    from l2p_runtime.networks import forecast_call
    from l2p_runtime.requests import plan_call

    image = np.random.default_rng(1).standard_normal((1, 3, *size), dtype=np.float32)
    embeds = np.random.default_rng(2).standard_normal((5, 40), dtype=np.float32)
    with Pipeline.open(bundles.path(kind)) as pipe:
        whole = pipe.denoise(image, 0.25, embeds)
        model = pipe.bundle.manifest.model
        held = sum(pipe._networks.held_bytes.values()) + pipe._networks.opened.backend.library_bytes
        grid = (size[0] // model.patch_px, size[1] // model.patch_px)
        need = forecast_call(pipe._networks.opened, 1, grid, 32, 1)
    stripe_counts = []
    for rows in (9, 10):
        budget = held + need.buffers_bytes + rows * need.head_row_bytes
        stripes = plan_call(model, grid, need, budget - held, budget - held)
        stripe_counts.append(len(stripes))
        with Pipeline.open(bundles.path(kind), memory_budget=budget) as pipe:
            assert np.abs(pipe.denoise(image, 0.25, embeds) - whole).max() <= 1e-6
    assert min(stripe_counts) > 1


def test_guidance_combines_two_predictions(bundles: Bundles) -> None:
    rng = np.random.default_rng(5)
    positive, negative = (rng.standard_normal((length, 40), dtype=np.float32) for length in (40, 8))
    with Pipeline.open(bundles.path("tiny-16")) as pipe:
        found = pipe.generate(
            prompt_embeds=positive, negative_embeds=negative, height=32, width=48, seed=3, steps=2, guidance=2.5,
            shift=3.0, dtype="float16",
        )  # fmt: skip
        from l2p_runtime.noise import normal_noise

        image = normal_noise(3, rows=(0, 32), cols=(0, 48))[np.newaxis].astype(np.float64)
        for sigma, following in ((1.0, 0.75), (0.75, 0.0)):
            noisy = image.astype(np.float32)
            v_pos, v_neg = (
                -pipe.denoise(noisy, 1 - sigma, embeds).astype(np.float64) for embeds in (positive, negative)
            )
            image += (v_neg + 2.5 * (v_pos - v_neg)) * (following - sigma)
    expected = (np.clip(image[0], -1, 1).transpose(1, 2, 0) + 1) / 2
    assert np.abs(found.astype(np.float64) - expected).max() < 1e-3


def test_torch_noise_draws_what_a_torch_user_would(bundles: Bundles) -> None:
    embeds = np.zeros((2, 40), np.float32)
    with Pipeline.open(bundles.path("tiny-16")) as pipe:
        ours = pipe.generate(
            prompt_embeds=embeds, height=32, width=32, seed=9, steps=1, rng="torch-cpu", dtype="uint16"
        )
        noise = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(9)).numpy()
        drawn = noise + pipe.denoise(noise, 0.0, embeds)
    expected = np.rint((np.clip(drawn[0], -1, 1).transpose(1, 2, 0) + 1) * 32767.5)
    assert np.abs(ours.astype(np.float64) - expected).max() <= 2


def _golden_error(bundle: Path, plan: str) -> float:
    worst = 0.0
    with np.load(GOLDEN) as golden, Pipeline.open(bundle, plan=plan) as pipe:
        for case in "01":
            found = pipe.denoise(golden[f"{case}.image"], golden[f"{case}.time"], golden[f"{case}.caption"])
            worst = max(worst, float(np.abs(found - golden[f"{case}.prediction"]).max()))
    return worst


def test_the_generator_is_the_golden_one() -> None:
    assert len(tiny_checkpoint.shapes()) == 185
