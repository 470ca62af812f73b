"""LoRA files: every spelling means the same sum, and what cannot be merged is refused by name."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from l2p_export.checkpoint.loading import load_model
from l2p_export.checkpoint.lora import (
    Lora,
    LoraRequest,
    MergedTensor,
    merge,
    merge_loras,
    open_lora,
    parse_lora,
    trunk_layers_touched,
)
from l2p_export.checkpoint.lora.names import LayerNames
from l2p_export.families.z_image_l2p import Z_IMAGE_L2P
from l2p_export.families.z_image_l2p.dimensions import VARIANTS, expected_shapes, published_dimensions
from l2p_export.tensors.digests import weights_digest
from l2p_runtime.errors import ArtifactError, UsageError
from unit.export.checkpoint.lora_files import (
    ALIASES,
    QKV,
    SHAPES,
    TARGETS,
    ArraySource,
    D,
    Pair,
    Q,
    State,
    assert_same,
    base,
    by_hand,
    every_spelling,
    flat,
    merged,
    opened,
    pairs_of,
    random_pair,
    spelled,
    values_of,
    with_fused,
)

# The command line's form


@pytest.mark.parametrize(
    ("text", "path", "strength"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.5", "a.safetensors", 0.5),
        ("a.safetensors:-2", "a.safetensors", -2.0),
        ("a.safetensors:0", "a.safetensors", 0.0),
        ("dir/a:b.safetensors:1e-1", "dir/a:b.safetensors", 0.1),
        ("dir:1/a.safetensors", "dir:1/a.safetensors", 1.0),
        ("2:3:4", "2:3", 4.0),
    ],
)
def test_the_form_on_the_command_line(text: str, path: str, strength: float) -> None:
    assert parse_lora(text) == LoraRequest(Path(path), strength)


@pytest.mark.parametrize("text", ["a:nan", "a:inf", "a:-Infinity", "a:1e999", "", ":", ":0.5", "a:", "a::1"])
def test_bad_forms(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_lora(text)
    assert "FILE:STRENGTH" in caught.value.hint


# Spellings

SHARED = pairs_of("layers.0.feed_forward.w2", "local_decoder.enc1.0", "t_embedder.mlp.0", rank=3, alpha=5.0)
SHARED |= {layer: replace(pair, down=random_pair(Q, 2, 9).down) for layer, pair in pairs_of(*QKV, alpha=3.0).items()}
SHARED |= {layer: replace(SHARED[layer], down=SHARED[Q].down) for layer in QKV}
SPELLINGS = every_spelling(SHARED)


@st.composite
def random_loras(draw: st.DrawFn) -> dict[str, Pair]:
    """Some layers, each with its own rank and maybe alpha; sometimes q, k and v of layer 1 that share their input."""
    layers = draw(st.lists(st.sampled_from(TARGETS), min_size=1, max_size=6, unique=True))
    alphas = st.none() | st.sampled_from([0.5, 1.0, 3.0, 16.0])
    pairs = {layer: random_pair(layer, draw(st.integers(1, 4)), i, draw(alphas)) for i, layer in enumerate(layers)}
    if draw(st.booleans()):
        first = random_pair(Q, draw(st.integers(1, 4)), 99, draw(alphas))
        pairs |= {layer: replace(random_pair(layer, first.rank, i), alpha=first.alpha) for i, layer in enumerate(QKV)}
        pairs |= {layer: replace(pairs[layer], down=first.down) for layer in QKV}
    return pairs


@settings(max_examples=40, deadline=None)
@given(random_loras(), st.sampled_from([1.0, 0.75, -0.3]), st.sets(st.sampled_from(list(SPELLINGS)), max_size=8))
def test_every_spelling_merges_to_the_same_bits(
    tmp_path_factory: pytest.TempPathFactory, pairs: dict[str, Pair], strength: float, tools: set[str]
) -> None:
    folder = tmp_path_factory.mktemp("lora")
    wanted = merged([opened(folder, spelled(pairs), strength)])
    for name, values in by_hand(pairs, strength).items():
        np.testing.assert_allclose(wanted[name], values, rtol=1e-6, atol=1e-6)
    spellings = every_spelling(pairs)
    for tool in sorted(tools & spellings.keys()):
        state, metadata = spellings[tool]
        found = opened(folder, state, strength, metadata)
        assert found.deltas.keys() == {f"{layer}.weight" for layer in pairs}, tool
        assert_same(merged([found]), wanted)


@pytest.mark.parametrize("tool", SPELLINGS)
def test_one_lora_in_each_spelling(tmp_path: Path, tool: str) -> None:
    assert len(SPELLINGS) > 25
    state, metadata = SPELLINGS[tool]
    assert_same(merged([opened(tmp_path, state, metadata=metadata)]), merged([opened(tmp_path, spelled(SHARED))]))


@pytest.mark.parametrize("variant", VARIANTS.values())
def test_every_published_layer_is_found_under_its_underscores(variant: str) -> None:
    shapes = expected_shapes(published_dimensions(variant))
    names = LayerNames(shapes, Z_IMAGE_L2P.aliases(shapes))
    for name in shapes:
        layer = name.removesuffix(".weight")
        if name.endswith(".weight"):
            assert tuple(names.weights(layer)) == (name,)
            assert tuple(names.weights(flat(layer))) == (name,)
        else:
            assert not names.weights(layer)


def test_dtypes_of_the_file_do_not_matter_where_values_fit(tmp_path: Path) -> None:
    pairs = pairs_of(Q, "layers.0.feed_forward.w2")
    state = {name: value.astype(ml_dtypes.bfloat16) for name, value in spelled(pairs).items()}
    wanted = merged([opened(tmp_path, {name: value.astype(np.float32) for name, value in state.items()})])
    assert_same(merged([opened(tmp_path, state)]), wanted)
    assert_same(merged([opened(tmp_path, {name: value.astype(np.float64) for name, value in state.items()})]), wanted)


def test_convolutions_of_one_pixel_may_be_written_as_matrices(tmp_path: Path) -> None:
    pairs = pairs_of("local_decoder.bottleneck.0", Q)
    wanted = merged([opened(tmp_path, spelled(pairs))])
    conv, linear = pairs["local_decoder.bottleneck.0"], pairs[Q]
    pairs["local_decoder.bottleneck.0"] = Pair(conv.down[..., 0, 0], conv.up[..., 0, 0])
    pairs[Q] = Pair(linear.down[..., None, None], linear.up[..., None, None])
    assert_same(merged([opened(tmp_path, spelled(pairs))]), wanted)


# Alpha


def scale_of(lora: Lora, layer: str = Q) -> float:
    return lora.deltas[f"{layer}.weight"].scale


def test_alpha_absent_means_scale_one(tmp_path: Path) -> None:
    assert scale_of(opened(tmp_path, spelled(pairs_of(Q, rank=3)))) == 1.0


DTYPES = (
    *(np.float64, np.float32, np.float16, np.int64, np.int32, np.uint8, np.int8),
    *(ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2),
)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_alpha_as_a_tensor_of_any_dtype(tmp_path: Path, shape: tuple[int, ...], dtype: Any) -> None:
    alpha = np.full(shape, 6, dtype)
    assert scale_of(opened(tmp_path, spelled(pairs_of(Q, rank=4)) | {f"{Q}.alpha": alpha})) == 1.5


def test_alpha_in_the_metadata(tmp_path: Path) -> None:
    state = spelled(pairs_of(Q, rank=4))
    assert scale_of(opened(tmp_path, state, metadata={"lora_alpha": "8"})) == 2.0
    assert scale_of(opened(tmp_path, state, metadata={"adapter_config": '{"lora_alpha": 8}'})) == 2.0
    root = {"adapter_config": '{"lora_alpha": 8, "use_rslora": true}'}
    assert scale_of(opened(tmp_path, state, metadata=root)) == 4.0
    tensor = state | {f"{Q}.alpha": np.float32(2)}
    assert scale_of(opened(tmp_path, tensor, metadata={"lora_alpha": "8"})) == 0.5


@pytest.mark.parametrize(
    "pattern",
    ["to_q", "attention.to_q", Q, f"^{Q}$", r"layers\.1\.attention\.to_q", "layers.1.attention.to.q", "to_[qx]", ".*q"],
)
def test_alpha_patterns_name_layers_or_their_ends(tmp_path: Path, pattern: str) -> None:
    config = {"lora_alpha": 8, "alpha_pattern": {pattern: 2}}
    state = spelled(pairs_of(Q, "layers.1.attention.to_k", rank=4), "transformer.{}".format)
    lora = opened(tmp_path, state, metadata={"lora_adapter_metadata": json.dumps(config)})
    assert (scale_of(lora), scale_of(lora, "layers.1.attention.to_k")) == (0.5, 2.0)


@pytest.mark.parametrize("pattern", ["^to_q", "o_q", "layers.1", f"transformer.{Q}", "q"])
def test_alpha_patterns_that_match_no_whole_name(tmp_path: Path, pattern: str) -> None:
    metadata = {"lora_adapter_metadata": json.dumps({"lora_alpha": 8, "alpha_pattern": {pattern: 2}})}
    assert scale_of(opened(tmp_path, spelled(pairs_of(Q, rank=4), "transformer.{}".format), metadata=metadata)) == 2.0
    if pattern.startswith("transformer"):
        state = spelled(pairs_of(Q, rank=4), "base_model.model.transformer.{}".format)
        assert scale_of(opened(tmp_path, state, metadata=metadata)) == 0.5


def test_peft_keeps_alpha_in_the_file_beside(tmp_path: Path) -> None:
    save_file(spelled(pairs_of(Q, rank=4), "base_model.model.{}".format), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 8}')
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        assert scale_of(open_lora(LoraRequest(path), SHAPES, ALIASES)) == 2.0
    # Beside a file of another name it is no more than a neighbour.
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "style.safetensors")
    assert scale_of(open_lora(LoraRequest(tmp_path / "style.safetensors"), SHAPES, ALIASES)) == 1.0


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "a list, expected an object"),
        ('{"lora_alpha": "x"}', "lora_alpha = 'x', expected a finite number"),
        ('{"lora_alpha": NaN}', "expected a finite number"),
        ('{"lora_alpha": true}', "expected a finite number"),
        ('{"alpha_pattern": [1]}', "alpha_pattern that is no object"),
        ('{"alpha_pattern": {"(a": 1}}', "alpha_pattern key '(a', which is no regular expression"),
        ('{"rank_pattern": {"a": "x"}}', "rank_pattern of 'a' = 'x', expected a finite number"),
        ('{"peft_type": "VERA"}', "is a VERA, expected LoRA, LoHa or LoKr"),
        ('{"peft_type": "LORA", "use_qalora": true}', "was trained with use_qalora"),
        ('{"alpha_pattern": {"to_q": []}}', "expected a finite number"),
        ('{"init_lora_weights": "pissa_niter_4"}', "changes the base weights"),
    ],
)
def test_bad_configurations(tmp_path: Path, config: str, wanted: str) -> None:
    state = spelled(pairs_of(Q))
    with pytest.raises(ArtifactError, match=re.escape(wanted)):
        opened(tmp_path, state, metadata={"adapter_config": config})
    save_file(state, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(ArtifactError, match=re.escape(wanted)):
        open_lora(LoraRequest(tmp_path / "adapter_model.safetensors"), SHAPES, ALIASES)


# Merging


def test_untouched_tensors_stay_the_same_objects(tmp_path: Path) -> None:
    tensors = base()
    found = merge_loras(tensors, [opened(tmp_path, spelled(pairs_of(Q)))])
    changed = [name for name, source in found.items() if source is not tensors[name]]
    assert changed == [f"{Q}.weight"]
    assert (found[changed[0]].dtype, found[changed[0]].shape) == ("F32", (D, D))
    assert list(found) == list(tensors)


def test_strength_zero_and_alpha_zero_touch_nothing(tmp_path: Path) -> None:
    tensors = base()
    for lora in (
        opened(tmp_path, spelled(pairs_of(Q)), strength=0.0),
        opened(tmp_path, spelled(pairs_of(Q, alpha=0.0))),
    ):
        assert all(source is tensors[name] for name, source in merge_loras(tensors, [lora]).items())
        assert trunk_layers_touched([lora], SHAPES) == ()


def test_several_loras_add_up(tmp_path: Path) -> None:
    shared, alone = pairs_of(Q, "layers.0.adaLN_modulation.0", rank=3, alpha=1.5), pairs_of("t_embedder.mlp.2", Q)
    loras = []
    for index, (pairs, strength) in enumerate(((shared, 0.5), (alone, -2.0), (alone, 0.0))):
        (tmp_path / str(index)).mkdir()
        loras.append(opened(tmp_path / str(index), spelled(pairs), strength))
    wanted = by_hand(shared, 0.5)
    added = by_hand(alone, -2.0)
    start = values_of(base())
    for name, values in merged(loras).items():
        np.testing.assert_allclose(values, wanted[name] + added[name] - start[name], rtol=1e-6, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 9),
    rank=st.integers(1, 3),
    block=st.integers(1, 64),
    sizes=st.lists(st.integers(1, 400), min_size=2, max_size=4),
)
def test_bits_do_not_hang_on_the_chunk_size(
    tmp_path_factory: pytest.TempPathFactory, rows: int, columns: int, rank: int, block: int, sizes: list[int]
) -> None:
    rng = np.random.default_rng(rows)
    shapes = {"a.weight": (rows, columns)}
    state = {"a.lora_A.weight": rng.standard_normal((rank, columns), np.float32)}
    state["a.lora_B.weight"] = rng.standard_normal((rows, rank), np.float32)
    path = tmp_path_factory.mktemp("lora") / "x.safetensors"
    save_file(state, path)
    start = rng.standard_normal((rows, columns), np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge, "BLOCK_VALUES", block)
        source = merge_loras({"a.weight": ArraySource(start)}, [open_lora(LoraRequest(path), shapes, {})])["a.weight"]
        made = [list(source.chunks(size)) for size in sizes]
    whole = np.concatenate(made[0])
    np.testing.assert_allclose(
        whole, (start + state["a.lora_B.weight"] @ state["a.lora_A.weight"]).reshape(-1), atol=1e-5
    )
    for size, chunks in zip(sizes, made, strict=True):
        assert max(chunk.nbytes for chunk in chunks) <= max(size, 4)
        np.testing.assert_array_equal(np.concatenate(chunks), whole)


def test_a_chunk_stays_as_it_was_handed_out(tmp_path: Path) -> None:
    source = merge_loras(base(), [opened(tmp_path, spelled(pairs_of(Q)))])[f"{Q}.weight"]
    assert isinstance(source, MergedTensor)
    copies = [(chunk, chunk.copy()) for chunk in source.chunks(16)]
    for chunk, copy in copies:
        np.testing.assert_array_equal(chunk, copy)


def test_a_sum_beyond_float32_is_left_for_the_writer_to_refuse(tmp_path: Path) -> None:
    huge = Pair(np.full((1, D), 1e30, np.float32), np.full((D, 1), 1e30, np.float32))
    assert np.isinf(merged([opened(tmp_path, spelled({Q: huge}))])[f"{Q}.weight"]).all()


def test_the_trunk_layers_that_change(tmp_path: Path) -> None:
    layers = ("layers.2.feed_forward.w1", Q, "layers.0.attention.to_q", "noise_refiner.0.attention.to_q")
    lora = opened(tmp_path, spelled(pairs_of(*layers, "layers.1.adaLN_modulation.0", "t_embedder.mlp.0")))
    assert trunk_layers_touched([lora, lora], layers_of(1, 2)) == (
        "layers.1.attention.to_q",
        "layers.1.adaLN_modulation.0",
        "layers.2.feed_forward.w1",
    )
    assert trunk_layers_touched([lora], layers_of(3)) == ()
    assert trunk_layers_touched([], SHAPES) == ()
    fused = opened(tmp_path, spelled(with_fused(shared_qkv())))
    assert trunk_layers_touched([fused], layers_of(1)) == QKV


@pytest.mark.parametrize(("layer", "same"), [("layers.0.attention.to_q", True), (Q, False)])
def test_a_lora_on_the_trunk_makes_another_trunk(tmp_path: Path, tiny_path: Path, layer: str, *, same: bool) -> None:
    loaded = load_model(tiny_path)
    shapes, trunk = loaded.checkpoint.shapes, loaded.model.network_shapes("trunk")
    rng = np.random.default_rng(0)
    rows, columns = shapes[f"{layer}.weight"]
    pair = Pair(rng.standard_normal((2, columns), np.float32), rng.standard_normal((rows, 2), np.float32))
    save_file(spelled({layer: pair}), tmp_path / "x.safetensors")
    lora = open_lora(LoraRequest(tmp_path / "x.safetensors"), shapes, {})
    tensors = merge_loras(loaded.checkpoint.tensors, [lora])
    assert (weights_digest(tensors, trunk) == weights_digest(loaded.checkpoint.tensors, trunk)) is same
    assert trunk_layers_touched([lora], trunk) == (() if same else (layer,))


def layers_of(*numbers: int) -> list[str]:
    return [name for name in SHAPES if name.startswith(tuple(f"layers.{number}." for number in numbers))]


def shared_qkv() -> dict[str, Pair]:
    pairs = pairs_of(*QKV)
    return {layer: replace(pair, down=pairs[Q].down) for layer, pair in pairs.items()}


# What is refused

A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
GOOD = spelled(pairs_of(Q))


def refused(folder: Path, state: State) -> str:
    with pytest.raises(ArtifactError) as caught:
        opened(folder, state)
    return str(caught.value)


@pytest.mark.parametrize(
    ("key", "method"),
    [
        (f"{Q}.oft_blocks", "OFT"),
        ("lycoris_layers_1_attention_to_q.rescale", "OFT"),
        (f"{Q}.boft_R", "BOFT"),
        (f"base_model.model.{Q}.ia3_l", "IA3"),
        ("lycoris_layers_1_attention_to_q.on_input", "IA3"),
        ("lycoris_layers_1_attention_to_q.a1.weight", "GLoRA"),
        (f"base_model.model.{Q}.vera_lambda_b", "VeRA"),
        (f"base_model.model.{Q}.lora_E", "AdaLoRA"),
        (f"base_model.model.{Q}.miss_block", "MISS"),
        ("lycoris_layers_1_attention_to_q.lambda_layer", "T-LoRA"),
    ],
)
def test_other_methods_are_refused_by_name(tmp_path: Path, key: str, method: str) -> None:
    message = refused(tmp_path, GOOD | {key: np.ones((D, D), np.float32)})
    assert f"a {method}" in message
    assert key in message


def test_unmatched_keys_are_listed_in_one_error(tmp_path: Path) -> None:
    few = {
        "layers.9.attention.to_q.lora_A.weight": np.ones((1, D), np.float32),
        "layers.1.attention_norm1.lora_A.weight": np.ones((1, D), np.float32),
        "lora_other_encoder.alpha": np.ones((), np.float32),
        f"{Q}.deeper.lora_A.weight": np.ones((1, D), np.float32),
        f"{Q}.reshape_weight": np.ones((1, D), np.float32),
        "layers.1.attention.to_out.0.bias": np.ones(D, np.float32),
    }
    message = refused(tmp_path, GOOD | few)
    assert "6 keys" in message
    assert all(f"`{name}`" in message for name in few)
    assert A not in message
    many = {f"layers.{index}.attention.to_q.lora_A.weight": np.ones((1, D), np.float32) for index in range(100, 145)}
    message = refused(tmp_path, GOOD | many)
    assert "45 keys" in message
    assert message.count("`layers.") == 20
    assert "and 25 more" in message


@pytest.mark.parametrize("kept", [A, B, f"{Q}.alpha"])
def test_half_pairs(tmp_path: Path, kept: str) -> None:
    state = GOOD | {f"{Q}.alpha": np.float32(1)}
    other = spelled(pairs_of("layers.0.feed_forward.w1"))
    message = refused(tmp_path, other | {kept: state[kept]})
    assert "1 keys without their other half" in message
    assert f"`{kept}`" in message


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({A: np.ones((2, D + 1), np.float32)}, f"`{A}` has shape [2, 7], expected [r, 6]"),
        ({B: np.ones((D + 2, 2), np.float32)}, f"`{B}` has shape [8, 2], expected [6, r]"),
        ({A: np.ones((D, 2), np.float32)}, f"`{A}` has shape [6, 2], expected [r, 6]"),
        ({A: np.ones((0, D), np.float32)}, f"`{A}` has shape [0, 6], expected [r, 6] with a rank r of 1 or more"),
        ({A: np.ones((), np.float32)}, f"`{A}` has shape [], expected [r, 6]"),
        ({B: np.ones((), np.float32)}, f"`{B}` has shape [], expected [6, r]"),
        ({B: np.ones((D, 3), np.float32)}, f"`{A}` [2, 6] has rank 2, but `{B}` [6, 3] has rank 3"),
        ({A: np.full((2, D), np.nan, np.float32)}, f"`{A}` holds NaN or Inf"),
        ({B: np.full((D, 2), np.inf, np.float32)}, f"`{B}` holds NaN or Inf"),
        ({B: np.full((D, 2), 1e300, np.float64)}, f"`{B}` holds NaN or Inf"),
        ({A: np.ones((2, D), np.int8)}, f"`{A}` is I8, expected one of F64, F32, F16, BF16, F8_E4M3, F8_E5M2"),
        ({B: np.ones((D, 2), np.int64)}, f"`{B}` is I64, expected"),
        ({f"{Q}.alpha": np.float32(np.nan)}, f"`{Q}.alpha` is nan, expected a finite number"),
        ({f"{Q}.alpha": np.ones(2, np.float32)}, f"`{Q}.alpha` is F32 [2], expected one number"),
        ({f"{Q}.alpha": np.ones(1, bool)}, f"`{Q}.alpha` is BOOL [1], expected one number"),
        ({f"transformer.{A}": GOOD[A]}, "are both the down of one layer"),
        ({f"lora_unet_{flat(Q)}.lora_down.weight": GOOD[A]}, "are both the down of one layer"),
        ({f"{Q}.diff": np.ones((D, D), np.float32)}, f"`{Q}` is changed by LoRA and difference"),
        ({f"{Q}.dora_scale": np.ones((D + 1, 1), np.float32)}, "has shape [7, 1], expected [6, 1] or [1, 6]"),
        ({f"{Q}.lora_magnitude_vector": np.ones(D + 1, np.float32)}, "has shape [7], expected [6]"),
        ({f"{Q}.lora_B.bias": np.ones(D, np.float32)}, f"changes the bias of `{Q}`, which has none"),
        ({f"{Q}.lora_mid.weight": np.ones((2, 3), np.float32)}, "has shape [2, 3], expected [r, r]"),
        (spelled(pairs_of("layers.0.attention.to_q"), down="lora_A.other.weight", up="lora_B.x.weight"), "2 adapters"),
    ],
)
def test_bad_pairs(tmp_path: Path, changes: State, wanted: str) -> None:
    assert wanted in refused(tmp_path, GOOD | changes)


def test_fused_rows_must_be_those_of_all_three(tmp_path: Path) -> None:
    fused = spelled(with_fused(shared_qkv()))
    key = "layers.1.attention.qkv.lora_B.weight"
    assert f"`{key}` has shape [17, 2], expected [18, r]" in refused(tmp_path, fused | {key: fused[key][:17]})


def test_convolutions_need_their_kernel(tmp_path: Path) -> None:
    state = spelled(pairs_of("local_decoder.enc1.0"))
    key = "local_decoder.enc1.0.lora_A.weight"
    assert "expected [r, 3, 3, 3]" in refused(tmp_path, state | {key: np.ones((2, 3, 1, 1), np.float32)})


def test_absent_damaged_and_doubtful_files(tmp_path: Path) -> None:
    def message(path: Path) -> str:
        with pytest.raises(ArtifactError) as caught:
            open_lora(LoraRequest(path), SHAPES, ALIASES)
        return str(caught.value)

    assert "there is no LoRA" in message(tmp_path / "none.safetensors")
    assert "there is no LoRA" in message(tmp_path / ("n" * 5000))
    assert "there is no LoRA" in message(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"PK\x03\x04 and so on")
    assert "pickle" in message(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"")
    assert "is empty" in message(tmp_path / "b.safetensors")
    assert "holds 2 .safetensors files" in message(tmp_path)


def test_a_lora_of_rank_above_the_width_still_merges(tmp_path: Path) -> None:
    pairs = pairs_of(Q, rank=4 * D, alpha=math.pi)
    found = merged([opened(tmp_path, spelled(pairs))])[f"{Q}.weight"]
    alpha = float(np.float32(math.pi))
    wanted = by_hand({Q: replace(pairs[Q], alpha=alpha)})[f"{Q}.weight"]
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)
