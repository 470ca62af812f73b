"""Ways to write one small checkpoint, for tests of import."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from safetensors.torch import save_file

from golden import tiny_checkpoint
from l2p_export.checkpoint.demo import demo_dimensions
from l2p_export.families.z_image_l2p.dimensions import expected_shapes
from l2p_export.families.z_image_l2p.latent_shapes import latent_shapes

State = dict[str, torch.Tensor]

DIMENSIONS = demo_dimensions(16)


def random_state(seed: int) -> State:
    """A random L2P checkpoint whose frozen layers are F32 and the others BF16, as the published one."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in expected_shapes(DIMENSIONS).items():
        values = torch.randn(shape, generator=generator) * 0.1
        frozen = name.startswith("layers.") and int(name.split(".")[1]) in DIMENSIONS.trunk
        state[name] = values if frozen else values.to(torch.bfloat16)
    return state


def latent_state(state: State, seed: int = 99) -> State:
    """A latent source with the same frozen layers, everything else its own."""
    generator = torch.Generator().manual_seed(seed)
    source = {name: torch.randn(shape, generator=generator) for name, shape in latent_shapes(DIMENSIONS).items()}
    return source | {name: state[name].float() for name in state if is_frozen(name)}


def adapters(state: State) -> State:
    """What training saves: all but the frozen layers."""
    return {name: value for name, value in state.items() if not is_frozen(name)}


def is_frozen(name: str) -> bool:
    return name.startswith("layers.") and int(name.split(".")[1]) in DIMENSIONS.trunk


def fused(state: State, prefix: str) -> State:
    """The spelling of node-based user interfaces."""
    arrays = {name: value.float().numpy() for name, value in state.items()}
    out = {}
    for name, value in tiny_checkpoint.fused(arrays).items():
        dtype = torch.float32 if any(f"layers.{i}." in name for i in DIMENSIONS.trunk) else torch.bfloat16
        out[prefix + name.removeprefix("model.diffusion_model.")] = torch.from_numpy(value).to(dtype)
    return out


def save_sharded(state: State, folder: Path, stem: str, shards: int) -> Path:
    """A Hugging Face folder of several shards and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(state)
    weight_map = {}
    for index in range(shards):
        part = names[index::shards]
        file = f"{stem}-{index + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: state[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index_file = folder / f"{stem}.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def fp8_state(state: State, *, per_row: bool) -> tuple[State, dict[str, np.ndarray]]:
    """Linear weights of the layers as FP8 with scales beside them, and the values that they stand for."""
    stored, meant = {}, {}
    for name, value in state.items():
        values = value.float().numpy()
        if not (name.startswith("layers.") and name.endswith(".weight") and values.ndim == 2):
            stored[name], meant[name] = value, values
            continue
        amax = np.abs(values).max(axis=1, keepdims=True) if per_row else np.abs(values).max()
        scale = np.asarray(amax / 448, np.float32)
        coded = (values / scale).astype(ml_dtypes.float8_e4m3fn)
        stored[name] = torch.from_numpy(coded.view(np.uint8)).view(torch.float8_e4m3fn)
        stored[name.removesuffix(".weight") + ".scale_weight"] = torch.from_numpy(scale)
        meant[name] = coded.astype(np.float32) * scale
    stored["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    return stored, meant
