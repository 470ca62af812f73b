"""The sandwich rescale: exact in real arithmetic, in the networks and in the graphs that are made of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from l2p_calib.layout import layer_of
from l2p_calib.plans.plan import LayerRule, LayerScale, PrecisionPlan
from l2p_export.checkpoint.demo import demo_dimensions
from l2p_export.families.z_image_l2p import ZImageModel
from l2p_export.families.z_image_l2p.dimensions import Dimensions
from l2p_export.precision.plans import plain_plan
from l2p_runtime.positions import rope_tables
from parity.graphs import export, network_shapes, run, store
from parity.models import call, load_network, model_spec, random_state, relative_error

D = replace(demo_dimensions(16), layers=4, noise_refiners=1, context_refiners=1)
# Tracing takes seconds a block.
TRACED = replace(D, layers=3, noise_refiners=0, context_refiners=0)
EXACT = 1e-12

# Measured 0: powers of two change no digit. Leaving the epsilon as it is makes 4e-2 and more.
EPSILON_FORGOTTEN = 1e-2


def scaled(state: dict[str, Tensor], scales: dict[str, int]) -> dict[str, Tensor]:
    return {name: value * 2.0 ** scales.get(layer_of(name), 0) for name, value in state.items()}


def exponents(d: Dimensions, network: str, seed: int) -> dict[str, int]:
    """One of its own for every layer that can be scaled."""
    random = np.random.default_rng(seed)
    return {layer: int(random.integers(-14, 5)) for layer in ZImageModel(d).layout(network).scalable}


def outputs(d: Dimensions, network: str, state: dict[str, Tensor], scales: dict[str, int]) -> Tensor:
    """What the blocks of a network make in float64, before a border casts it to float32."""
    model = ZImageModel(d)
    with torch.device("meta"):
        module = model.module(network, lambda layer: torch.float64, exponent_of=lambda layer: scales.get(layer, 0))
    module.load_state_dict({name: value.double() for name, value in state.items()}, assign=True)
    cosine, sine = (torch.from_numpy(table) for table in rope_tables(model_spec(d), 2, 3, 32))
    generator = torch.Generator().manual_seed(3)
    # Small values, where the epsilon counts.
    x = torch.randn(1, len(cosine), d.width, generator=generator, dtype=torch.float64) * 1e-2
    modulation = torch.randn(1, d.time_width, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        for block in model.blocks(network):
            is_modulated = not block.startswith("context_refiner")
            x = module.get_submodule(block)(x, modulation if is_modulated else None, cosine, sine)
    return x


@pytest.mark.parametrize("network", ["caption", "stem", "trunk", "tail"])
def test_scaled_blocks_are_the_same_in_float64(network: str) -> None:
    state = random_state(network_shapes(D, network), seed=5, gain=1e-3)
    scales = exponents(D, network, 7)
    assert len(scales) == 4 * len(ZImageModel(D).blocks(network))
    plain = outputs(D, network, state, {})
    assert relative_error(outputs(D, network, scaled(state, scales), scales), plain) <= EXACT
    # What the comparison rests on: the epsilon takes part.
    assert relative_error(outputs(D, network, scaled(state, scales), {}), plain) > EPSILON_FORGOTTEN


def test_a_scaled_graph_stores_scaled_weights_and_answers_alike(tmp_path: Path) -> None:
    """In float32 a power of two changes no digit of the weights, and joined ones are scaled each by its own."""
    scales = exponents(TRACED, "trunk", 1)
    plan = PrecisionPlan("fp32-scaled", "fp32", "float32", (), tuple(LayerScale(*item) for item in scales.items()))
    state = random_state(network_shapes(TRACED, "trunk"), seed=5)
    tensors = store(state, tmp_path / "weights.safetensors")
    inputs = trunk_inputs(TRACED)
    (found,) = run(export(TRACED, "trunk", tensors, tmp_path, plan), inputs)
    (expected,) = call(load_network("trunk", TRACED, state), **inputs)
    # Measured 4e-7.
    assert relative_error(found, expected) <= 2e-6


def test_layers_of_other_dtypes_and_scales_in_one_float16_graph(tmp_path: Path) -> None:
    """What a measured plan may ask for: some linears and the residual in float32, attention in float16 everywhere."""
    rules = (
        LayerRule("residual.trunk", "float32", "a test"),
        LayerRule("layers.1.attention.to_q", "float32", "a test"),
        LayerRule("layers.1.feed_forward.w1", "float32", "a test"),
        LayerRule("layers.1.attention.to_out.0", "float32", "a test"),
        LayerRule("layers.1.adaLN_modulation.0", "float32", "a test"),
    )
    scales = (LayerScale("layers.1.feed_forward.w3", -6), LayerScale("layers.1.attention.to_out.0", -8))
    plan = replace(plain_plan(ZImageModel(TRACED), "fp16"), rules=rules, scales=scales)
    state = random_state(network_shapes(TRACED, "trunk"), seed=5)
    engine = export(TRACED, "trunk", store(state, tmp_path / "weights.safetensors"), tmp_path, plan)
    inputs = trunk_inputs(TRACED)
    (found,), (expected,) = run(engine, inputs), call(load_network("trunk", TRACED, state), **inputs)
    # Measured 5e-4.
    assert relative_error(found, expected) <= 3e-3


def test_the_head_and_the_embedders_take_a_dtype_a_layer(tmp_path: Path) -> None:
    state = {name: random_state(network_shapes(TRACED, name), seed=5) for name in ("caption", "stem", "head")}
    rules = (
        LayerRule("all_x_embedder.16-1", "float32", "a test"),
        LayerRule("cap_pad_token", "float32", "a test"),
        LayerRule("local_decoder.bottleneck.0", "float32", "a test"),
        LayerRule("local_decoder.dec3.0", "float32", "a test"),
        *plain_plan(ZImageModel(TRACED), "fp16").rules,
    )
    plan = replace(plain_plan(ZImageModel(TRACED), "fp16"), rules=rules)
    random = np.random.default_rng(0)
    cosine, sine = rope_tables(model_spec(TRACED), 2, 3, 32)
    image = random.standard_normal((1, 3, 32, 48), np.float32)
    inputs = {
        "caption": {
            "prompt_embeds": random.standard_normal((1, 32, TRACED.caption_width), np.float32),
            "caption_mask": np.arange(32)[np.newaxis] < 5,
            "rope_cos": np.ascontiguousarray(cosine[-32:]),
            "rope_sin": np.ascontiguousarray(sine[-32:]),
        },
        "stem": {
            "image": image,
            "time": np.asarray([0.4], np.float32),
            "caption": random.standard_normal((1, 32, TRACED.width), np.float32),
            "rope_cos": cosine,
            "rope_sin": sine,
        },
        "head": {"image": image, "tokens": random.standard_normal((1, 2, 3, TRACED.width), np.float32)},
    }
    for name, values in inputs.items():
        folder = tmp_path / name
        folder.mkdir()
        engine = export(TRACED, name, store(state[name], folder / "weights.safetensors"), folder, plan)
        expected = call(load_network(name, TRACED, state[name]), **values)
        for found, wanted in zip(run(engine, values), expected, strict=True):
            # Measured 8e-4.
            assert relative_error(found, wanted) <= 3e-3, name


def trunk_inputs(d: Dimensions) -> dict[str, np.ndarray]:
    cosine, sine = rope_tables(model_spec(d), 2, 3, 32)
    random = np.random.default_rng(11)
    tokens = random.standard_normal((1, len(cosine), d.width), np.float32)
    modulation = random.standard_normal((1, d.time_width), np.float32)
    return {"tokens": tokens, "modulation": modulation, "rope_cos": cosine, "rope_sin": sine}
