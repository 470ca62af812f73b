"""LoHa, LoKr, DoRA and differences of weights; what a file holds beside the layers; files that are broken."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from l2p_export.checkpoint.lora import LoraRequest, merge_loras, open_lora, trunk_layers_touched
from l2p_export.checkpoint.lora.names import is_text_encoder
from l2p_export.families.z_image_l2p import Z_IMAGE_L2P
from l2p_runtime.errors import ArtifactError
from unit.export.checkpoint.lora_files import (
    ALIASES,
    CAPTION,
    FFN,
    QKV,
    SHAPES,
    TIME,
    Array,
    D,
    Q,
    State,
    assert_same,
    base,
    merged,
    opened,
    pairs_of,
    spelled,
    values_of,
    with_fused,
)

REPLACED = Z_IMAGE_L2P.replaced_layers(SHAPES)
CONV = "local_decoder.enc1.0"
NORM = "layers.1.attention_norm1"


def normal(*shape: int) -> Array:
    return np.random.default_rng(len(shape) + sum(shape)).standard_normal(shape, np.float32)


def factors(layer: str, **parts: Array) -> State:
    return {f"{layer}.{part}": values for part, values in parts.items()}


def loha(layer: str, rank: int = 2) -> State:
    rows, *inputs = SHAPES[f"{layer}.weight"]
    columns = int(np.prod(inputs))
    ups = {f"hada_w{half}_a": normal(rows, rank) + half for half in (1, 2)}
    return factors(layer, **ups, **{f"hada_w{half}_b": normal(rank, columns) - half for half in (1, 2)})


def change_of(state: State, layer: str = Q, strength: float = 1.0, folder: Path | None = None) -> Array:
    assert folder is not None
    name = f"{layer}.weight"
    return merged([opened(folder, state, strength)])[name].astype(np.float64) - values_of(base())[name]


# Methods


def test_cores_of_linear_layers(tmp_path: Path) -> None:
    """No tool writes them, and they mean what they mean for a convolution."""
    core, up, down = normal(2, 2), normal(D, 2), normal(2, D)
    lora = factors(Q, **{"lora_mid.weight": core, "lora_up.weight": up, "lora_down.weight": down})
    np.testing.assert_allclose(change_of(lora, folder=tmp_path), up @ core @ down, atol=1e-5)
    squared = factors(Q, **{"lora_mid.weight": core[..., None, None], "lora_up.weight": up, "lora_down.weight": down})
    np.testing.assert_allclose(change_of(squared, folder=tmp_path), up @ core @ down, atol=1e-5)
    halves = {f"hada_w{half}_a": up.T for half in (1, 2)} | {f"hada_w{half}_b": down for half in (1, 2)}
    state = factors(Q, **halves, hada_t1=core, hada_t2=core)
    np.testing.assert_allclose(change_of(state, folder=tmp_path), (up @ core @ down) ** 2, atol=1e-4)
    small = {"lokr_w1": normal(2, 3), "lokr_w2_a": normal(2, 3), "lokr_w2_b": normal(2, 2), "lokr_t2": core}
    wanted = np.kron(small["lokr_w1"], small["lokr_w2_a"].T @ core @ small["lokr_w2_b"])
    np.testing.assert_allclose(change_of(factors(Q, **small), folder=tmp_path), wanted, atol=1e-5)


@pytest.mark.parametrize("alpha", [None, 3.0, 1e10])
def test_alpha_of_whole_lokr_factors(tmp_path: Path, alpha: float | None) -> None:
    """LyCORIS ignores it; PEFT divides it by the configured rank, which the factors do not show."""
    state = factors(Q, lokr_w1=normal(2, 2), lokr_w2=normal(3, 3))
    wanted = np.kron(normal(2, 2), normal(3, 3))
    stated = {} if alpha is None else {f"{Q}.alpha": np.float32(alpha)}
    np.testing.assert_allclose(change_of(state | stated, folder=tmp_path), wanted, atol=1e-5)
    if alpha == 3.0:
        config = {"peft_type": "LOKR", "alpha": alpha, "r": 8, "rank_pattern": {"^layers.*q": 4}}
        lora = opened(tmp_path, state, metadata={"adapter_config": json.dumps(config)})
        assert lora.deltas[f"{Q}.weight"].scale == 0.75
        with pytest.raises(ArtifactError, match="states rank 0"):
            opened(tmp_path, state, metadata={"adapter_config": json.dumps(config | {"rank_pattern": {Q: 0}})})


def test_a_fused_layer_of_any_method_has_the_rows_of_its_parts(tmp_path: Path) -> None:
    ones = {f"hada_w2_{half}": np.ones(shape, np.float32) for half, shape in (("a", (18, 1)), ("b", (1, D)))}
    twos = {"hada_w1_a": normal(18, 1), "hada_w1_b": normal(1, D)}
    state = factors("layers.1.attention.qkv", **ones, **twos)
    whole = twos["hada_w1_a"] @ twos["hada_w1_b"]
    for index, layer in enumerate(QKV):
        rows = whole[D * index : D * (index + 1)]
        np.testing.assert_allclose(change_of(state, layer, folder=tmp_path), rows, atol=1e-5)
    kron = factors("layers.1.attention.qkv", lokr_w1=normal(9, 2), lokr_w2=normal(2, 3))
    whole = np.kron(normal(9, 2), normal(2, 3))
    np.testing.assert_allclose(change_of(kron, QKV[2], folder=tmp_path), whole[12:], atol=1e-5)


def test_differences_change_weights_norms_and_biases(tmp_path: Path) -> None:
    embedder, lycoris_norm = "all_x_embedder.16-1", "layers.2.attention_norm1"
    state = {
        f"diffusion_model.{Q}.diff": normal(D, D),
        f"diffusion_model.{NORM}.diff": normal(D),
        f"lycoris_{lycoris_norm.replace('.', '_')}.w_norm": normal(D),
        f"diffusion_model.{embedder}.diff_b": normal(D),
        f"diffusion_model.{CONV}.diff": normal(*SHAPES[f"{CONV}.weight"]),
    }
    wanted = {f"{Q}.weight": normal(D, D), f"{CONV}.weight": normal(*SHAPES[f"{CONV}.weight"])}
    wanted |= {f"{NORM}.weight": normal(D), f"{lycoris_norm}.weight": normal(D), f"{embedder}.bias": normal(D)}
    lora = opened(tmp_path, state, 0.5)
    assert lora.deltas.keys() == wanted.keys()
    start, found = values_of(base()), merged([lora])
    for name, difference in wanted.items():
        np.testing.assert_allclose(found[name], start[name] + 0.5 * difference, atol=1e-6)
    assert trunk_layers_touched([lora], [f"{embedder}.weight", f"{embedder}.bias", f"{Q}.weight"]) == (embedder, Q)
    with pytest.raises(ArtifactError, match=r"has shape \[7\], expected \[6\]"):
        opened(tmp_path, {f"{embedder}.diff_b": normal(D + 1)})


def test_a_dora_of_strength_zero_touches_nothing(tmp_path: Path) -> None:
    state = spelled(pairs_of(Q, alpha=0.0)) | {f"{Q}.dora_scale": np.ones((D, 1), np.float32)}
    tensors = base()
    assert merge_loras(tensors, [opened(tmp_path, state, 0.0)])[f"{Q}.weight"] is tensors[f"{Q}.weight"]
    # Alpha 0 leaves the direction, not the length.
    found = merged([opened(tmp_path, state)])[f"{Q}.weight"]
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)


def test_what_is_said_of_a_file(tmp_path: Path) -> None:
    dora = {f"base_model.model.{Q}.lora_magnitude_vector": np.ones(D, np.float32)}
    alpha = {"adapter_config": '{"lora_alpha": 1}'}
    assert opened(tmp_path, spelled(pairs_of(Q))).notes == ()
    assert opened(tmp_path, loha(Q)).notes == ("`x.safetensors` is a LoHa as LyCORIS computes it",)
    peft = opened(tmp_path, spelled(pairs_of(Q), "base_model.model.{}".format) | dora, metadata=alpha)
    assert peft.notes == ("`x.safetensors` is a LoRA with DoRA as PEFT computes it",)
    (note,) = opened(tmp_path, spelled(pairs_of(Q), "base_model.model.{}".format)).notes
    assert "states no alpha" in note


# What is beside


@pytest.mark.parametrize(
    "spelling",
    ["transformer.{}", "lora_unet__{}", "diffusion_model.{}", "base_model.model.{}"],
)
@pytest.mark.parametrize("ends", ["all_{}.2-1", "{}"])
def test_the_latent_ends_are_left_out_and_named(tmp_path: Path, spelling: str, ends: str) -> None:
    shapes = {"x_embedder": (D, 64), "final_layer": (64, D), "adaLN": (D, TIME)}
    layers = {name: ends.format(name) for name in ("x_embedder", "final_layer")}
    state = spelled(pairs_of(Q))
    for layer, shape in (
        (layers["x_embedder"], shapes["x_embedder"]),
        (f"{layers['final_layer']}.linear", shapes["final_layer"]),
        (f"{layers['final_layer']}.adaLN_modulation.1", shapes["adaLN"]),
    ):
        name = spelling.format(layer.replace(".", "_") if "__" in spelling else layer)
        state |= {f"{name}.lora_A.weight": normal(2, shape[1]), f"{name}.lora_B.weight": normal(shape[0], 2)}
    save_file(state, tmp_path / "x.safetensors")
    lora = open_lora(LoraRequest(tmp_path / "x.safetensors"), SHAPES, ALIASES, REPLACED)
    assert lora.deltas.keys() == {f"{Q}.weight"}
    assert "left out 3 layers" in lora.notes[0]
    assert "x_embedder" in lora.notes[0]
    del state[f"{Q}.lora_A.weight"], state[f"{Q}.lora_B.weight"]
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(ArtifactError, match="changes no layer of the checkpoint"):
        open_lora(LoraRequest(tmp_path / "x.safetensors"), SHAPES, ALIASES, REPLACED)


def test_the_pixel_embedder_is_merged_under_the_same_name(tmp_path: Path) -> None:
    state = {"x_embedder.lora_A.weight": normal(2, 12), "x_embedder.lora_B.weight": normal(D, 2)}
    save_file(state, tmp_path / "x.safetensors")
    lora = open_lora(LoraRequest(tmp_path / "x.safetensors"), SHAPES, ALIASES, REPLACED)
    assert lora.deltas.keys() == {"all_x_embedder.16-1.weight"}
    state["x_embedder.lora_A.weight"] = normal(2, 13)
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(ArtifactError, match=r"expected \[r, 12\]"):
        open_lora(LoraRequest(tmp_path / "x.safetensors"), SHAPES, ALIASES, REPLACED)


TEXT_ENCODERS = (
    *("text_encoder.layers.0.q_proj.lora_A.weight", "text_encoder.base_model.model.layers.0.q_proj.lora_A.weight"),
    *("lora_te_layers_0_q_proj.lora_down.weight", "lora_te1_layers_0_q_proj.alpha", "text_encoder_2.x.lora_B.weight"),
    *("base_model.model.text_encoder.layers.0.q_proj.lora_A.weight", "text_encoders.qwen3_4b.x.lora_A.weight"),
    *("lora_te2_x.hada_w1_a", "lycoris_text_encoder_x.lokr_w1", "lora_qwen3_4b_x.lora_up.weight", "te.x.dora_scale"),
)


@pytest.mark.parametrize("key", TEXT_ENCODERS)
def test_a_text_encoders_keys_are_left_out_when_asked(tmp_path: Path, key: str) -> None:
    plain = spelled(pairs_of(Q))
    with pytest.raises(ArtifactError, match="has 1 keys of a text encoder") as caught:
        opened(tmp_path, plain | {key: normal(2, 2)})
    assert f"`{key}`" in str(caught.value)
    assert "--skip-text-encoder-lora" in caught.value.hint
    request = LoraRequest(tmp_path / "x.safetensors", skip_text_encoder=True)
    lora = open_lora(request, SHAPES, ALIASES)
    assert lora.notes == ("left out 1 keys of a text encoder from `x.safetensors`",)
    assert_same(merged([lora]), merged([opened(tmp_path, plain)]))


def test_no_layer_of_the_model_is_a_text_encoders() -> None:
    assert not any(is_text_encoder(prefix + name) for name in SHAPES for prefix in ("", "lora_", "base_model.model."))


def test_a_layer_that_is_stated_twice_is_added_once(tmp_path: Path) -> None:
    pairs = pairs_of(*QKV, alpha=1.0)
    pairs = {layer: replace(pair, down=pairs[Q].down) for layer, pair in pairs.items()}
    lora = opened(tmp_path, spelled(pairs) | spelled(with_fused(pairs), "diffusion_model.{}".format))
    assert_same(merged([lora]), merged([opened(tmp_path, spelled(pairs))]))
    assert "states the change of some layers twice" in lora.notes[0]
    out = pairs_of("layers.0.attention.to_out.0")
    named = spelled({"layers.0.attention.out": out["layers.0.attention.to_out.0"]})
    assert_same(merged([opened(tmp_path, named | spelled(out))]), merged([opened(tmp_path, spelled(out))]))


def test_statements_that_differ_are_both_added(tmp_path: Path) -> None:
    """As a file that changes a fused layer and one of its parts: the weight gets both changes."""
    split = pairs_of(*QKV, "layers.0.attention.to_out.0", alpha=1.0)
    shared = {layer: replace(split[layer], down=split[Q].down) for layer in QKV}
    other = pairs_of("layers.0.attention.to_k")["layers.0.attention.to_k"]
    fused = with_fused(shared) | {"layers.0.attention.out": other}
    parts = spelled({layer: replace(pair, up=pair.up * 3) for layer, pair in split.items()})
    both = opened(tmp_path, spelled(fused, "diffusion_model.{}".format) | parts)
    assert "both changes are added" in both.notes[0]
    found = merged([both])
    for name in ("fused", "parts"):
        (tmp_path / name).mkdir()
    apart = merged([opened(tmp_path / "fused", spelled(fused)), opened(tmp_path / "parts", parts)])
    assert found.keys() == apart.keys()
    for name, values in apart.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-6, atol=1e-7)


def test_two_rescalings_of_one_weight_are_refused(tmp_path: Path) -> None:
    out = "layers.0.attention.to_out.0"
    rescaled = spelled(pairs_of(out)) | {f"{out}.dora_scale": np.ones((D, 1), np.float32)}
    with pytest.raises(ArtifactError, match="rescale"):
        opened(tmp_path, rescaled | spelled({"layers.0.attention.out": pairs_of(Q)[Q]}))


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_narrow_floats_are_read_exactly(tmp_path: Path, dtype: str) -> None:
    narrow = {
        name: values.astype(getattr(ml_dtypes, dtype)) for name, values in spelled(pairs_of(Q, CONV, alpha=2)).items()
    }
    wide = {name: values.astype(np.float32) for name, values in narrow.items()}
    assert_same(merged([opened(tmp_path, narrow)]), merged([opened(tmp_path, wide)]))


def test_folders(tmp_path: Path) -> None:
    state = spelled(pairs_of(Q, rank=4), "base_model.model.{}".format)
    save_file(state, tmp_path / "style.safetensors")
    (tmp_path / "._style.safetensors").write_bytes(bytes(4096))
    assert open_lora(LoraRequest(tmp_path), SHAPES, ALIASES).path.name == "style.safetensors"
    save_file(state, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 8}')
    lora = open_lora(LoraRequest(tmp_path), SHAPES, ALIASES)
    assert (lora.path.name, lora.deltas[f"{Q}.weight"].scale) == ("adapter_model.safetensors", 2.0)


# Broken files

SOUND: Mapping[str, State] = {
    "loha": loha(Q) | {f"{Q}.alpha": np.float32(1)},
    "loha of a convolution": loha(CONV),
    "lokr": factors(Q, lokr_w1=normal(2, 3), lokr_w2_a=normal(3, 2), lokr_w2_b=normal(2, 2), alpha=np.float32(1)),
    "lokr, both decomposed": factors(
        "layers.0.feed_forward.w1",
        lokr_w1_a=normal(2, 1),
        lokr_w1_b=normal(1, 2),
        lokr_w2_a=normal(4, 1),
        lokr_w2_b=normal(1, 3),
    ),
    "tucker": factors(
        CONV,
        **{"lora_up.weight": normal(4, 2, 1, 1), "lora_down.weight": normal(2, 3, 1, 1)},
        **{"lora_mid.weight": normal(2, 2, 3, 3), "dora_scale": normal(1, 3, 1, 1)},
    ),
    "lokr, tucker": factors(
        CONV,
        lokr_w1=normal(2, 3),
        lokr_w2_a=normal(1, 2),
        lokr_w2_b=normal(1, 1),
        lokr_t2=normal(1, 1, 3, 3),
        alpha=np.float32(1),
    ),
    "dora": spelled(pairs_of(Q, alpha=1.0)) | {f"{Q}.lora_magnitude_vector": normal(D)},
    "bias": spelled(pairs_of("all_x_embedder.16-1")) | {"all_x_embedder.16-1.lora_B.bias": normal(D)},
    "difference": {f"{NORM}.diff": normal(D), f"{Q}.diff": normal(D, D), "cap_embedder.1.diff": normal(D, CAPTION)},
}


@pytest.mark.parametrize("kind", SOUND)
def test_sound_files_change_what_they_name(tmp_path: Path, kind: str) -> None:
    lora = opened(tmp_path, SOUND[kind])
    start, found = values_of(base()), merged([lora])
    changed = {name for name, values in found.items() if not np.array_equal(values, start[name])}
    assert changed == lora.deltas.keys()


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(list(SOUND)), st.data())
def test_broken_files_are_refused_or_merge(
    tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject
) -> None:
    """A tensor that is missing, renamed or of another shape is never anything but an error that says so."""
    state = {name: np.asarray(values) for name, values in SOUND[kind].items()}
    for _ in range(data.draw(st.integers(1, 2))):
        name = data.draw(st.sampled_from(sorted(state)))
        values = state.pop(name)
        match data.draw(st.sampled_from(["drop", "reshape", "cut", "rename"])):
            case "reshape":
                state[name] = np.zeros(data.draw(st.lists(st.integers(0, FFN), max_size=4)), np.float32)
            case "cut":
                state[name] = values.reshape(-1)[:-1].copy()
            case "rename":
                part = data.draw(st.sampled_from(["lokr_t2", "hada_t1", "lora_mid.weight", "dora_scale", "alpha"]))
                state[f"{Q}.{part}"] = values
        if not state:
            return
    folder = tmp_path_factory.mktemp("broken")
    # Any other exception fails the test.
    with contextlib.suppress(ArtifactError):
        assert merged([opened(folder, state)]).keys() == SHAPES.keys()
