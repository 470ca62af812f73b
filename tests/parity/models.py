"""Random small models that the parity tests share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from l2p_export.checkpoint.demo import demo_dimensions
from l2p_export.families.z_image_l2p import ZImageModel
from l2p_export.families.z_image_l2p.dimensions import Dimensions
from l2p_export.families.z_image_l2p.networks import network_module
from l2p_runtime.backends.host import HostDevice
from l2p_runtime.contract import ModelSpec, NetworkSpec
from l2p_runtime.denoiser import Condition, Denoiser, encode_caption
from l2p_runtime.policies import axis_frequencies

if TYPE_CHECKING:
    from numpy.typing import NDArray

State = Mapping[str, Tensor]


def published_like(
    *, width: int, head_width: int, caption_width: int, layers: int, refiners: int, time_hidden: int = 1024
) -> Dimensions:
    """A small 16 px model whose other sizes follow from the width as in the published one."""
    return replace(
        demo_dimensions(16),
        width=width,
        head_width=head_width,
        ffn_width=int(width / 3 * 8),
        caption_width=caption_width,
        time_width=min(width, 256),
        time_hidden=time_hidden,
        layers=layers,
        noise_refiners=refiners,
        context_refiners=refiners,
    )


def random_state(shapes: Mapping[str, tuple[int, ...]], seed: int, gain: float = 1.5) -> dict[str, Tensor]:
    """Gains near 1, small biases and pads, weights whose layer multiplies the variance by `gain`."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        if name.endswith(("bias", "pad_token")):
            state[name] = values * 0.1
        elif len(shape) == 1:
            state[name] = 1.0 + 0.1 * values
        else:
            state[name] = values * math.sqrt(gain / math.prod(shape[1:]))
    return state


def load_network(name: str, d: Dimensions, state: State) -> nn.Module:
    """One of our networks in float32; every one of its tensors must be in the state."""
    with torch.device("meta"):
        module = network_module(name, d, lambda layer: torch.float32, ZImageModel(d).blocks(name))
    module.load_state_dict({key: state[key] for key in module.state_dict()}, assign=True)
    return module


def call(module: nn.Module, **inputs: NDArray[Any] | Tensor) -> tuple[Tensor, ...]:
    """Run a network on arrays or tensors; a tuple of outputs whatever their number."""
    tensors = {name: torch.as_tensor(value) for name, value in inputs.items()}
    with torch.no_grad():
        made = module(**tensors)
    return made if isinstance(made, tuple) else (made,)


@dataclass
class TorchEngine:
    """One of our torch networks as the runtime's `Engine`, so that the runtime's own code feeds it."""

    module: nn.Module
    spec: NetworkSpec

    def run(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        made = call(self.module, **inputs)
        for out, values in zip(self.spec.outputs, made, strict=True):
            outputs[out.name][...] = values.numpy()

    def memory_bytes(self) -> int:
        return 0

    def close(self) -> None:
        pass


def condition(
    d: Dimensions, state: State, prompt_embeds: Sequence[NDArray[np.float32]], rows: int, columns: int
) -> Condition:
    """Caption tokens and rotary tables, with the padding that the runtime makes."""
    model = ZImageModel(d)
    spec = next(spec for spec in model.networks if spec.name == "caption")
    engine = TorchEngine(load_network("caption", d, state), spec)
    denoiser = Denoiser(model.spec, HostDevice(), lambda _: nullcontext(engine))
    axes = axis_frequencies(denoiser.model.rotary, (rows, columns), "native")
    return encode_caption(denoiser, prompt_embeds, rows, columns, axes)


def network_spec(d: Dimensions, name: str) -> NetworkSpec:
    return next(spec for spec in ZImageModel(d).networks if spec.name == name)


def model_spec(d: Dimensions) -> ModelSpec:
    return ZImageModel(d).spec


def relative_error(found: NDArray[Any] | Tensor, expected: NDArray[Any] | Tensor) -> float:
    """Length of the difference over the length of what was expected, in float64; shapes must agree."""
    a, b = (np.asarray(value, dtype=np.float64) for value in (found, expected))
    assert a.shape == b.shape
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
