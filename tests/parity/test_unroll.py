"""Unrolled graphs against torch: a block is traced once and copied, each copy with weights of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from l2p_calib.plans.plan import LayerRule, PrecisionPlan
from l2p_export.checkpoint.demo import demo_dimensions
from l2p_export.families.z_image_l2p import ZImageModel
from l2p_export.families.z_image_l2p.dimensions import Dimensions
from l2p_runtime.positions import rope_tables
from parity.graphs import Arrays, export, network_shapes, run, store
from parity.models import call, load_network, model_spec, random_state, relative_error

SIZES = [(1, 1, 1, 32), (3, 1, 1, 64), (1, 4, 8, 32), (3, 5, 7, 96), (2, 11, 3, 32)]
"""Batch, token rows and columns, caption tokens; 31 image pads, 31, none, 29 and 31."""

# Measured 1.6e-6.
TOLERANCE = 5e-6

NETWORKS = [
    pytest.param("trunk", 7, 1, ("layers.1", "layers.2", "layers.3", "layers.4", "layers.5"), id="trunk-of-5"),
    pytest.param("stem", 12, 2, ("noise_refiner.0", "noise_refiner.1", "layers.0", "layers.1"), id="stem-of-2-and-2"),
    pytest.param("stem", 1, 0, (), id="stem-without-blocks"),
    pytest.param("trunk", 1, 1, ("layers.0",), id="trunk-of-1"),
    pytest.param("trunk", 2, 1, ("layers.0", "layers.1"), id="trunk-of-2"),
    pytest.param(
        "tail",
        2,
        1,
        (),
        id="tail-without-blocks",
    ),
]


@pytest.mark.parametrize(("name", "layers", "noise_refiners", "blocks"), NETWORKS)
def test_graph_equals_torch(
    name: str, layers: int, noise_refiners: int, blocks: tuple[str, ...], tmp_path: Path
) -> None:
    d = dimensions(layers, noise_refiners)
    assert ZImageModel(d).blocks(name) == blocks
    state = random_state(network_shapes(d, name), seed=layers)
    engine = export(d, name, store(state, tmp_path / "weights.safetensors"), tmp_path)
    module = load_network(name, d, state)
    for size in SIZES:
        inputs = network_inputs(d, name, *size)
        for found, expected in zip(run(engine, inputs), call(module, **inputs), strict=True):
            assert relative_error(found, expected) <= TOLERANCE, size


def test_layers_differ_enough_to_tell_them_apart() -> None:
    """What the comparison above rests on: a trunk with two layers' weights swapped answers otherwise."""
    d = dimensions(7, 1)
    state = random_state(network_shapes(d, "trunk"), seed=7)
    swapped = {_swap(name, "layers.2.", "layers.4."): value for name, value in state.items()}
    inputs = network_inputs(d, "trunk", 1, 2, 3, 32)
    (plain,), (other,) = (call(load_network("trunk", d, weights), **inputs) for weights in (state, swapped))
    # Measured 1.02.
    assert relative_error(other, plain) > 0.1


def test_a_layer_of_another_dtype_parts_the_run(tmp_path: Path) -> None:
    """Layers 1 to 4 are one run in float32, 5 follows in float16."""
    d = dimensions(7, 1)
    plan = PrecisionPlan("mixed", "fp32", "float32", (LayerRule("layers.5", "float16", "a test"),))
    state = random_state(network_shapes(d, "trunk"), seed=9)
    engine = export(d, "trunk", store(state, tmp_path / "weights.safetensors"), tmp_path, plan)
    inputs = network_inputs(d, "trunk", 2, 3, 4, 32)
    (found,), (whole,) = run(engine, inputs), call(load_network("trunk", d, state), **inputs)
    with torch.device("meta"):
        module = ZImageModel(d).module("trunk", lambda layer: getattr(torch, plan.dtype(layer)))
    mixed = {name: value.to(getattr(torch, plan.dtype(name))) for name, value in state.items()}
    module.load_state_dict(mixed, assign=True)
    (expected,) = call(module, **inputs)
    assert relative_error(found, expected) <= MIXED
    assert relative_error(expected, whole) > TOLERANCE


# Measured 3.0e-4: what float16 rounds, in one order or the other.
MIXED = 9e-4


def dimensions(layers: int, noise_refiners: int) -> Dimensions:
    return replace(demo_dimensions(16), layers=layers, noise_refiners=noise_refiners)


def network_inputs(d: Dimensions, name: str, batch: int, rows: int, columns: int, caption_tokens: int) -> Arrays:
    cosine, sine = rope_tables(model_spec(d), rows, columns, caption_tokens)
    random = np.random.default_rng(rows * columns)
    rope = {"rope_cos": cosine, "rope_sin": sine}
    if name == "stem":
        image = random.standard_normal((batch, 3, rows * d.patch_px, columns * d.patch_px), np.float32)
        caption = random.standard_normal((batch, caption_tokens, d.width), np.float32)
        return {"image": image, "time": np.linspace(0.1, 0.9, batch, dtype=np.float32), "caption": caption, **rope}
    tokens = random.standard_normal((batch, len(cosine), d.width), np.float32)
    return {"tokens": tokens, "modulation": random.standard_normal((batch, d.time_width), np.float32), **rope}


def _swap(name: str, first: str, second: str) -> str:
    for old, new in ((first, second), (second, first)):
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
