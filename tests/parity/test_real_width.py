"""One block at the published width: against diffusers, and as FP32 and FP16 graphs against torch."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_z_image import ZImageTransformerBlock
from torch import Tensor

from l2p_export.families.z_image_l2p import ZImageModel
from l2p_export.families.z_image_l2p.blocks import Block
from l2p_export.families.z_image_l2p.dimensions import Dimensions, published_dimensions
from l2p_export.precision.plans import plain_plan
from l2p_export.tensors.sources import TensorSource
from l2p_runtime.positions import rope_tables
from parity.graphs import Arrays, export, network_shapes, run, store
from parity.models import call, model_spec, relative_error

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Three layers, of which the trunk is the middle one.
DIMENSIONS = replace(published_dimensions("1k"), layers=3)
BLOCK = "layers.1."
GRID, CAPTION_TOKENS = (6, 10), 32

# Three times what was measured, which stands in brackets.
DIFFUSERS = 1e-6  # (equal to the last bit)
FP32_GRAPH = 3e-6  # (9.8e-7)
FP16_GRAPH = 3e-3  # (9.8e-4)


@dataclass
class RealBlock:
    """A checkpoint of one block, its inputs, and what torch and diffusers make of them in float32."""

    tensors: Mapping[str, TensorSource]
    inputs: Arrays
    ours: NDArray[np.float32]
    diffusers: NDArray[np.float32]


@pytest.fixture(scope="module")
def real_block(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealBlock]:
    state = {BLOCK + name: value for name, value in _weights(DIMENSIONS).items()}
    inputs = _inputs(DIMENSIONS)
    ours, diffusers = _in_torch(state, inputs)
    path = tmp_path_factory.mktemp("real") / "block.safetensors"
    tensors = store(state, path)
    state.clear()
    gc.collect()
    yield RealBlock(tensors, inputs, ours, diffusers)
    # 0.7 GB that nobody needs any more.
    path.unlink()


def test_block_equals_diffusers(real_block: RealBlock) -> None:
    assert relative_error(real_block.ours, real_block.diffusers) <= DIFFUSERS


@pytest.mark.parametrize(("plan", "tolerance"), [("fp32", FP32_GRAPH), ("fp16", FP16_GRAPH)])
def test_graph_equals_torch(real_block: RealBlock, plan: str, tolerance: float, tmp_path: Path) -> None:
    """FP32 at opset 20 with attention written out, FP16 at opset 23 with the whole operator.

    Compared is what the block adds to its input: the input itself goes through and would hide an error.
    """
    precision = plain_plan(ZImageModel(DIMENSIONS), plan)
    assert precision.opset == {"fp32": 20, "fp16": 23}[plan]
    engine = export(DIMENSIONS, "trunk", real_block.tensors, tmp_path, precision)
    (found,) = run(engine, real_block.inputs)
    engine.close()
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    gc.collect()
    tokens = real_block.inputs["tokens"]
    assert relative_error(found - tokens, real_block.ours - tokens) <= tolerance


def _weights(d: Dimensions) -> dict[str, Tensor]:
    """Weights of standard deviation 0.02, gains near 1."""
    generator = torch.Generator().manual_seed(3840)
    assert ZImageModel(d).blocks("trunk") == (BLOCK.removesuffix("."),)
    weights = {}
    for name, shape in network_shapes(d, "trunk").items():
        values = torch.empty(shape).normal_(generator=generator)
        is_gain = len(shape) == 1 and name.endswith("weight")
        weights[name.removeprefix(BLOCK)] = values.mul_(0.1).add_(1.0) if is_gain else values.mul_(0.02)
    assert sum(value.numel() for value in weights.values()) == 180_910_336
    return weights


def _inputs(d: Dimensions) -> Arrays:
    """60 image tokens, 4 pads and 32 caption tokens."""
    cosine, sine = rope_tables(model_spec(d), *GRID, CAPTION_TOKENS)
    assert len(cosine) == 96
    random = np.random.default_rng(96)
    tokens = random.standard_normal((1, 96, d.width), np.float32)
    modulation = random.standard_normal((1, d.time_width), np.float32)
    return {"tokens": tokens, "modulation": modulation, "rope_cos": cosine, "rope_sin": sine}


def _in_torch(state: Mapping[str, Tensor], inputs: Arrays) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Both blocks share the memory of one set of weights."""
    weights = {name.removeprefix(BLOCK): value for name, value in state.items()}
    d = DIMENSIONS
    with torch.device("meta"):
        ours = Block(d, torch.float32, modulated=True)
        theirs = ZImageTransformerBlock(0, d.width, d.heads, d.heads, 1e-5, qk_norm=True)
    ours.load_state_dict(weights, assign=True)
    theirs.load_state_dict(weights, assign=True)
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    rotation = torch.complex(tensors["rope_cos"], tensors["rope_sin"]).unsqueeze(0)
    x, modulation = tensors["tokens"], tensors["modulation"]
    (found,) = call(ours.eval(), x=x, **{name: value for name, value in inputs.items() if name != "tokens"})
    with torch.no_grad():
        expected = theirs.eval()(x, None, rotation, modulation)
    return found.numpy(), expected.numpy()
