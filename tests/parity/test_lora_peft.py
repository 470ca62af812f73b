"""LoRAs that PEFT and diffusers write, merged by us and by them.

They merge in float32, we in float64 with one rounding, so the last bits differ by the order of their additions.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from fakes.tensor_array import TensorArray
from l2p_export.checkpoint.lora import LoraRequest, merge_loras, open_lora
from l2p_export.families.z_image_l2p import Z_IMAGE_L2P, ZImageModel
from l2p_export.tensors.sources import read_tensor
from parity.models import load_network, published_like, random_state

# Largest difference over the largest weight of a tensor; 1.8e-7 was measured.
TOLERANCE = 1e-6

LINEARS = ("to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3", "adaLN_modulation.0", "16-1", "mlp.0", "mlp.2")
CONVOLUTIONS = ("enc1.0", "enc3.0", "bottleneck.0", "up2.1", "dec1.0", "out_conv")


pytestmark = pytest.mark.usefixtures("one_thread")


def small_network(name: str) -> nn.Module:
    d = published_like(width=64, head_width=16, caption_width=24, layers=3, refiners=1, time_hidden=32)
    d = replace(d, levels=tuple(replace(s, encoder=8, up=8, decoder=8) for s in d.levels), bottleneck=16)
    module = load_network(name, d, random_state(ZImageModel(d).shapes, seed=1))
    for path, layer in list(module.named_modules()):
        if isinstance(layer, nn.Conv2d):
            # PEFT makes its halves by calling the type of the layer as if it were torch's own.
            plain = nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size, padding=layer.padding)
            plain.load_state_dict(layer.state_dict())
            module.set_submodule(path, plain)
    return module


def randomise(module: nn.Module) -> None:
    """PEFT starts with B at zero; a trained one is not."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)


def error(path: Path, start: Mapping[str, Tensor], wanted: Mapping[str, Tensor], strength: float = 1.0) -> float:
    """The largest relative difference over all weights; those not touched must be the same objects."""
    tensors = {name: TensorArray(value.numpy()) for name, value in start.items()}
    shapes = {name: source.shape for name, source in tensors.items()}
    lora = open_lora(LoraRequest(path, strength), shapes, Z_IMAGE_L2P.aliases(shapes))
    worst = 0.0
    for name, source in merge_loras(tensors, [lora]).items():
        expected = wanted[name].numpy()
        touched = not np.array_equal(expected, tensors[name].values)
        assert touched == (source is not tensors[name]), name
        if touched:
            difference = np.abs(read_tensor(source) - expected).max() / np.abs(expected).max()
            worst = max(worst, float(difference))
    assert lora.deltas
    return worst


@pytest.mark.parametrize("network", ["caption", "stem", "trunk", "head"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora_alpha": 10},
        {"lora_alpha": 3, "use_rslora": True},
        {"rank_pattern": {"to_q": 2, "w2": 9, "bottleneck.0": 7}, "alpha_pattern": {"to_q": 5, "w1": 1, "dec1.0": 2}},
    ],
    ids=["alpha 8", "alpha 10", "rslora", "patterns"],
)
def test_the_same_as_peft(tmp_path: Path, network: str, options: dict[str, Any]) -> None:
    module = small_network(network)
    start = {name: value.clone() for name, value in module.state_dict().items()}
    targets = CONVOLUTIONS if network == "head" else ("cap_embedder.1", *LINEARS)
    present = [end for end in targets if any(f".{name}".endswith(f".{end}") for name, _ in module.named_modules())]
    # PEFT warns of patterns that this network has no layer for.
    options = {
        key: {end: number for end, number in value.items() if end in present} if isinstance(value, dict) else value
        for key, value in options.items()
    }
    config = LoraConfig(target_modules=present, r=4, **options)
    model = get_peft_model(copy.deepcopy(module), config)
    randomise(model)
    model.save_pretrained(tmp_path)
    wanted = model.merge_and_unload().state_dict()
    assert error(tmp_path, start, wanted) <= TOLERANCE


@pytest.mark.parametrize("strength", [1.0, 0.7, -0.4])
def test_the_same_as_diffusers(tmp_path: Path, strength: float) -> None:
    torch.manual_seed(3)
    model = ZImageTransformer2DModel(
        dim=64, n_heads=2, n_kv_heads=2, n_layers=2, n_refiner_layers=1, cap_feat_dim=24, axes_dims=[8, 12, 12]
    )
    start = {name: value.clone() for name, value in model.state_dict().items()}
    model.add_adapter(
        LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_v", "to_out.0", "w2", "layers.0.adaLN_modulation.0"])
    )
    randomise(model)
    model.save_lora_adapter(tmp_path)
    model.fuse_lora(lora_scale=strength)
    model.unload_lora()
    assert error(tmp_path, start, model.state_dict(), strength) <= TOLERANCE
