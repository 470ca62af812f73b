"""Folders that hold a text encoder, and folders that only look like one."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from l2p_export.families.qwen3 import PUBLISHED, open_text_encoder
from l2p_export.families.qwen3.dimensions import (
    TextEncoderDimensions,
    network_shapes,
    parse_config,
    read_config,
    text_encoder_shapes,
)
from l2p_export.graphs.export import weight_bytes
from l2p_export.precision.plans import plain_plan
from l2p_export.tensors.checkpoint import fingerprint
from l2p_runtime.errors import ArtifactError, L2PError, UsageError
from parity.text_models import WIDTH, train_tokenizer, write_qwen3

# Qwen3-4B as published, written before transformers 5.
QWEN3_4B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def test_the_published_configuration() -> None:
    config = parse_config(QWEN3_4B)
    assert config.sizes == TextEncoderDimensions()
    assert (config.rope_theta, config.norm_epsilon, config.built_layers) == (1e6, 1e-6, 35)
    shapes = text_encoder_shapes(config.sizes)
    assert PUBLISHED[fingerprint(shapes)] == "Qwen3-4B text encoder"
    assert len(shapes) - len(network_shapes(config)) == 12


def test_either_place_of_the_rotary_base() -> None:
    nested = {key: value for key, value in QWEN3_4B.items() if key not in ("rope_theta", "rope_scaling")}
    nested["rope_parameters"] = {"rope_theta": 5e6, "rope_type": "default"}
    assert parse_config(nested).rope_theta == 5e6
    assert parse_config(QWEN3_4B | {"rope_theta": 1234567.89}).rope_theta == float(np.float32(1234567.89))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "qwen2"}, "`model_type` is 'qwen2', expected \"qwen3\""),
        ({"model_type": None}, "`model_type` is None"),
        ({"attention_bias": True}, "`attention_bias` is True, expected false"),
        ({"attention_bias": 0}, "`attention_bias` is 0"),
        ({"hidden_act": "gelu"}, "`hidden_act` is 'gelu'"),
        ({"use_sliding_window": True}, "`use_sliding_window` is True"),
        ({"quantization_config": {"bits": 4}}, "`quantization_config` is"),
        ({"rope_scaling": {"type": "yarn"}}, "`rope_scaling` is"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "`layer_types` is"),
        ({"layer_types": "full_attention"}, "`layer_types` is"),
        ({"vocab_size": 0}, "`vocab_size` is 0, expected a whole number from 1 to"),
        ({"vocab_size": 2**40}, "`vocab_size` is"),
        ({"hidden_size": 2560.0}, "`hidden_size` is 2560.0"),
        ({"hidden_size": "2560"}, "`hidden_size` is '2560'"),
        ({"hidden_size": True}, "`hidden_size` is True"),
        ({"num_hidden_layers": 1}, "`num_hidden_layers` is 1, expected 2 or more"),
        ({"num_hidden_layers": 10**9}, "`num_hidden_layers` is 1000000000"),
        ({"num_key_value_heads": 5}, "`num_attention_heads` is 32, expected a multiple of 5"),
        ({"head_dim": 127}, "`head_dim` is 127, expected an even number"),
        ({"head_dim": None}, "`head_dim` is None"),
        ({"rms_norm_eps": 0.0}, "`rms_norm_eps` is 0.0"),
        ({"rms_norm_eps": -1e-6}, "`rms_norm_eps` is -1e-06"),
        ({"rms_norm_eps": float("nan")}, "`rms_norm_eps` is nan"),
        ({"rms_norm_eps": True}, "`rms_norm_eps` is True"),
        ({"rope_theta": 1.0}, "`rope_theta` is 1.0"),
        ({"rope_theta": 10**400}, "`rope_theta` is 1000"),
        ({"rope_theta": "1e6"}, "`rope_theta` is '1e6'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "`rope_parameters.rope_type` is 'yarn'"),
        ({"rope_parameters": {}}, "`rope_parameters.rope_theta` is missing"),
        ({"rope_parameters": 7}, "`rope_parameters` is 7"),
    ],
)
def test_configurations_of_other_networks(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        parse_config(QWEN3_4B | change)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "field",
    [
        *("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "intermediate_size", "rms_norm_eps", "rope_theta"),
    ],
)
def test_missing_fields(field: str) -> None:
    with pytest.raises(ArtifactError, match=rf"`{field}` is missing"):
        parse_config({key: value for key, value in QWEN3_4B.items() if key != field})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None)
@given(field=st.sampled_from([*QWEN3_4B, "rope_parameters", "layer_types", "quantization_config"]), value=JSON)
def test_fuzz_configuration(field: str, value: object) -> None:
    try:
        config = parse_config(QWEN3_4B | {field: value})
    except ArtifactError:
        return
    assert config.sizes.layers >= 2
    assert config.rope_theta >= 1


@pytest.mark.parametrize("value", [None, [], 7, "qwen3"])
def test_no_configuration(value: object) -> None:
    with pytest.raises(ArtifactError, match="expected an object"):
        parse_config(value)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3")
    write_qwen3(folder)
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "qwen3"))


def test_weight_bytes(good: Path) -> None:
    model = open_text_encoder(good, WIDTH).model
    full, half = (weight_bytes(model, "text_encoder", plain_plan(model, plan)) for plan in ("fp32", "fp16"))
    assert full == 2 * half > 0
    assert model.network.outputs[0].shape == ("B", "L", WIDTH)


def test_a_folder_of_a_cache(good: Path, tmp_path: Path) -> None:
    """A Hugging Face cache, where every file is a link to a blob."""
    model = tmp_path / "models--org--name"
    snapshot = model / "snapshots" / "c1"
    snapshot.mkdir(parents=True)
    shutil.copytree(good, model / "blobs")
    for blob in (model / "blobs").iterdir():
        (snapshot / blob.name).symlink_to(f"../../blobs/{blob.name}")
    for path in (model, snapshot):
        assert open_text_encoder(path, WIDTH).tokenizer == snapshot / "tokenizer.json"
    (model / "blobs" / "config.json").unlink()
    with pytest.raises(ArtifactError, match=r"is a link to .*, which is not there"):
        open_text_encoder(model, WIDTH)


def test_pipeline_folders(good: Path, tmp_path: Path) -> None:
    """As diffusers lays them out: `text_encoder` and `tokenizer` side by side."""
    shutil.copytree(good, tmp_path / "text_encoder")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "text_encoder" / "tokenizer.json").rename(tmp_path / "tokenizer" / "tokenizer.json")
    for path in (tmp_path, tmp_path / "text_encoder"):
        encoder = open_text_encoder(path, WIDTH)
        assert encoder.folder == tmp_path / "text_encoder"
        assert encoder.tokenizer.resolve() == tmp_path / "tokenizer" / "tokenizer.json"


def test_the_last_layer_and_the_norm_may_be_absent(folder: Path) -> None:
    edit(
        folder,
        lambda weights: [weights.pop(name) for name in list(weights) if "layers.3." in name or name == "norm.weight"],
    )
    assert len(open_text_encoder(folder, WIDTH).tensors) == 1 + 3 * 11


def edit(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    weights = {name: value.copy() for name, value in load_file(folder / "model.safetensors").items()}
    change(weights)
    save_file(weights, folder / "model.safetensors")


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def link_away(folder: Path, name: str) -> None:
    elsewhere = folder.parent / f"elsewhere-{name}"
    (folder / name).rename(elsewhere)
    (folder / name).symlink_to(elsewhere)


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "cannot read"),
    "config of text": (lambda f: (f / "config.json").write_text("qwen3"), "is not JSON"),
    "config of bytes": (lambda f: (f / "config.json").write_bytes(b"\xff"), "is not JSON"),
    "config too deep": (lambda f: (f / "config.json").write_text("[" * 100_000), "is not JSON"),
    "config is a folder": (lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()), "cannot read"),
    "config of another": (lambda f: edit_config(f, lambda c: c.update(model_type="llama")), "`model_type` is 'llama'"),
    "config linked away": (lambda f: link_away(f, "config.json"), "leaves its folder"),
    "weights linked away": (lambda f: link_away(f, "model.safetensors"), "leaves its folder"),
    "tokenizer linked away": (lambda f: link_away(f, "tokenizer.json"), "leaves its folder"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "neither `model.safetensors`"),
    "more layers": (
        lambda f: edit_config(f, lambda c: (c.update(num_hidden_layers=6), c.pop("layer_types"))),
        "missing `model.layers.4.input_layernorm.weight`",
    ),
    "fewer layers": (
        lambda f: edit_config(f, lambda c: (c.update(num_hidden_layers=2), c.pop("layer_types"))),
        "unknown `model.layers.2.input_layernorm.weight`",
    ),
    "other feed-forward": (
        lambda f: edit_config(f, lambda c: c.update(intermediate_size=71)),
        "`model.layers.0.mlp.down_proj.weight` has shape [40, 72], expected [40, 71]",
    ),
    "missing": (lambda f: edit(f, lambda w: w.pop("layers.1.self_attn.q_norm.weight")), "missing `model.layers.1"),
    "biases": (
        lambda f: edit(f, lambda w: w.update({"layers.0.self_attn.q_proj.bias": np.zeros(96, np.float32)})),
        "unknown `model.layers.0.self_attn.q_proj.bias`",
    ),
    "integers": (
        lambda f: edit(f, lambda w: w.update({"embed_tokens.weight": w["embed_tokens.weight"].astype(np.int8)})),
        "`model.embed_tokens.weight` is I8",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer.json"),
    "no special tokens": (
        lambda f: train_tokenizer(special=()).save(str(f / "tokenizer.json")),
        "no special token `<|im_start|>`",
    ),
    "larger tokenizer": (
        lambda f: train_tokenizer(special=("<|im_start|>", "<|im_end|>", *map(str, range(99)))).save(
            str(f / "tokenizer.json")
        ),
        "embedding rows",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_folder(case: str, folder: Path) -> None:
    spoil, says = BAD[case]
    spoil(folder)
    with pytest.raises(ArtifactError) as caught:
        open_text_encoder(folder, WIDTH)
    assert says in str(caught.value)


def test_another_width(good: Path) -> None:
    with pytest.raises(ArtifactError, match="width 40, the checkpoint takes 2560"):
        open_text_encoder(good, 2560)


@pytest.mark.parametrize("name", ["absent", "config.json"])
def test_no_folder(name: str, good: Path) -> None:
    with pytest.raises(UsageError, match="is no folder"):
        open_text_encoder(good / name, WIDTH)


def test_read_config_names_the_file(folder: Path) -> None:
    edit_config(folder, lambda c: c.update(head_dim=3))
    with pytest.raises(L2PError, match=r"config.json`: `head_dim` is 3"):
        read_config(folder)


def test_the_configuration_is_not_changed() -> None:
    before = copy.deepcopy(QWEN3_4B)
    parse_config(QWEN3_4B)
    assert before == QWEN3_4B
