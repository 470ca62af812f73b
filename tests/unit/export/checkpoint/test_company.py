"""Files that hold more than the transformer, and names with any prefix."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from conftest import run_cli
from l2p_export.checkpoint.describe import describe
from l2p_export.checkpoint.loading import company_note, load_model
from l2p_export.families.company import PREFIXES, grouped, without_prefix
from l2p_export.families.z_image_l2p.spelling import is_own
from l2p_export.tensors.sources import read_tensor
from l2p_runtime.errors import ArtifactError
from unit.export.checkpoint.spellings import adapters, fused, latent_state, random_state

State = dict[str, torch.Tensor]

STATE = random_state(21)

COMPANY: State = {
    "norm_final.weight": torch.ones(4),
    "text_encoders.qwen3_4b.transformer.model.layers.0.self_attn.q_proj.weight": torch.ones(2, 2),
    "text_encoders.qwen3_4b.transformer.model.layers.0.mlp.up_proj.weight": torch.zeros(2, 2, dtype=torch.int8),
    "text_encoders.qwen3_4b.logit_scale": torch.ones(()),
    "text_encoders.qwen3_4b.tokenizer_json": torch.zeros(9, dtype=torch.uint8),
    "tokenizer_json": torch.zeros(9, dtype=torch.uint8),
    "spiece_model": torch.zeros(9, dtype=torch.uint8),
    "vae.decoder.conv_in.weight": torch.ones(2, 2, 3, 3),
    "first_stage_model.encoder.conv_in.bias": torch.ones(2),
    "model.diffusion_model.norm_final.weight": torch.ones(4),
}


def save(folder: Path, state: State) -> Path:
    save_file(state, folder / "x.safetensors")
    return folder / "x.safetensors"


def require_equal(path: Path, source: Path | None = None) -> None:
    """Require the published names and exactly the values of `STATE`."""
    tensors = load_model(path, source).checkpoint.tensors
    assert tensors.keys() == STATE.keys()
    for name, value in STATE.items():
        np.testing.assert_array_equal(read_tensor(tensors[name]), value.float().numpy())


@pytest.mark.parametrize(
    ("prefix", "is_fused"),
    [
        ("pipe.dit.", False),
        ("module.", True),
        ("_orig_mod.", False),
        ("transformer.", True),
        ("base_model.model.", False),
        ("model.diffusion_model.", False),
        ("diffusion_model.", True),
        ("model.", False),
        ("dit.", True),
        ("module._orig_mod.", False),
        ("_orig_mod.module.", True),
        ("base_model.model.transformer.", False),
        ("pipe.dit._orig_mod.", True),
        ("state_dict.model.diffusion_model.", True),
        ("_forward_module._fsdp_wrapped_module.", False),
    ],
)
def test_every_prefix_reads_as_the_published_names(tmp_path: Path, prefix: str, *, is_fused: bool) -> None:
    state = fused(STATE, "") if is_fused else STATE
    path = save(tmp_path, {prefix + name: value for name, value in state.items()} | COMPANY)
    require_equal(path)
    checkpoint = load_model(path).checkpoint
    assert checkpoint.spelling.prefix == prefix
    assert set(checkpoint.company) == COMPANY.keys()


def test_bare_and_prefixed_names_may_be_mixed(tmp_path: Path) -> None:
    state = {
        name if name.startswith("local_decoder.") else f"diffusion_model.{name}": value for name, value in STATE.items()
    }
    path = save(tmp_path, state | COMPANY)
    require_equal(path)
    assert describe(path)["spelling"]["prefix"] == "diffusion_model."


@pytest.mark.parametrize("second", ["pipe.dit.", "", "_orig_mod."])
def test_two_prefixes_that_give_one_name_are_refused(tmp_path: Path, second: str) -> None:
    state = {f"model.diffusion_model.{name}": value for name, value in STATE.items()}
    state[f"{second}layers.1.attention.to_q.weight"] = STATE["layers.1.attention.to_q.weight"].clone()
    with pytest.raises(ArtifactError, match=r"both hold `layers\.1\.attention\.to_q\.weight`") as caught:
        load_model(save(tmp_path, state))
    assert f"`{second}layers.1.attention.to_q.weight`" in str(caught.value)
    assert "model.diffusion_model.layers.1.attention.to_q.weight" in str(caught.value)


@given(st.lists(st.sampled_from(PREFIXES), max_size=6), st.sampled_from(sorted(STATE)))
def test_prefixes_come_off_in_any_number_and_order(prefixes: list[str], name: str) -> None:
    assert without_prefix("".join(prefixes) + name, is_own) == name


@settings(max_examples=200)
@given(st.text(st.sampled_from("abdelmopt_.0")), st.lists(st.sampled_from(PREFIXES), max_size=3))
def test_other_names_stay_exactly_as_they_are(text: str, prefixes: list[str]) -> None:
    name = "".join(prefixes) + text
    found = without_prefix(name, is_own)
    assert found == name or is_own(found)


def test_a_checkpoint_tells_its_company_in_one_line(tmp_path: Path) -> None:
    path = save(tmp_path, STATE | COMPANY)
    assert company_note(load_model(path).checkpoint) == (
        "passed over what is no part of the transformer: `first_stage_model.encoder.conv_in.bias`, "
        "`model.diffusion_model.norm_final.weight`, `norm_final.weight`, `spiece_model`, "
        "`text_encoders.*` (4 tensors), `tokenizer_json`, `vae.decoder.conv_in.weight`"
    )
    result = run_cli("import", path, "--out", tmp_path / "out.safetensors")
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("passed over") == 1
    assert load_file(tmp_path / "out.safetensors").keys() == STATE.keys()
    facts = json.loads(run_cli("inspect", path, "--json").stdout)
    assert facts["kind"] == "checkpoint"
    assert "`text_encoders.*` (4 tensors)" in facts["passed_over"]
    assert company_note(load_model(save(tmp_path, STATE)).checkpoint) == ""


@pytest.mark.parametrize("junk", [{}, {"siglip_embedder.0.weight": torch.ones(3)}, {"layers.0.extra": torch.ones(2)}])
def test_a_source_may_have_anything_beside_its_layers(tmp_path: Path, junk: State) -> None:
    """None of it is a fault of the adapters."""
    source = tmp_path / "source.safetensors"
    save_file(latent_state(STATE) | COMPANY | junk, source)
    require_equal(save(tmp_path, adapters(STATE)), source)


def test_a_source_whose_tensor_is_misshapen_is_blamed_itself(tmp_path: Path) -> None:
    source = latent_state(STATE)
    source["layers.2.feed_forward.w1.weight"] = torch.zeros(3, 3)
    save_file(source, tmp_path / "source.safetensors")
    with pytest.raises(ArtifactError, match=r"the source `.*source\.safetensors` does not fit .*: 1 tensor"):
        load_model(save(tmp_path, adapters(STATE)), tmp_path / "source.safetensors")


def test_unknown_parts_of_a_checkpoint_are_refused_in_one_item_each(tmp_path: Path) -> None:
    """They may belong to another architecture, which would be exported wrongly."""
    strange = {f"siglip_embedder.{index}.weight": torch.ones(2) for index in range(300)}
    strange |= {"ema.layers.0.attention.to_q.weight": torch.ones(2), "rope.table": torch.zeros(4, 2, dtype=torch.int64)}
    with pytest.raises(ArtifactError) as caught:
        load_model(save(tmp_path, STATE | strange))
    message = str(caught.value)
    assert "unknown `siglip_embedder.*` (300 tensors)" in message
    assert "unknown `ema.layers.0.attention.to_q.weight`" in message
    assert "unknown `rope.table`" in message
    assert len(message) < 600


def test_a_text_encoder_beside_the_transformer_is_not_taken_for_its_layers(tmp_path: Path) -> None:
    names = ("self_attn.q_proj", "mlp.up_proj", "input_layernorm", "post_attention_layernorm")
    state = STATE | {f"text_encoder.model.layers.0.{name}.weight": torch.ones(2) for name in names}
    require_equal(save(tmp_path, state))


def test_groups_of_names() -> None:
    assert grouped(["b.y", "a", "b.x", "c.d.e"]) == ["`a`", "`b.*` (2 tensors)", "`c.d.e`"]
    assert grouped([]) == []
