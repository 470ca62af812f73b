from __future__ import annotations

import math

import pytest

from golden import tiny_checkpoint
from l2p_export.checkpoint.demo import demo_dimensions
from l2p_export.families import known_as
from l2p_export.families.qwen3.dimensions import TextEncoderDimensions, text_encoder_shapes
from l2p_export.families.z_image_l2p import ZImageModel
from l2p_export.families.z_image_l2p.dimensions import (
    VARIANTS,
    dimensions_from_shapes,
    expected_shapes,
    network_blocks,
    published_dimensions,
)
from l2p_export.families.z_image_l2p.latent_shapes import latent_shapes
from l2p_export.families.z_image_l2p.specs import model_spec, network_specs
from l2p_export.tensors.checkpoint import fingerprint
from l2p_runtime.errors import ArtifactError

PUBLISHED_FILES = {
    "L2P 1K": (expected_shapes(published_dimensions("1k")), 545, 6_166_464_515),
    "L2P 4K": (expected_shapes(published_dimensions("4k")), 557, 6_210_711_491),
    "L2P 8K": (expected_shapes(published_dimensions("8k")), 563, 6_352_274_407),
    "L2P 10K": (expected_shapes(published_dimensions("10k")), 557, 6_453_001_959),
    "Z-Image (latent)": (latent_shapes(published_dimensions("1k")), 521, 6_154_908_736),
    "Qwen3-4B text encoder": (text_encoder_shapes(TextEncoderDimensions()), 398, 4_022_468_096),
}


@pytest.mark.parametrize("name", PUBLISHED_FILES)
def test_published_fingerprints_counts_and_totals(name: str) -> None:
    shapes, tensors, parameters = PUBLISHED_FILES[name]
    assert len(shapes) == tensors
    assert sum(math.prod(shape) for shape in shapes.values()) == parameters
    assert known_as(fingerprint(shapes)) == name


@pytest.mark.parametrize("variant", VARIANTS.values())
def test_dimensions_are_read_back_from_shapes(variant: str) -> None:
    published = published_dimensions(variant)
    assert dimensions_from_shapes(expected_shapes(published)) == published
    demo = demo_dimensions(published.patch_px)
    assert dimensions_from_shapes(expected_shapes(demo)) == demo


@pytest.mark.parametrize("patch", [16, 64, 128])
def test_the_golden_checkpoint_has_our_shapes(patch: int) -> None:
    shapes = tiny_checkpoint.shapes(patch)
    assert expected_shapes(dimensions_from_shapes(shapes)) == shapes


def test_parts_have_the_published_parameter_counts() -> None:
    shapes = expected_shapes(published_dimensions("1k"))

    def count(prefix: str) -> int:
        return sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(prefix))

    assert count("layers.7.") == count("noise_refiner.1.") == 180_910_336
    assert count("context_refiner.0.") == 176_962_816
    assert count("all_x_embedder.") == 2_952_960
    assert count("cap_embedder.") == 9_836_800
    assert count("t_embedder.") == 525_568
    assert count("local_decoder.") == 10_085_123


@pytest.mark.parametrize(
    ("layers", "trunk"),
    [(30, range(5, 25)), (6, range(1, 5)), (12, range(2, 10)), (3, range(1, 2)), (2, range(2)), (1, range(1))],
)
def test_a_sixth_of_the_layers_stays_outside_the_trunk(layers: int, trunk: range) -> None:
    from dataclasses import replace

    d = replace(demo_dimensions(16), layers=layers)
    assert d.trunk == trunk
    blocks = [block for name in ("stem", "trunk", "tail") for block in network_blocks(name, d) if block[0] == "l"]
    assert blocks == [f"layers.{index}" for index in range(layers)]


def test_everything_wrong_is_named_at_once() -> None:
    expected = expected_shapes(demo_dimensions(16))
    shapes = {name: shape for name, shape in expected.items() if not name.startswith("layers.3.")}
    del shapes["layers.1.attention.to_q.weight"]
    shapes["cap_pad_token"] = (1, 97)
    shapes["lora.down"] = (4, 4)
    faults = ZImageModel(dimensions_from_shapes(shapes)).faults(shapes)
    assert faults == [
        "missing `layers.1.attention.to_q.weight`",
        "missing `layers.3`, all 15 tensors",
        "unknown `lora.down`",
        "`cap_pad_token` has shape [1, 97], expected [1, 96]",
    ]


def test_other_checkpoints_are_told_apart() -> None:
    with pytest.raises(ArtifactError, match="latent"):
        dimensions_from_shapes(latent_shapes(demo_dimensions(16)))
    with pytest.raises(ArtifactError, match="not an L2P checkpoint"):
        dimensions_from_shapes({"model.weight": (3, 3)})


@pytest.mark.parametrize(("variant", "tokens"), [("1k", 65_536), ("4k", 4_096), ("8k", 1_024)])
def test_token_counts_at_4096_px(variant: str, tokens: int) -> None:
    assert (4096 // published_dimensions(variant).patch_px) ** 2 == tokens


def test_native_variants_share_one_token_grid() -> None:
    assert {
        side // published_dimensions(v).patch_px
        for v, side in (("1k", 1024), ("4k", 4096), ("8k", 8192), ("10k", 10240))
    } == {64}


def test_rotary_axes_are_a_quarter_and_three_eighths() -> None:
    assert model_spec(published_dimensions("1k")).rotary.axis_channels == (32, 48, 48)


def test_the_halo_covers_the_reach_of_the_head() -> None:
    for variant in ("1k", "4k", "8k"):
        d = published_dimensions(variant)
        assert d.patch_px == 2 ** len(d.levels)
        assert 3 * (2 ** len(d.levels) - 1) < 3 * d.patch_px
        assert model_spec(d).head.halo_rows == 3
    assert model_spec(published_dimensions("10k")).head.halo_rows is None


def test_networks_have_the_designed_inputs_and_outputs() -> None:
    caption, stem, trunk, tail, head = network_specs(published_dimensions("4k"))
    assert [spec.describe() for spec in caption.inputs] == ["[B, 32*t, 2560]", "[B, 32*t]", "[32*t, 64]", "[32*t, 64]"]
    assert [spec.name for spec in stem.outputs] == ["tokens", "modulation"]
    assert stem.inputs[0].describe() == "[B, 3, 64*h, 64*w]"
    assert trunk.inputs == tail.inputs
    assert [spec.describe() for spec in head.inputs] == ["[B, 3, 64*r, 64*w]", "[B, r, w, 3840]"]
    assert {spec.dtype for net in (caption, stem, trunk, tail, head) for spec in net.outputs} == {"float32"}
