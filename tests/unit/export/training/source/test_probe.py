"""The probe that a source learns with: what it is asked, and what it changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from l2p_export.families.z_image_l2p.specs import model_spec
from l2p_export.training.source.autoencoder import CONFIG
from l2p_export.training.source.latents import SceneSet, scene_latents
from l2p_export.training.source.model import SourceModel, initial_source, source_dimensions
from l2p_export.training.source.tokens import CAPTION_TOKENS, caption_ids, world_tokenizer
from l2p_export.world.captions import describe
from l2p_export.world.render import LABELS
from l2p_export.world.scenes import BACKGROUNDS, Thing
from l2p_runtime.positions import rope_tables
from l2p_runtime.progress import Silent

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> SourceModel:
    return initial_source(source_dimensions(), 0)


def test_a_probed_call_predicts_what_a_plain_one_does(model: SourceModel) -> None:
    d = source_dimensions()
    draws = torch.Generator().manual_seed(0)
    tables = [torch.from_numpy(table) for table in rope_tables(model_spec(d), 2, 3, CAPTION_TOKENS)]
    latents = torch.randn((2, 16, 4, 6), generator=draws)
    ids = caption_ids(world_tokenizer(), ["a red circle", "a blue square above a red circle"])
    time = torch.tensor([0.2, 0.9])
    plain = model(latents, time, ids, *tables)
    made, scores = model.probed(latents, time, ids, *tables)
    assert made.equal(plain)
    assert scores.shape == (2, 6, len(LABELS))
    scores.square().sum().backward()  # type: ignore[no-untyped-call]
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert {"probe.weight", "latent.body.layers.3.feed_forward.w2.weight"} <= reached
    assert not any(name.startswith(("latent.body.layers.4.", "latent.final.")) for name in reached)
    # No hook stays behind.
    assert not model.latent.body.layers["3"]._forward_hooks


def test_shares_belong_to_their_captions(tmp_path: Path) -> None:
    """What lies where is that of the same scene as latents and caption, read or made."""
    torch.manual_seed(0)
    autoencoder = AutoencoderKL(**CONFIG, sample_size=128)
    autoencoder.register_to_config(scaling_factor=1.0, shift_factor=0.0)
    tokenizer = world_tokenizer()
    scenes = SceneSet(12, 128, 5)
    made, read = (scene_latents(tmp_path / "latents", autoencoder, tokenizer, scenes, Silent()) for _ in range(2))
    assert read.latents.equal(made.latents)
    assert read.shares.equal(made.shares)
    assert made.shares.shape == (12, 64, len(LABELS))
    for ids, shares in zip(made.ids.tolist(), made.shares.float().numpy(), strict=True):
        text = tokenizer.decode([token for token in ids if token >= 0]).split("user\n")[1].split("\n")[0]
        description = describe(text)
        present = {label for label, share in zip(LABELS, shares.sum(0), strict=True) if share > 0}
        assert {label for label in present if isinstance(label, Thing)} == set(description.things)
        assert present & set(BACKGROUNDS) == {description.background or "white"}
        np.testing.assert_allclose(shares.sum(1), 1, atol=2e-3)
