"""From a prompt to a picture, through a bundle with a text encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen3Model

from conftest import run_cli
from l2p_runtime import Pipeline, UsageError
from parity.text_models import published_tokenizer, published_tokens, train_tokenizer

if TYPE_CHECKING:
    from conftest import Bundles

KIND = "tiny-16-fused"
SIZE = {"height": 48, "width": 32, "seed": 4, "steps": 2}


def test_a_prompt_draws_what_its_published_embeddings_draw(bundles: Bundles) -> None:
    path = bundles.path(KIND)
    model = Qwen3Model.from_pretrained(bundles.root / "qwen3").eval()
    tokens = published_tokens(published_tokenizer(train_tokenizer()), "ein roter Kreis, \u7ea2\u8272")
    with torch.no_grad():
        states = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states[-2]
    with Pipeline.open(path) as pipe:
        drawn = pipe.generate("ein roter Kreis, \u7ea2\u8272", **SIZE, dtype="uint16")
        expected = pipe.generate(prompt_embeds=states[0].numpy(), **SIZE, dtype="uint16")
        other = pipe.generate("a blue square", **SIZE, dtype="uint16")
    assert np.abs(drawn.astype(np.int64) - expected.astype(np.int64)).max() <= 4
    assert np.abs(drawn.astype(np.int64) - other.astype(np.int64)).max() > 40


def test_guidance_without_a_negative_prompt_steers_from_the_empty_one(bundles: Bundles) -> None:
    with Pipeline.open(bundles.path(KIND)) as pipe:
        implied = pipe.generate("a circle", **SIZE, guidance=3.0)
        empty = pipe.generate("a circle", **SIZE, guidance=3.0, negative_prompt="")
        other = pipe.generate("a circle", **SIZE, guidance=3.0, negative_prompt="a square")
    np.testing.assert_array_equal(implied, empty)
    assert (implied != other).any()


def test_the_command_line_takes_prompts(bundles: Bundles, tmp_path: Path) -> None:
    out = tmp_path / "x.png"
    arguments = ("--prompt", "a red circle", "--negative", "blue", "--guidance", 2, "--size", "32x32", "--out", out)
    result = run_cli("generate", bundles.path(KIND), *arguments)
    assert result.returncode == 0, result.stderr
    with Image.open(out) as image:
        assert image.text["prompt"] == "a red circle"
        assert image.text["negative_prompt"] == "blue"


def test_prompts_that_are_too_long_are_refused_or_cut_by_flag(bundles: Bundles, tmp_path: Path) -> None:
    out, long = tmp_path / "x.png", "word " * 600
    base = ("generate", bundles.path(KIND), "--prompt", long, "--size", "32x32", "--steps", 1, "--out", out)
    refused = run_cli(*base)
    assert refused.returncode == 2
    assert "512" in refused.stderr
    assert "--truncate-prompt" in refused.stderr
    assert not out.exists()
    assert run_cli(*base, "--truncate-prompt").returncode == 0
    assert out.exists()
    with Pipeline.open(bundles.path(KIND)) as pipe, pytest.raises(UsageError):
        pipe.generate(long, **SIZE)


def test_groups_of_prompts_are_encoded_as_if_each_were_alone(bundles: Bundles) -> None:
    """The last bits of embeddings depend on what is padded beside them; here that is only their own group."""
    groups = [("a red circle", ""), ("a",), ("a blue square left of a green triangle", "red"), (), ("a red circle",)]
    with Pipeline.open(bundles.path(KIND)) as pipe:
        together = pipe.encode_each(groups)
        for group, found in zip(groups, together, strict=True):
            alone = pipe.encode_each([group])[0]
            assert len(found) == len(group)
            assert all((one == other).all() for one, other in zip(found, alone, strict=True))
        assert (together[0][0] == pipe.encode(["a red circle", ""])[0]).all()
        assert pipe.encode_each([]) == []
        assert pipe.encode_each([(), ()]) == [[], []]
        drawn = pipe.generate("a red circle", **SIZE, guidance=2.0, dtype="float16")
        embeds = {"prompt_embeds": together[0][0], "negative_embeds": together[0][1]}
        assert (drawn == pipe.generate(**embeds, **SIZE, guidance=2.0, dtype="float16")).all()
        with pytest.raises(UsageError, match="expected a sequence of texts"):
            pipe.encode_each(["a"])


def test_verify_runs_the_text_encoder_too(bundles: Bundles) -> None:
    result = run_cli("verify", bundles.path(KIND), "--json")
    assert result.returncode == 0, result.stderr
    ledger = json.loads(result.stdout)["ledger"]
    assert [entry["status"] for entry in ledger if entry["network"] == "text_encoder"] == ["passed"]


def test_the_last_layer_and_the_final_norm_are_never_exported(bundles: Bundles) -> None:
    from l2p_runtime.tensorfile import open_tensorfile

    (weights,) = (bundles.path(KIND) / "graphs").glob("text_encoder.*.safetensors")
    names = set(open_tensorfile(weights).tensors)
    assert any("layers.2." in name for name in names)
    assert not any("layers.3." in name for name in names)
    assert not any(name.endswith("model.norm.weight") or name == "norm.weight" for name in names)
