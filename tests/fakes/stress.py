"""Checkpoints that draw what a good one draws, and in which plain float16 overflows.

Weights are multiplied by powers of two that cancel: in two linear steps in a row, or in a branch that a norm follows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from l2p_calib.layout import layer_of
from l2p_calib.plans.plan import PrecisionPlan
from l2p_export.families.z_image_l2p.dimensions import dimensions_from_shapes, network_blocks
from l2p_export.proof.cases import network_inputs
from l2p_export.tensors.sources import read_tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from l2p_export.checkpoint.loading import LoadedModel

    State = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Stress:
    """One way to overflow.

    Attributes:
        network: where plain float16 overflows first.
        change: multiplies weights of a state in place.
    """

    network: str
    change: Callable[[State], None]


def stressed(state: Mapping[str, NDArray[np.float32]], *names: str) -> State:
    """A copy of a checkpoint with some of `STRESSES`."""
    copied = {name: value.copy() for name, value in state.items()}
    for name in names:
        STRESSES[name].change(copied)
    return copied


def _scale(state: State, name: str, exponent: int, part: Any = ...) -> None:
    state[name][part] *= np.float32(2.0**exponent)


def _feed_forward(block: str, exponent: int, channel: Any = slice(None)) -> Callable[[State], None]:
    """The SwiGLU product is larger, the second linear step takes it back."""

    def change(state: State) -> None:
        _scale(state, f"{block}.feed_forward.w3.weight", exponent, channel)
        _scale(state, f"{block}.feed_forward.w2.weight", -exponent, (slice(None), channel))

    return change


def _values(block: str, exponent: int) -> Callable[[State], None]:
    """The same around attention, which is linear in its values."""

    def change(state: State) -> None:
        _scale(state, f"{block}.attention.to_v.weight", exponent)
        _scale(state, f"{block}.attention.to_out.0.weight", -exponent)

    return change


def _before_norm(layer: str, exponent: int) -> Callable[[State], None]:
    """A norm takes the whole branch back, but for its epsilon, which counts for less."""
    return lambda state: _scale(state, f"{layer}.weight", exponent)


def _upsampled(stage: str, exponent: int) -> Callable[[State], None]:
    """Nothing but a concatenation lies between the convolution after an upsampling and the decoder's."""

    def change(state: State) -> None:
        channels = state[f"local_decoder.up{stage}.1.weight"].shape[0]
        for part in ("weight", "bias"):
            _scale(state, f"local_decoder.up{stage}.1.{part}", exponent)
        _scale(state, f"local_decoder.dec{stage}.0.weight", -exponent, (slice(None), slice(channels)))

    return change


def _residual(exponent: int) -> Callable[[State], None]:
    """The whole stream between blocks: every norm takes it back, and at its end the head's bottleneck."""

    def change(state: State) -> None:
        d = dimensions_from_shapes({name: value.shape for name, value in state.items()})
        for name in state:
            into = name.startswith(("all_x_embedder.", "cap_embedder.1.")) or name.endswith("pad_token")
            if into or name.endswith("_norm2.weight"):
                _scale(state, name, exponent)
        _scale(state, "local_decoder.bottleneck.0.weight", -exponent, (slice(None), slice(-d.width, None)))

    return change


def _everywhere(network: str, exponent: int) -> Callable[[State], None]:
    """The SwiGLU products of a whole network: its layers stay alike."""

    def change(state: State) -> None:
        d = dimensions_from_shapes({name: value.shape for name, value in state.items()})
        for block in network_blocks(network, d):
            _feed_forward(block, exponent)(state)

    return change


STRESSES: Mapping[str, Stress] = {
    "product in the stem": Stress("stem", _feed_forward("noise_refiner.0", 14)),
    "products of the trunk": Stress("trunk", _everywhere("trunk", 14)),
    "values in a trunk layer": Stress("trunk", _values("layers.2", 15)),
    "out-projection in a trunk layer": Stress("trunk", _before_norm("layers.2.attention.to_out.0", 16)),
    "feed-forward in the tail": Stress("tail", _before_norm("layers.5.feed_forward.w2", 16)),
    "one channel of a trunk layer": Stress("trunk", _feed_forward("layers.3", 15, 7)),
    "residual and bottleneck": Stress("caption", _residual(14)),
    "convolution of the head": Stress("head", _upsampled("4", 15)),
}


def run_plan(loaded: LoadedModel, plan: PrecisionPlan, case: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
    """The prediction of one case by torch in the dtypes of a plan: real float16, as a GPU computes it."""
    made = dict(case)
    for spec in loaded.model.networks:
        with torch.device("meta"):
            module = loaded.model.module(
                spec.name, lambda layer: getattr(torch, plan.dtype(layer)), exponent_of=plan.exponent
            )
        weights = {}
        for name, parameter in module.state_dict().items():
            values = read_tensor(loaded.checkpoint.tensors[name]) * np.float32(2.0 ** plan.exponent(layer_of(name)))
            weights[name] = torch.from_numpy(values).to(parameter.dtype)
        module.load_state_dict(weights, assign=True)
        inputs = network_inputs(spec.name, case, made)
        with torch.no_grad():
            found = module(**{name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in inputs.items()})
        values = found if isinstance(found, tuple) else (found,)
        made |= {f"{spec.name}.{out.name}": value.numpy() for out, value in zip(spec.outputs, values, strict=True)}
    return made["head.prediction"]


def write_stressed(path: Path, state: Mapping[str, NDArray[np.float32]], *names: str) -> Path:
    """Write a stressed checkpoint."""
    from safetensors.numpy import save_file

    save_file(stressed(state, *names), path)
    return path
