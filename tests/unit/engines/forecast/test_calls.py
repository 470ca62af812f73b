from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l2p_engines.forecast.calls import (
    EXPORT_LIBRARIES_BYTES,
    PRECISIONS,
    CallSize,
    border_bytes,
    count_tokens,
    engine_memory,
    forward_flops,
    host_needs,
    largest_tensor_bytes,
    total_flops,
    weight_bytes,
)
from l2p_engines.forecast.cards import find_card
from l2p_engines.forecast.fitting import STEP_NETWORKS, Setting, find_settings, fit_call, smaller_calls, step_bounds
from l2p_export.checkpoint.demo import demo_dimensions
from l2p_export.families.z_image_l2p import ZImageModel
from l2p_export.families.z_image_l2p.dimensions import VARIANTS, published_dimensions
from l2p_export.performance.costs import network_costs
from l2p_runtime.contract import NETWORKS
from l2p_runtime.memory import call_memory

MODELS = {variant: ZImageModel(published_dimensions(variant)) for variant in VARIANTS.values()}
COSTS = {variant: network_costs(model) for variant, model in MODELS.items()}
SPECS = {variant: model.spec for variant, model in MODELS.items()}

GIB = 1 << 30


# docs/model.md, "Operations": side in pixels, caption tokens, TFLOP of linear, attention, U-Net and all, to the
# digits printed there.
@pytest.mark.parametrize(
    ("side", "caption", "printed"),
    [
        (512, 64, ("12.3", "0.6", "0.21", "13.1")),
        (1024, 64, ("47.1", "8.5", "0.83", "56.5")),
        (1024, 512, ("52.2", "10.3", "0.83", "63.4")),
        (2048, 64, ("186", "133", "3.3", "323")),
    ],
)
def test_operations_are_the_published_ones(side: int, caption: int, printed: tuple[str, ...]) -> None:
    flops = total_flops(forward_flops(SPECS["1k"], COSTS["1k"], CallSize(side, side, caption)).values())
    for count, text in zip((flops.linear, flops.attention, flops.unet, flops.total), printed, strict=True):
        assert f"{count / 1e12:.{len(text.partition('.')[2])}f}" == text


