"""LoRA, LoHa, LoKr and DoRA of PEFT and LyCORIS on random layers, merged by us, beside their own forward passes.

Forward passes and not merges: LyCORIS 4.1.3 applies alpha / r twice when it merges a LoHa or LoKr.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from fakes.tensor_array import TensorArray
from l2p_export.checkpoint.lora import LoraRequest, merge_loras, open_lora
from l2p_export.tensors.sources import read_tensor

# Largest difference of an output over the largest output.
TOLERANCE = 1e-5

pytestmark = pytest.mark.usefixtures("one_thread")


class Layers(nn.Module):
    """Linear layers of several shapes and convolutions, each with an input of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.config: dict[str, Any] = {}
        self.square = nn.Linear(24, 24, bias=False)
        self.wide = nn.Linear(36, 20)
        self.tall = nn.Linear(8, 42)
        self.conv = nn.Conv2d(12, 16, 3, padding=1)
        self.point = nn.Conv2d(12, 16, 1)

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: getattr(self, name)(value) for name, value in inputs.items()}


NAMES = ("square", "wide", "tall", "conv", "point")
LINEAR = ("square", "wide", "tall")


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = {"square": (5, 24), "wide": (5, 36), "tall": (5, 8), "conv": (2, 12, 6, 6), "point": (2, 12, 6, 6)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def randomise(module: nn.Module, names: tuple[str, ...] = ("lora_", "hada_", "lokr_", "dora_", "scalar")) -> None:
    """Tools start one factor at zero; trained ones are not."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in module.named_parameters():
        if any(part in name for part in names):
            noise = torch.randn(parameter.shape, generator=generator)
            is_magnitude = "magnitude" in name or "dora" in name
            # Magnitudes are near the norms that they start from, and positive.
            parameter.data = parameter.data * (1 + 0.3 * noise.abs()) if is_magnitude else 0.4 * noise


def merged(path: Path, strength: float = 1.0) -> Layers:
    """The layers with the file merged into them."""
    layers = Layers()
    tensors = {name: TensorArray(value.numpy()) for name, value in layers.state_dict().items()}
    lora = open_lora(LoraRequest(path, strength), {name: source.shape for name, source in tensors.items()}, {})
    state = {name: torch.from_numpy(read_tensor(source)) for name, source in merge_loras(tensors, [lora]).items()}
    layers.load_state_dict(state)
    return layers


def error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    assert found.keys() == wanted.keys()
    return max(float((found[name] - wanted[name]).abs().max() / wanted[name].abs().max()) for name in wanted)


PEFT = {
    "lora": LoraConfig(r=4, lora_alpha=6),
    "lora, alpha by pattern": LoraConfig(r=4, alpha_pattern={"squ.*": 3, "wide|tall": 1}, rank_pattern={"^wide": 2}),
    "lora with bias": LoraConfig(r=4, lora_alpha=6, lora_bias=True, target_modules=["wide", "tall", "conv", "point"]),
    "rslora": LoraConfig(r=4, lora_alpha=6, use_rslora=True),
    "dora": LoraConfig(r=4, lora_alpha=6, use_dora=True),
    "dora, rslora": LoraConfig(r=4, lora_alpha=3, use_dora=True, use_rslora=True),
    "loha": LoHaConfig(r=4, alpha=6),
    "loha, effective": LoHaConfig(r=4, alpha=6, use_effective_conv2d=True, alpha_pattern={"conv": 2}),
    "lokr": LoKrConfig(r=2, alpha=6),
    "lokr, both decomposed": LoKrConfig(r=1, alpha=6, decompose_both=True),
    "lokr, both whole": LoKrConfig(r=32, alpha=6, rank_pattern={"wide": 64}, alpha_pattern={"^tall$": 9}),
    "lokr, effective": LoKrConfig(r=2, alpha=5, use_effective_conv2d=True, decompose_factor=4),
}


@pytest.mark.filterwarnings("ignore:.*invalid shape")  # PEFT of the biases that it writes itself
@pytest.mark.parametrize("kind", PEFT)
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_the_same_as_pefts_forward_pass(tmp_path: Path, kind: str, strength: float) -> None:
    config = copy.deepcopy(PEFT[kind])
    config.target_modules = config.target_modules or list(NAMES)
    model = get_peft_model(Layers(), config)
    randomise(model)
    model.save_pretrained(tmp_path)
    # As loaded: saving sorts the keys of a pattern, and the first that matches decides.
    loaded = PeftModel.from_pretrained(Layers(), tmp_path).eval()
    for module in loaded.modules():
        if hasattr(module, "scaling"):
            module.scaling = {name: scale * strength for name, scale in module.scaling.items()}
    with torch.no_grad():
        assert error(merged(tmp_path, strength)(inputs()), loaded.base_model.model(inputs())) <= TOLERANCE


LYCORIS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "locon": (LoConModule, {}),
    "locon, tucker": (LoConModule, {"use_tucker": True}),
    "locon, rslora": (LoConModule, {"rs_lora": True}),
    "locon, scalar": (LoConModule, {"use_scalar": True}),
    "dora": (LoConModule, {"weight_decompose": True, "wd_on_out": True}),
    "dora, inputs": (LoConModule, {"weight_decompose": True, "wd_on_out": False}),
    "loha": (LohaModule, {}),
    "loha, tucker": (LohaModule, {"use_tucker": True}),
    "loha, rslora, dora": (LohaModule, {"rs_lora": True, "weight_decompose": True, "wd_on_out": True}),
    "loha, dora, inputs": (LohaModule, {"weight_decompose": True, "wd_on_out": False}),
    "lokr": (LokrModule, {"lora_dim": 2}),
    "lokr, tucker": (LokrModule, {"lora_dim": 1, "use_tucker": True}),
    "lokr, both decomposed": (LokrModule, {"lora_dim": 1, "decompose_both": True}),
    "lokr, both whole": (LokrModule, {"full_matrix": True, "alpha": 1e10}),
    "lokr, factor": (LokrModule, {"lora_dim": 2, "factor": 4, "unbalanced_factorization": True}),
    "lokr, dora": (LokrModule, {"lora_dim": 2, "weight_decompose": True, "wd_on_out": True}),
    "lokr, dora, inputs": (LokrModule, {"full_matrix": True, "weight_decompose": True, "wd_on_out": False}),
}


@pytest.mark.parametrize("kind", LYCORIS)
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_the_same_as_lycoris_forward_pass(tmp_path: Path, kind: str, strength: float) -> None:
    layers, state, wanted = Layers(), {}, {}
    make, options = LYCORIS[kind]
    for name in NAMES:
        module = make(
            f"lycoris_{name}", getattr(layers, name), strength, **{"lora_dim": 4, "alpha": 6} | options
        ).eval()
        randomise(module)
        state |= {f"lycoris_{name}.{key}": value.detach().contiguous() for key, value in module.state_dict().items()}
        with torch.no_grad():
            wanted[name] = module(inputs()[name])
    save_file(state, tmp_path / "x.safetensors")
    with torch.no_grad():
        assert error(merged(tmp_path / "x.safetensors", strength)(inputs()), wanted) <= TOLERANCE


def test_a_fused_layer_is_rescaled_as_one(tmp_path: Path) -> None:
    """The norm of an input is over the rows of q, k and v together."""
    torch.manual_seed(4)
    whole = nn.Linear(12, 18, bias=False)
    module = LoConModule("", whole, 1.0, lora_dim=2, alpha=1, weight_decompose=True, wd_on_out=False).eval()
    randomise(module)
    state = {f"x.attention.qkv.{key}": value.detach().contiguous() for key, value in module.state_dict().items()}
    save_file(state, tmp_path / "x.safetensors")
    weights = tuple(f"x.attention.to_{part}.weight" for part in "qkv")
    tensors = {
        name: TensorArray(part.detach().numpy()) for name, part in zip(weights, whole.weight.chunk(3), strict=True)
    }
    shapes = {name: source.shape for name, source in tensors.items()}
    lora = open_lora(LoraRequest(tmp_path / "x.safetensors"), shapes, {"x.attention.qkv": weights})
    found = np.concatenate([read_tensor(source) for source in merge_loras(tensors, [lora]).values()])
    x = torch.randn(5, 12)
    with torch.no_grad():
        torch.testing.assert_close(F.linear(x, torch.from_numpy(found)), module(x), rtol=0, atol=TOLERANCE)
