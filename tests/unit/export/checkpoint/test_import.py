"""Every spelling in, the same tensors out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from l2p_export.checkpoint.convert import write_checkpoint
from l2p_export.checkpoint.describe import describe
from l2p_export.checkpoint.loading import load_model, trunk_digest
from l2p_export.tensors.files import open_weights
from l2p_export.tensors.sources import read_tensor
from l2p_runtime.errors import ArtifactError
from l2p_runtime.files import partial_path
from unit.export.checkpoint.spellings import (
    DIMENSIONS,
    adapters,
    fp8_state,
    fused,
    is_frozen,
    latent_state,
    random_state,
    save_sharded,
)

SPELLINGS = ["bare", "model.diffusion_model.", "diffusion_model.", "fused", "fused-prefixed", "sharded", "folder"]


def _write(state: dict[str, torch.Tensor], spelling: str, folder: Path) -> Path:
    path = folder / "x.safetensors"
    if spelling == "sharded":
        return save_sharded(state, folder / "sharded", "diffusion_pytorch_model", 3)
    if spelling == "folder":
        (folder / "pipe" / "transformer").mkdir(parents=True)
        save_file(state, folder / "pipe" / "transformer" / "diffusion_pytorch_model.safetensors")
        return folder / "pipe"
    if spelling.startswith("fused"):
        save_file(fused(state, "model.diffusion_model." if spelling.endswith("prefixed") else ""), path)
    else:
        prefix = "" if spelling == "bare" else spelling
        save_file({prefix + name: value for name, value in state.items()}, path)
    return path


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(SPELLINGS), st.sampled_from(["published", "node-ui"]))
def test_any_spelling_and_back_is_bit_identical(
    tmp_path_factory: pytest.TempPathFactory, seed: int, spelling: str, target: str
) -> None:
    folder = tmp_path_factory.mktemp("spelling")
    state = random_state(seed)
    loaded = load_model(_write(state, spelling, folder))
    out = folder / "canonical.safetensors"
    digest = write_checkpoint(loaded, out, target, lambda size: None)
    again = load_model(out)
    assert trunk_digest(again) == digest
    assert again.checkpoint.spelling.fused is (target == "node-ui")
    for name, value in state.items():
        source = again.checkpoint.tensors[name]
        assert source.dtype == {torch.float32: "F32", torch.bfloat16: "BF16"}[value.dtype]
        np.testing.assert_array_equal(read_tensor(source), value.float().numpy())
    if target == "published":
        assert {name: (t.dtype, t.shape) for name, t in load_file(out).items()} == {
            name: (t.dtype, t.shape) for name, t in state.items()
        }


def test_what_a_killed_import_left_of_a_file_goes_with_the_next_one(tmp_path: Path) -> None:
    save_file(random_state(1), tmp_path / "x.safetensors")
    out, other = tmp_path / "out.safetensors", partial_path(tmp_path / "other.safetensors")
    for left in (partial_path(out), partial_path(out), other):
        left.write_bytes(b"half")
    write_checkpoint(load_model(tmp_path / "x.safetensors"), out, "published", lambda size: None)
    assert sorted(tmp_path.iterdir()) == sorted([other, out, tmp_path / "x.safetensors"])


@pytest.mark.parametrize("kind", ["pipeline", "sharded", "file", "bf16", "fused"])
def test_adapters_on_their_source_equal_the_merged_file(tmp_path: Path, kind: str) -> None:
    state = random_state(1)
    source = latent_state(state)
    save_file(adapters(state), tmp_path / "adapters.safetensors")
    if kind == "bf16":
        source = {name: value.to(torch.bfloat16) for name, value in source.items()}
    if kind in ("pipeline", "sharded"):
        root = save_sharded(source, tmp_path / "pipe" / "transformer", "diffusion_pytorch_model", 2)
        path = root.parent if kind == "pipeline" else root
    else:
        path = tmp_path / "source.safetensors"
        names = {"x_embedder": "all_x_embedder.2-1", "final_layer": "all_final_layer.2-1"}
        save_file(_node_ui_latent(source, names) if kind == "fused" else source, path)
    loaded = load_model(tmp_path / "adapters.safetensors", path)
    assert loaded.equal_layers == tuple(DIMENSIONS.trunk)
    for name, value in state.items():
        expected = value.to(torch.bfloat16) if kind == "bf16" and is_frozen(name) else value
        np.testing.assert_array_equal(read_tensor(loaded.checkpoint.tensors[name]), expected.float().numpy())
    save_file(state, tmp_path / "merged.safetensors")
    assert trunk_digest(loaded) == trunk_digest(load_model(tmp_path / "merged.safetensors"))
    compared = load_model(tmp_path / "merged.safetensors", path)
    assert compared.equal_layers == tuple(DIMENSIONS.trunk)
    assert compared.model.spec == loaded.model.spec


def test_a_source_shortens_the_trunk_to_what_is_equal(tmp_path: Path) -> None:
    state = random_state(2)
    source = latent_state(state)
    first = f"layers.{DIMENSIONS.trunk.start}.ffn_norm1.weight"
    save_file(state | {first: state[first] + 1}, tmp_path / "x.safetensors")
    save_file(source, tmp_path / "source.safetensors")
    loaded = load_model(tmp_path / "x.safetensors", tmp_path / "source.safetensors")
    assert loaded.model.spec.trunk_layers == (DIMENSIONS.trunk.start + 1, DIMENSIONS.trunk.stop)
    assert loaded.model.blocks("stem")[-1] == f"layers.{DIMENSIONS.trunk.start}"


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("spelling", ["", "model.diffusion_model."])
def test_fp8_weights_are_multiplied_by_their_scales(tmp_path: Path, spelling: str, *, per_row: bool) -> None:
    stored, meant = fp8_state(random_state(3), per_row=per_row)
    save_file({spelling + name: value for name, value in stored.items()}, tmp_path / "x.safetensors")
    loaded = load_model(tmp_path / "x.safetensors")
    for name, value in meant.items():
        np.testing.assert_array_equal(read_tensor(loaded.checkpoint.tensors[name]), value)
        joined = np.concatenate(list(loaded.checkpoint.tensors[name].chunks(100)))
        np.testing.assert_array_equal(joined, value.reshape(-1))
    write_checkpoint(loaded, tmp_path / "out.safetensors", "published", lambda size: None)
    for name, value in load_file(tmp_path / "out.safetensors").items():
        np.testing.assert_array_equal(value.float().numpy(), meant[name])


def test_fused_fp8_with_row_scales_splits_right(tmp_path: Path) -> None:
    state = random_state(4)
    qkv = torch.cat([state[f"layers.2.attention.to_{part}.weight"] for part in "qkv"])
    scale = torch.linspace(0.5, 2, len(qkv))
    coded = (qkv / scale[:, None]).to(torch.float8_e4m3fn)
    spelled = fused(state, "")
    spelled |= {"layers.2.attention.qkv.weight": coded, "layers.2.attention.qkv.weight_scale": scale}
    save_file(spelled, tmp_path / "x.safetensors")
    tensors = load_model(tmp_path / "x.safetensors").checkpoint.tensors
    found = np.concatenate([read_tensor(tensors[f"layers.2.attention.to_{part}.weight"]) for part in "qkv"])
    np.testing.assert_array_equal(found, (coded.float() * scale[:, None]).numpy())


def test_scales_without_a_weight_and_of_a_wrong_shape_are_named(tmp_path: Path) -> None:
    state = random_state(5)
    for extra, says in (
        ({"layers.77.w9.scale_weight": torch.ones(())}, "belongs to no weight `layers.77.w9.weight`"),
        ({"layers.1.attention.to_q.scale_weight": torch.ones(5)}, r"has shape \[5\], expected one number"),
    ):
        save_file(state | extra, tmp_path / "x.safetensors")
        with pytest.raises(ArtifactError, match=says):
            load_model(tmp_path / "x.safetensors")


def test_integer_repacks_are_refused_with_what_to_fetch(tmp_path: Path) -> None:
    state = random_state(5)
    state["layers.1.attention.to_q.weight"] = torch.zeros(96, 96, dtype=torch.int8)
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(ArtifactError, match=r"`layers\.1\.attention\.to_q\.weight` \(I8\)") as caught:
        load_model(tmp_path / "x.safetensors")
    assert "fetch the original file" in caught.value.hint


def test_adapters_without_their_source_say_what_to_give(tmp_path: Path) -> None:
    save_file(adapters(random_state(6)), tmp_path / "a.safetensors")
    with pytest.raises(ArtifactError) as caught:
        load_model(tmp_path / "a.safetensors")
    assert "--source" in caught.value.hint


def test_another_source_is_noticed(tmp_path: Path) -> None:
    state = random_state(7)
    digest = "0" * 64
    save_file(adapters(state), tmp_path / "a.safetensors", {"l2p.trunk_sha256": digest})
    save_file(latent_state(state), tmp_path / "s.safetensors")
    loaded = load_model(tmp_path / "a.safetensors", tmp_path / "s.safetensors")
    with pytest.raises(ArtifactError, match="belongs to trunk 0000000000000000"):
        trunk_digest(loaded)
    save_file(state, tmp_path / "merged.safetensors")
    save_file(latent_state(random_state(8)), tmp_path / "other.safetensors")
    with pytest.raises(ArtifactError, match="no main layer"):
        load_model(tmp_path / "merged.safetensors", tmp_path / "other.safetensors")


def test_a_source_of_another_width_is_named(tmp_path: Path) -> None:
    state = random_state(9)
    source = latent_state(state)
    source["t_embedder.mlp.0.bias"] = torch.zeros(3)
    save_file(adapters(state), tmp_path / "a.safetensors")
    save_file(source, tmp_path / "s.safetensors")
    with pytest.raises(ArtifactError, match=r"`t_embedder\.mlp\.0\.bias` has shape"):
        load_model(tmp_path / "a.safetensors", tmp_path / "s.safetensors")


def test_describe_has_an_answer_for_every_file(tmp_path: Path) -> None:
    state = random_state(10)
    files = {
        "checkpoint": state,
        "adapters": adapters(state),
        "latent source": latent_state(state),
        "LoRA": {"diffusion_model.layers.1.attention.to_q.lora_A.weight": torch.ones(2, 96)},
        "text encoder": {"model.layers.0.self_attn.q_proj.weight": torch.ones(2, 2)},
        "unknown weights": {"w": torch.ones(2)},
    }
    for kind, tensors in files.items():
        save_file(tensors, tmp_path / "x.safetensors", {"license": "MIT"})
        facts = describe(tmp_path / "x.safetensors")
        assert facts["kind"] == kind
        assert facts["licence"] == "MIT"
        json.dumps(facts)
    save_file(files["LoRA"], tmp_path / "x.safetensors")
    assert describe(tmp_path / "x.safetensors")["ranks"] == {"2": 1}
    factors = {"hada_w1_b": (3, 96), "dora_scale": (96, 1), "alpha": ()}
    loha = {f"lycoris_layers_1_attention_to_q.{part}": torch.ones(shape) for part, shape in factors.items()}
    save_file(loha | {"lora_te_x.lora_down.weight": torch.ones(2, 2)}, tmp_path / "x.safetensors")
    facts = describe(tmp_path / "x.safetensors")
    assert (facts["methods"], facts["ranks"], facts["layers"]) == ({"DoRA": 1, "LoHa": 1}, {"3": 1}, 1)
    assert facts["text_encoder_keys"] == 1
    save_file(state, tmp_path / "x.safetensors")
    facts = describe(tmp_path / "x.safetensors", digest=True)
    assert facts["spelling"]["as_written_by"] == "the published training code"
    assert facts["dtypes"]["layers"] == {"BF16": 30, "F32": 60}
    assert facts["trunk_sha256"] == trunk_digest(load_model(tmp_path / "x.safetensors"))
    del state["layers.1.attention_norm1.weight"]
    save_file(state, tmp_path / "x.safetensors")
    assert "missing `layers.1.attention_norm1.weight`" in describe(tmp_path / "x.safetensors")["problem"]


class TestFolders:
    """Folders that contradict themselves."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return save_sharded({f"t{i}": torch.full((2,), i) for i in range(6)}, tmp_path / "f", "model", 2)

    def test_shards_are_joined(self, folder: Path) -> None:
        assert sorted(open_weights(folder).tensors) == [f"t{i}" for i in range(6)]

    def test_missing_shards_are_named(self, folder: Path) -> None:
        (folder / "model-00002-of-00002.safetensors").unlink()
        with pytest.raises(ArtifactError, match="model-00002-of-00002"):
            open_weights(folder)

    def test_two_files_that_claim_a_tensor(self, folder: Path) -> None:
        save_file({"t0": torch.zeros(2), "t1": torch.zeros(2)}, folder / "model-00002-of-00002.safetensors")
        with pytest.raises(ArtifactError, match=r"both hold `t0`|does not place there"):
            open_weights(folder)

    def test_tensors_that_no_shard_holds(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        data = json.loads(index.read_text())
        data["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
        index.write_text(json.dumps(data))
        with pytest.raises(ArtifactError, match="`ghost`"):
            open_weights(folder)

    def test_a_single_file_that_disagrees_with_the_index(self, folder: Path) -> None:
        save_file({f"t{i}": torch.zeros(2) for i in range(6)}, folder / "model.safetensors")
        assert len(open_weights(folder).tensors) == 6
        save_file({f"t{i}": torch.zeros(3) for i in range(6)}, folder / "model.safetensors")
        with pytest.raises(ArtifactError, match="disagree on 6 tensors, `t0` first"):
            open_weights(folder)

    @pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", 7, "x.bin"])
    def test_shards_outside_the_folder_are_refused(self, folder: Path, shard: object) -> None:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"t0": shard}}))
        with pytest.raises(ArtifactError, match=r"expected a \.safetensors file of the folder"):
            open_weights(folder)

    def test_links_that_leave_the_folder_are_refused(self, folder: Path, tmp_path: Path) -> None:
        shard = folder / "model-00001-of-00002.safetensors"
        shard.rename(tmp_path / "elsewhere.safetensors")
        shard.symlink_to(tmp_path / "elsewhere.safetensors")
        with pytest.raises(ArtifactError, match="a link that leaves its folder") as caught:
            open_weights(folder)
        assert "cp -rL" in caught.value.hint

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', "{" * 5000])
    def test_a_damaged_index(self, folder: Path, text: str) -> None:
        (folder / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ArtifactError, match="index"):
            open_weights(folder)


def _node_ui_latent(source: dict[str, torch.Tensor], names: dict[str, str]) -> dict[str, torch.Tensor]:
    out = {}
    for name, value in source.items():
        if ".to_k." in name or ".to_v." in name:
            continue
        if ".to_q." in name:
            parts = [source[name.replace("to_q", part)] for part in ("to_q", "to_k", "to_v")]
            out[name.replace("to_q", "qkv")] = torch.cat(parts)
            continue
        for new, old in names.items():
            name = name.replace(old, new)  # noqa: PLW2901
        name = name.replace(".to_out.0.", ".out.").replace(".norm_q.", ".q_norm.").replace(".norm_k.", ".k_norm.")  # noqa: PLW2901
        out[name] = value
    return {f"model.diffusion_model.{name}": value for name, value in out.items()}
