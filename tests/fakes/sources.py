"""Latent sources for tests: a tiny one with a corpus to train on in seconds, and the published one without its values.

The tiny one's weights are random.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import AutoencoderKL

from l2p_export.families.qwen3.dimensions import TextEncoderDimensions, text_encoder_shapes
from l2p_export.families.z_image_l2p.dimensions import Dimensions, published_dimensions
from l2p_export.families.z_image_l2p.latent_shapes import latent_shapes
from l2p_export.training.corpus.corpus import Corpus, append_rows, open_corpus, write_image
from l2p_export.training.loop.loop import Schedule
from l2p_export.training.source.autoencoder import CONFIG
from l2p_export.training.source.folder import Source, open_source, write_source
from l2p_export.training.source.model import initial_source, source_dimensions
from l2p_export.training.source.tokens import world_tokenizer
from l2p_export.training.transfer.spec import TransferSpec
from l2p_runtime.tensorfile import header_bytes

TEXTS = ("a red circle", "a blue square", "two green triangles on a black background")
SIZE_PX = 64


def tiny_dimensions() -> Dimensions:
    """Width 48, three heads of 16, three layers of which the middle one is the trunk."""
    return replace(source_dimensions(), width=48, head_width=16, ffn_width=128, time_width=48, layers=3)


def write_tiny_source(folder: Path, seed: int = 3) -> Source:
    """A pipeline folder of random weights, and the source that it opens as."""
    d = tiny_dimensions()
    autoencoder = AutoencoderKL(**CONFIG, sample_size=SIZE_PX, scaling_factor=0.7, shift_factor=-0.1)
    write_source(folder, initial_source(d, seed), d, autoencoder, world_tokenizer(), 2.0)
    return open_source(folder)


def write_tiny_corpus(folder: Path, count: int = 6, *, with_seeds: bool = True) -> Corpus:
    """Images of one colour each with a darker square somewhere, larger and other than square at times."""
    random = np.random.default_rng(7)
    rows = []
    for index in range(count):
        height, width = (SIZE_PX, SIZE_PX) if index % 2 else (SIZE_PX + 8, SIZE_PX + 20)
        colour = random.integers(100, 256, 3)
        pixels = np.broadcast_to(colour, (height, width, 3)).astype(np.uint8).copy()
        top, left = random.integers(0, SIZE_PX // 2, 2)
        pixels[top : top + 20, left : left + 20] //= 3
        rows.append(write_image(folder, index, pixels, TEXTS[index % len(TEXTS)], index if with_seeds else None))
    append_rows(folder, rows)
    return open_corpus(folder)


def tiny_spec(steps: int = 3, **changes: Any) -> TransferSpec:
    """A transfer to 16 px patches; changes of `Schedule` or of `TransferSpec` by name."""
    values: dict[str, Any] = {"learning_rate": 1e-3, "warmup_steps": 2, "batch": 4, "save_every": 100, "seed": 5}
    values |= {name: changes.pop(name) for name in list(changes) if name in Schedule.__dataclass_fields__}
    spec: dict[str, Any] = {"variant": "1k", "sizes_px": (SIZE_PX,), "noise": "stored", "head_divisor": 8}
    return TransferSpec(schedule=Schedule(steps=steps, **values), **(spec | changes))


def write_published_folder(folder: Path) -> None:
    """A pipeline folder of the published sizes, 20 GB of zeros that take no room on the disk."""
    t = TextEncoderDimensions()
    config = {
        "model_type": "qwen3",
        "vocab_size": t.vocabulary,
        "hidden_size": t.width,
        "num_hidden_layers": t.layers,
        "num_attention_heads": t.heads,
        "num_key_value_heads": t.kv_heads,
        "head_dim": t.head_width,
        "intermediate_size": t.ffn_width,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
    }
    for part in ("transformer", "text_encoder", "tokenizer"):
        (folder / part).mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    (folder / "text_encoder" / "config.json").write_text(json.dumps(config))
    world_tokenizer().save(str(folder / "tokenizer" / "tokenizer.json"))
    transformer = latent_shapes(published_dimensions("1k"))
    _write_zeros(folder / "transformer" / "diffusion_pytorch_model.safetensors", transformer)
    _write_zeros(folder / "text_encoder" / "model.safetensors", text_encoder_shapes(t))


def _write_zeros(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    header, places = header_bytes([(name, "BF16", shape) for name, shape in shapes.items()])
    with path.open("wb") as file:
        file.write(header)
        file.truncate(max(place.offset + place.size_bytes for place in places.values()))