def test_operations_of_the_head_are_those_of_its_convolutions() -> None:
    """By the table of docs/model.md, "Pixel head": each convolution at its own resolution."""
    convolutions = [(1, 27 * 64 + 2 * 9 * 64 * 64 + 9 * 64 * 64 + 3 * 64)]  # enc1, up1, dec1 (128 in), out_conv
    convolutions += [(4, 9 * (64 * 128 + 128 * 128 + 256 * 64)), (16, 9 * (128 * 256 + 256 * 256 + 512 * 128))]
    convolutions += [(64, 9 * (256 * 512 + 512 * 512 + 1024 * 256)), (256, 4352 * 512)]
    expected = sum(2 * weights * (1024 * 1024 // area) for area, weights in convolutions)
    assert forward_flops(SPECS["1k"], COSTS["1k"], CallSize(1024, 1024, 64))["head"].unet == expected


@pytest.mark.parametrize("variant", SPECS)
def test_every_parameter_is_counted_once(variant: str) -> None:
    sizes = weight_bytes(COSTS[variant], "fp32")
    assert sum(sizes.values()) == 4 * sum(math.prod(shape) for shape in MODELS[variant].shapes.values())
    assert set(sizes) == set(NETWORKS)


def test_fp8_halves_the_linears_of_blocks_and_nothing_else() -> None:
    halved = {
        name
        for cost in COSTS["1k"].values()
        for name in cost.shapes
        if cost.bytes_per_value("fp8", name) != cost.bytes_per_value("fp16", name)
    }
    assert len(halved) == 34 * 7
    assert {name.split(".")[0] for name in halved} == {"layers", "noise_refiner", "context_refiner"}
    assert all(name.split(".")[2] in ("attention", "feed_forward") and "norm" not in name for name in halved)


@given(
    st.sampled_from(sorted(SPECS)),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 16).map(lambda count: 32 * count),
    st.integers(1, 3),
)
def test_larger_calls_take_more_and_batches_take_multiples(
    variant: str, rows: int, columns: int, caption: int, batch: int
) -> None:
    spec, costs = SPECS[variant], COSTS[variant]
    multiple = spec.size_multiple_px
    call = CallSize(rows * multiple, columns * multiple, caption)
    tokens = count_tokens(spec, call)
    assert tokens.image == tokens.rows * tokens.columns <= tokens.padded_image < tokens.image + 32
    assert tokens.sequence == tokens.padded_image + tokens.caption
    flops = forward_flops(spec, costs, call)
    batched = forward_flops(spec, costs, replace(call, batch=batch))
    taller = forward_flops(spec, costs, replace(call, height_px=call.height_px + multiple))
    for network in STEP_NETWORKS:
        assert batched[network].total == batch * flops[network].total
        assert taller[network].total >= flops[network].total
        assert 0 <= flops[network].linear_fp8 <= flops[network].linear
    assert border_bytes(spec, replace(call, batch=batch)) == {
        network: batch * size for network, size in border_bytes(spec, call).items()
    }
    full, half = engine_memory(spec, call, "fp32"), engine_memory(spec, call, "fp16")
    assert full == call_memory(spec, 1, tokens.rows, tokens.columns, caption)
    assert half.buffers_bytes == full.buffers_bytes
    assert half == engine_memory(spec, call, "fp8")


def test_fused_attention_holds_no_scores() -> None:
    call = CallSize(8192, 8192, 512)
    assert engine_memory(SPECS["4k"], call, "fp32").tokens_bytes > 60 * GIB
    assert engine_memory(SPECS["4k"], call, "fp16").tokens_bytes < 2 * GIB


@pytest.mark.parametrize(
    ("weights", "engine", "peak_gib"),
    [
        (2_170_900_480, 2_177_500_000, 2.417),
        (820_084_736, 824_400_000, 1.065),
        (373_620_736, 375_600_000, 0.606),
        (361_822_208, 363_800_000, 0.595),
    ],
)
def test_an_engine_takes_what_was_measured(weights: int, engine: int, peak_gib: float) -> None:
    """Trunk, stem, caption and tail of eight layers of the published width in float16 (docs/engines.md)."""
    needs = host_needs({("network", "fp16"): weights}, 0, 1)
    assert needs.engine - EXPORT_LIBRARIES_BYTES == pytest.approx(peak_gib * GIB, rel=0.15)
    assert needs.engines == pytest.approx(engine, rel=0.15)


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=12), st.integers(0, 10**10), st.integers(0, 4))
def test_a_build_holds_the_largest_network_and_writes_them_all(sizes: list[int], tensor: int, targets: int) -> None:
    needs = host_needs({(str(index), "fp16"): size for index, size in enumerate(sizes)}, tensor, targets)
    assert needs.export == EXPORT_LIBRARIES_BYTES + tensor
    assert needs.memory == max(needs.export, needs.engine)
    assert (needs.engine == 0) == (targets == 0)
    assert targets == 0 or needs.engine > max(sizes)
    assert needs.graphs == sum(sizes)
    assert needs.disk > needs.graphs + needs.engines >= (1 + targets) * sum(sizes)


def test_the_largest_tensor_is_the_patch_embedding_of_the_8k_model() -> None:
    assert largest_tensor_bytes(COSTS["8k"], "fp16") == 2 * 3 * 128 * 128 * 3840
    assert largest_tensor_bytes(COSTS["1k"], "fp8") == 10240 * 3840


@given(st.integers(0, 64 * GIB), st.sampled_from(PRECISIONS), st.sampled_from(["all", "one"]))
def test_what_fits_stays_within_its_budget(budget: int, precision: str, residence: str) -> None:
    call = CallSize(4096, 4096, 128)
    memory, weights = engine_memory(SPECS["4k"], call, precision), weight_bytes(COSTS["4k"], precision)
    fit = fit_call(SPECS["4k"], call, memory, weights, residence, budget)
    assert fit.fits == (fit.needed_bytes <= budget) == (fit.stripes > 0)
    if not fit.fits:
        again = fit_call(SPECS["4k"], call, memory, weights, residence, fit.needed_bytes)
        assert again.fits
        assert again.needed_bytes == fit.needed_bytes


