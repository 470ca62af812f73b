"""A small model, and LoRA files for it in the spellings of every tool."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import save_file

from l2p_export.checkpoint.lora import Lora, LoraRequest, merge_loras, open_lora
from l2p_export.families.z_image_l2p import Z_IMAGE_L2P
from l2p_export.tensors.sources import TensorSource, read_tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

Array = np.ndarray[Any, np.dtype[Any]]
State = dict[str, Array]

D, FFN, TIME, CAPTION = 6, 8, 4, 5


def _shapes() -> dict[str, tuple[int, ...]]:
    """A model of 3 layers that is small enough to write a thousand times."""
    shapes: dict[str, tuple[int, ...]] = {
        "all_x_embedder.16-1.weight": (D, 12),
        "all_x_embedder.16-1.bias": (D,),
        "t_embedder.mlp.0.weight": (7, 9),
        "t_embedder.mlp.2.weight": (TIME, 7),
        "cap_embedder.0.weight": (CAPTION,),
        "cap_embedder.1.weight": (D, CAPTION),
        "x_pad_token": (1, D),
        "local_decoder.enc1.0.weight": (4, 3, 3, 3),
        "local_decoder.bottleneck.0.weight": (5, 4 + D, 1, 1),
    }
    for block in ("layers.0", "layers.1", "layers.2", "noise_refiner.0", "context_refiner.0"):
        for projection in ("to_q", "to_k", "to_v", "to_out.0"):
            shapes[f"{block}.attention.{projection}.weight"] = (D, D)
        shapes[f"{block}.attention_norm1.weight"] = (D,)
        shapes[f"{block}.feed_forward.w1.weight"] = (FFN, D)
        shapes[f"{block}.feed_forward.w2.weight"] = (D, FFN)
        shapes[f"{block}.feed_forward.w3.weight"] = (FFN, D)
        if not block.startswith("context"):
            shapes[f"{block}.adaLN_modulation.0.weight"] = (4 * D, TIME)
    return shapes


SHAPES = _shapes()
ALIASES = Z_IMAGE_L2P.aliases(SHAPES)
TARGETS = tuple(name.removesuffix(".weight") for name, shape in SHAPES.items() if len(shape) > 1 and "pad" not in name)
Q = "layers.1.attention.to_q"
QKV = tuple(f"layers.1.attention.{name}" for name in ("to_q", "to_k", "to_v"))


@dataclass(frozen=True)
class ArraySource:
    """A tensor in memory that hands out pieces of any size it likes."""

    values: NDArray[np.float32]
    dtype: str = "BF16"
    piece: int = 5

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def chunks(self, chunk_bytes: int = 0) -> Iterator[NDArray[np.float32]]:
        flat = self.values.reshape(-1)
        step = self.piece if chunk_bytes == 0 else max(1, chunk_bytes // 4)
        for start in range(0, flat.size, step):
            yield flat[start : start + step]


@dataclass(frozen=True)
class Pair:
    """What a tool trained for one layer; alpha None where it stored none."""

    down: NDArray[np.float32]
    up: NDArray[np.float32]
    alpha: float | None = None

    @property
    def rank(self) -> int:
        return len(self.down)


def base() -> dict[str, TensorSource]:
    rng = np.random.default_rng(0)
    return {name: ArraySource(rng.standard_normal(shape, np.float32)) for name, shape in SHAPES.items()}


def random_pair(layer: str, rank: int, seed: int, alpha: float | None = None) -> Pair:
    rng = np.random.default_rng(seed)
    shape = SHAPES[f"{layer}.weight"]
    ones = (1,) * (len(shape) - 2)
    down = rng.standard_normal((rank, *shape[1:]), np.float32)
    return Pair(down, rng.standard_normal((shape[0], rank, *ones), np.float32), alpha)


def pairs_of(*layers: str, rank: int = 2, alpha: float | None = None) -> dict[str, Pair]:
    return {layer: random_pair(layer, rank, seed, alpha) for seed, layer in enumerate(layers)}


def spelled(
    pairs: Mapping[str, Pair], name: Callable[[str], str] = str, down: str = "lora_A.weight", up: str = "lora_B.weight"
) -> State:
    """Keys as one tool writes them, alpha as a tensor."""
    state: State = {}
    for layer, pair in pairs.items():
        state |= {f"{name(layer)}.{down}": pair.down, f"{name(layer)}.{up}": pair.up}
        if pair.alpha is not None:
            state[f"{name(layer)}.alpha"] = np.asarray(pair.alpha, np.float32)
    return state


def with_fused(pairs: Mapping[str, Pair]) -> dict[str, Pair]:
    """The three projections of layer 1 as one, when they share what comes before."""
    first = pairs[Q]
    rows = np.concatenate([pairs[layer].up for layer in QKV])
    rest = {layer: pair for layer, pair in pairs.items() if layer not in QKV}
    return rest | {"layers.1.attention.qkv": Pair(first.down, rows, first.alpha)}


def renamed(layer: str) -> str:
    """Names of the node-based user interfaces."""
    return layer.replace(".attention.to_out.0", ".attention.out").replace("all_x_embedder.16-1", "x_embedder")


def flat(layer: str) -> str:
    return layer.replace(".", "_")


def opened(folder: Path, state: State, strength: float = 1.0, metadata: dict[str, str] | None = None) -> Lora:
    path = folder / "x.safetensors"
    save_file({name: np.array(value, order="C") for name, value in state.items()}, path, metadata)
    return open_lora(LoraRequest(path, strength), SHAPES, ALIASES)


def values_of(tensors: Mapping[str, TensorSource]) -> State:
    return {name: read_tensor(source) for name, source in tensors.items()}


def merged(loras: Sequence[Lora]) -> State:
    return values_of(merge_loras(base(), loras))


def assert_same(found: State, wanted: State) -> None:
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def by_hand(pairs: Mapping[str, Pair], strength: float = 1.0) -> State:
    """The definition, in float64 and without a matrix product."""
    wanted = values_of(base())
    for layer, pair in pairs.items():
        scale = strength * (1.0 if pair.alpha is None else pair.alpha / pair.rank)
        up, down = pair.up.reshape(-1, pair.rank).astype(np.float64), pair.down.reshape(pair.rank, -1)
        delta = sum(np.outer(up[:, r], down[r].astype(np.float64)) for r in range(pair.rank))
        name = f"{layer}.weight"
        wanted[name] = wanted[name] + np.asarray(scale * delta).reshape(SHAPES[name])
    return wanted


def peft_config(pairs: Mapping[str, Pair]) -> dict[str, Any]:
    """What PEFT writes beside: one alpha, and a pattern for layers of another."""
    pattern = {layer: pair.rank if pair.alpha is None else pair.alpha for layer, pair in pairs.items()}
    return {"lora_alpha": 8, "r": 8, "alpha_pattern": pattern, "init_lora_weights": True}


def dotted(layer: str) -> str:
    """As some trainers of Z-Image write it: `attention.to.q`."""
    return layer.replace(".to_", ".to.")


def every_spelling(pairs: Mapping[str, Pair]) -> dict[str, tuple[State, dict[str, str] | None]]:
    """Tool to keys and metadata, all of them the same LoRA."""
    bare = {layer: replace(pair, alpha=None) for layer, pair in pairs.items()}
    config = peft_config(pairs)
    prefixed = {f"transformer.{key}": value for key, value in config.items()}
    peft = "base_model.model.{}".format
    spellings: dict[str, tuple[State, dict[str, str] | None]] = {
        "peft": (spelled(bare, peft), {"adapter_config": json.dumps(config)}),
        "peft, adapter named": (
            spelled(bare, peft, "lora_A.default.weight", "lora_B.default.weight"),
            {"peft_config": json.dumps(config)},
        ),
        "peft, adapter of another name": (
            spelled(bare, peft, "lora_A.style.weight", "lora_B.style.weight"),
            {"peft_config": json.dumps(config)},
        ),
        "diffusers model": (spelled(bare), {"lora_adapter_metadata": json.dumps(config)}),
        "diffusers pipeline": (
            spelled(bare, "transformer.{}".format),
            {"lora_adapter_metadata": json.dumps(prefixed)},
        ),
        "ai-toolkit": (spelled(pairs, "diffusion_model.{}".format), None),
        "peft around a prefix": (spelled(pairs, "base_model.model.model.diffusion_model.{}".format), None),
        "bare": (spelled(pairs), None),
        "node UI": (spelled(pairs, lambda layer: f"diffusion_model.{renamed(layer)}"), None),
        "down and up": (spelled(pairs, "diffusion_model.{}".format, "lora_down.weight", "lora_up.weight"), None),
        "dots": (spelled(pairs, "transformer.{}".format, "lora.down.weight", "lora.up.weight"), None),
        "dots for underscores": (spelled(pairs, dotted, "lora.down.weight", "lora.up.weight"), None),
        "linear layer": (
            spelled(pairs, "unet.{}".format, "lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
            None,
        ),
        "no weight": (spelled(pairs, "diffusion_model.{}".format, "lora_A", "lora_B"), None),
    }
    joined = spelled({f"{layer}_lora": pair for layer, pair in bare.items()}, down="down.weight", up="up.weight")
    spellings["attached"] = (joined, {"adapter_config": json.dumps(config)})
    for prefix in ("module.", "_orig_mod.", "dit.", "net.", "pipe.dit.", "base_model.model.transformer."):
        name = (prefix + "{}").format
        spellings[f"{prefix} kohya"] = (spelled(pairs, name, "lora_down.weight", "lora_up.weight"), None)
    for prefix in ("lora_unet_", "lora_unet__", "lora_transformer_", "lora_dit_", "lycoris_"):
        for alias in (str, renamed):
            name = lambda layer, prefix=prefix, alias=alias: prefix + flat(alias(layer))  # noqa: E731
            spellings[f"{prefix} {alias.__name__}"] = (spelled(pairs, name, "lora_down.weight", "lora_up.weight"), None)
    if all(layer in pairs and pairs[layer].down is pairs[Q].down for layer in QKV):
        fused = with_fused(pairs)
        spellings["fused"] = (spelled(fused, "diffusion_model.{}".format), None)
        kohya = spelled(fused, lambda layer: "lora_unet_" + flat(renamed(layer)), "lora_down.weight", "lora_up.weight")
        spellings["fused kohya"] = (kohya, None)
        spellings["fused beside its parts"] = (kohya | spelled({layer: pairs[layer] for layer in QKV}), None)
    return spellings
