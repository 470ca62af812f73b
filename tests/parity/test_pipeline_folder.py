"""A pipeline folder that diffusers itself saved, as the source of adapters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

from l2p_export.checkpoint.demo import demo_dimensions
from l2p_export.checkpoint.describe import describe
from l2p_export.checkpoint.loading import load_model
from l2p_export.families.z_image_l2p.dimensions import expected_shapes
from l2p_export.tensors.sources import read_tensor


@pytest.mark.parametrize("shard", ["10GB", "500KB"])
def test_a_saved_pipeline_is_a_source(tmp_path: Path, shard: str) -> None:
    torch.manual_seed(0)
    # What diffusers fixes: the time embedding is min(width, 256) wide and 1024 inside.
    d = replace(demo_dimensions(64), time_width=96, time_hidden=1024)
    transformer = ZImageTransformer2DModel(
        dim=d.width, n_layers=d.layers, n_refiner_layers=1, n_heads=d.heads, n_kv_heads=d.heads,
        cap_feat_dim=d.caption_width, axes_dims=[8, 12, 12], axes_lens=[64, 64, 64],
    )  # fmt: skip
    _pipeline(transformer, d.caption_width).save_pretrained(tmp_path / "pipe", max_shard_size=shard)
    shards = list((tmp_path / "pipe" / "transformer").glob("*.safetensors"))
    assert (len(shards) > 1) is (shard == "500KB")

    source = transformer.state_dict()
    frozen = {name for name in source if name.startswith(tuple(f"layers.{index}." for index in d.trunk))}
    shapes = {name: shape for name, shape in expected_shapes(d).items() if name not in frozen}
    adapters = {name: torch.randn(shape) for name, shape in shapes.items()}
    save_file(adapters, tmp_path / "adapters.safetensors")

    loaded = load_model(tmp_path / "adapters.safetensors", tmp_path / "pipe")
    assert loaded.equal_layers == tuple(d.trunk)
    assert loaded.model.spec.variant == "4k"
    for name, tensor in loaded.checkpoint.tensors.items():
        expected = source[name] if name in frozen else adapters[name]
        assert torch.equal(torch.from_numpy(read_tensor(tensor)), expected)
    assert describe(tmp_path / "pipe")["kind"] == "latent source"


def _pipeline(transformer: ZImageTransformer2DModel, caption_width: int) -> ZImagePipeline:
    vae = AutoencoderKL(
        block_out_channels=(8,), latent_channels=16, norm_num_groups=4, layers_per_block=1, sample_size=8,
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
    )  # fmt: skip
    text = Qwen3Model(
        Qwen3Config(
            vocab_size=32, hidden_size=caption_width, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, intermediate_size=32,
        )
    )  # fmt: skip
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "<pad>": 1}, unk_token="<pad>"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=text,
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>"),  # noqa: S106
        transformer=transformer,
    )