def test_a_text_encoder_is_in_memory_alone() -> None:
    call = CallSize(4096, 4096, 128)
    memory = engine_memory(SPECS["4k"], call, "fp16")
    plain = fit_call(SPECS["4k"], call, memory, {"trunk": 6 * GIB}, "all", 64 * GIB)
    small, large = (
        fit_call(SPECS["4k"], call, memory, {"trunk": 6 * GIB, "text_encoder": size * GIB}, "all", 64 * GIB)
        for size in (1, 40)
    )
    assert small == plain
    assert large.needed_bytes == 40 * GIB


def test_networks_that_take_turns_hold_their_own_weights_alone() -> None:
    spec, call = SPECS["10k"], CallSize(10240, 10240, 128)
    memory, weights = engine_memory(spec, call, "fp16"), weight_bytes(COSTS["10k"], "fp16")
    head = memory.buffers_bytes + weights["head"] + 64 * memory.head_row_bytes
    assert fit_call(spec, call, memory, weights, "one", 64 * GIB).needed_bytes == head
    assert fit_call(spec, call, memory, weights, "all", 64 * GIB).needed_bytes > head + weights["trunk"]


def test_settings_are_found_by_trying() -> None:
    call = CallSize(4096, 4096, 128)
    wanted, smaller = Setting(call, "fp32", "all"), list(smaller_calls(SPECS["4k"], call))
    tried: list[Setting] = []

    def only(*settings: Setting) -> tuple[Setting, ...]:
        return find_settings(wanted, ("fp16", "fp8"), smaller, lambda s: not tried.append(s) and s in settings)

    one, half = replace(wanted, residence="one"), replace(wanted, precision="fp16")
    tiny = replace(one, call=smaller[3])
    assert only(one, half) == (one, half)
    assert only(half) == (half,)
    assert only(tiny) == (tiny,)
    assert only() == ()
    assert {setting.call for setting in tried} == {call, *smaller}


@given(st.sampled_from(sorted(SPECS)), st.integers(1, 60), st.integers(1, 60))
def test_smaller_images_divide_and_shrink(variant: str, rows: int, columns: int) -> None:
    spec = SPECS[variant]
    multiple = spec.size_multiple_px
    call = CallSize(rows * multiple, columns * multiple, 128)
    areas = [call.height_px * call.width_px]
    for smaller in smaller_calls(spec, call):
        assert smaller.height_px % multiple == smaller.width_px % multiple == 0
        areas.append(smaller.height_px * smaller.width_px)
    assert areas == sorted(set(areas), reverse=True)


def test_a_bound_is_the_larger_of_arithmetic_and_bandwidth() -> None:
    spec, call = SPECS["4k"], CallSize(4096, 4096, 128)
    flops, borders = forward_flops(spec, COSTS["4k"], call), border_bytes(spec, call)
    bounds = {
        precision: step_bounds(find_card("4090"), precision, flops, weight_bytes(COSTS["4k"], precision), borders)
        for precision in PRECISIONS
    }
    trunk = bounds["fp16"]["trunk"]
    assert trunk.compute_seconds == pytest.approx(flops["trunk"].total / 165.2e12)
    moved = weight_bytes(COSTS["4k"], "fp16")["trunk"] + borders["trunk"]
    assert trunk.memory_seconds == pytest.approx(moved / 1008e9)
    times = [bounds[precision]["trunk"].seconds for precision in PRECISIONS]
    assert times == sorted(times, reverse=True)
    for networks in bounds.values():
        assert all(item.seconds == max(item.compute_seconds or 0, item.memory_seconds) for item in networks.values())
    unknown = step_bounds(find_card("rtx 3060"), "fp16", flops, weight_bytes(COSTS["4k"], "fp16"), borders)
    assert {item.compute_seconds for item in unknown.values()} == {None}


def test_networks_partition_the_model_and_equal_its_modules() -> None:
    import torch

    for dimensions in [*(published_dimensions(v) for v in VARIANTS.values()), demo_dimensions(64)]:
        model = ZImageModel(dimensions)
        parts = {name: model.network_shapes(name) for name in NETWORKS}
        assert sum(map(len, parts.values())) == len(model.shapes)
        assert {name: shape for part in parts.values() for name, shape in part.items()} == model.shapes
        if dimensions.layers < 10:
            with torch.device("meta"):
                for name, shapes in parts.items():
                    state = model.module(name, lambda layer: torch.float32).state_dict()
                    assert {key: tuple(value.shape) for key, value in state.items()} == shapes
