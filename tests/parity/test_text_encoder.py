"""The text encoder against transformers: our torch network, its graph, and the way from a prompt to embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from transformers import Qwen3Model

from conftest import Bundles
from fakes.traces import text_traces
from l2p_engines.store.stages import Home, StageRunner
from l2p_export.build.text import add_text_encoder
from l2p_export.families.qwen3 import TextEncoder, open_text_encoder
from l2p_export.families.qwen3.folder import torch_text_encoder
from l2p_export.precision.plans import plain_plan
from l2p_runtime.backends import open_backend
from l2p_runtime.backends.host import HostDevice
from l2p_runtime.backends.onnx import OnnxEngine
from l2p_runtime.contract import LedgerEntry, graph_comparison, ranges_comparison
from l2p_runtime.progress import Silent
from l2p_runtime.text import CHAT_TEMPLATE, encode_prompts, load_tokenizer
from parity.graphs import run
from parity.models import relative_error
from parity.text_models import WIDTH, published_tokenizer, published_tokens, random_qwen3, train_tokenizer, write_qwen3

# Measured 6.4e-7 in torch and 8.1e-7 in the graph, both at 512 tokens.
TOLERANCE = 1e-5
# Measured 1.8e-3, and 2.2e-3 with products beyond the range of float16.
FLOAT16 = 1e-2

LENGTHS = [(1,), (2,), (7,), (24, 7), (5, 40, 1), (512,)]
"""Real tokens of each row of a batch."""


@dataclass(frozen=True)
class Encoders:
    published: Qwen3Model
    ours: TextEncoder
    engines: dict[str, OnnxEngine]
    ledger: list[LedgerEntry]


@pytest.fixture(scope="module")
def encoders(bundles: Bundles, tmp_path_factory: pytest.TempPathFactory) -> Encoders:
    folder, out = tmp_path_factory.mktemp("qwen3"), tmp_path_factory.mktemp("out")
    published = write_qwen3(folder, max_shard_size="60KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    ours = open_text_encoder(folder, WIDTH)
    plans = [plain_plan(ours.model, name) for name in ("fp32", "fp16")]
    run = StageRunner(Home(out))
    with text_traces(bundles, out):
        parts = add_text_encoder(run, ours, plans, open_backend("onnx"), Silent())
    assert "trace text_encoder.fp32" not in run.made
    record = parts.record
    engines = {g.plan: OnnxEngine(out / g.graph, out / g.weights, record.network) for g in record.graphs}
    assert record.documents | {p for g in record.graphs for p in (g.graph, g.weights)} == {f.path for f in parts.files}
    return Encoders(published, ours, engines, list(parts.ledger))


@pytest.mark.parametrize("lengths", LENGTHS)
def test_hidden_state(lengths: tuple[int, ...], encoders: Encoders) -> None:
    inputs = token_inputs(lengths, encoders.ours.model.config.sizes.vocabulary)
    expected = hidden_state(encoders.published, inputs)
    real = inputs["attention_mask"] != 0
    with torch.no_grad():
        ours = torch_text_encoder(encoders.ours)(**{name: torch.from_numpy(v) for name, v in inputs.items()}).numpy()
    (graph,) = run(encoders.engines["fp32"], inputs)
    (half,) = run(encoders.engines["fp16"], inputs)
    assert relative_error(ours[real], expected[real]) <= TOLERANCE
    assert relative_error(graph[real], expected[real]) <= TOLERANCE
    assert relative_error(half[real], expected[real]) <= FLOAT16


def test_each_layer_and_group_tells(encoders: Encoders) -> None:
    """What the comparison rests on: another hidden state, and an unmasked or uncaused one, are far away."""
    inputs = token_inputs((12,), encoders.ours.model.config.sizes.vocabulary)
    ids = torch.from_numpy(inputs["input_ids"])
    with torch.no_grad():
        states = encoders.published(input_ids=ids, output_hidden_states=True).hidden_states
        shifted = encoders.published(input_ids=ids.flip(1), output_hidden_states=True).hidden_states
    for other in (states[-1], states[-3], shifted[-2].flip(1)):
        assert relative_error(other.numpy(), states[-2].numpy()) > 0.1


def test_float16_survives_products_beyond_its_range(encoders: Encoders) -> None:
    """Qwen3's feed-forward has single products of a size that float16 does not hold."""
    inputs = token_inputs((20,), encoders.ours.model.config.sizes.vocabulary)
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    state = torch_text_encoder(encoders.ours).state_dict()
    for name in state:
        scales = {"gate_proj": 2.0**6, "up_proj": 2.0**8, "down_proj": 2.0**-6}
        state[name] *= scales.get(name.split(".")[-2], 1.0)
    largest: list[float] = []
    made = []
    for dtype in (torch.float32, torch.float16):
        module = encoders.ours.model.module("text_encoder", lambda layer, dtype=dtype: dtype)  # type: ignore[misc]
        module.load_state_dict({name: value.to(dtype) for name, value in state.items()})
        if dtype == torch.float32:
            down = module.get_submodule("model.layers.0.mlp.down_proj")
            down.register_forward_pre_hook(lambda _, args: largest.append(float(args[0].abs().max())))
        with torch.no_grad():
            made.append(module(**tensors).numpy())
    assert largest[0] > 65504
    assert relative_error(made[1], made[0]) <= FLOAT16


def test_padding_changes_nothing(encoders: Encoders) -> None:
    inputs = token_inputs((30, 9), encoders.ours.model.config.sizes.vocabulary)
    alone = {name: value[1:, :9] for name, value in inputs.items()}
    (padded,), (single,) = run(encoders.engines["fp32"], inputs), run(encoders.engines["fp32"], alone)
    assert relative_error(padded[1:, :9], single) <= TOLERANCE
    other = dict(inputs, input_ids=np.where(inputs["attention_mask"] != 0, inputs["input_ids"], 3))
    assert np.array_equal(run(encoders.engines["fp32"], other)[0][1, :9], padded[1, :9])


def test_a_row_of_padding_alone_is_finite(encoders: Encoders) -> None:
    inputs = token_inputs((5, 0), encoders.ours.model.config.sizes.vocabulary)
    assert np.isfinite(run(encoders.engines["fp32"], inputs)[0]).all()
    assert np.isfinite(run(encoders.engines["fp16"], inputs)[0]).all()


def test_the_graph_holds_no_last_layer_and_no_final_norm(encoders: Encoders) -> None:
    shapes = encoders.ours.model.shapes
    assert encoders.ours.model.blocks("text_encoder") == ("model.layers.0", "model.layers.1", "model.layers.2")
    assert not [name for name in shapes if name.startswith(("model.layers.3.", "model.norm", "lm_head"))]
    assert len(shapes) == 1 + 3 * 11


def test_ledger(encoders: Encoders) -> None:
    found = [(entry.comparison, entry.case, entry.status) for entry in encoders.ledger]
    assert {entry.network for entry in encoders.ledger} == {"text_encoder"}
    assert found == [
        (ranges_comparison("fp16"), "ranges", "passed"),
        (graph_comparison("fp32"), "text", "passed"),
        (graph_comparison("fp16"), "text", "passed"),
    ]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"num_hidden_layers": 2, "num_key_value_heads": 6}, id="one layer built, no groups"),
        pytest.param({"num_key_value_heads": 1, "rope_theta": 1234567.89, "head_dim": 10}, id="one kv head, odd base"),
        pytest.param(
            {"hidden_size": 96, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}, id="heads as wide as the model"
        ),
    ],
)
def test_other_sizes(changes: dict[str, Any], tmp_path: Path) -> None:
    published = write_qwen3(tmp_path, **changes)
    ours = open_text_encoder(tmp_path, changes.get("hidden_size", WIDTH))
    inputs = token_inputs((17, 4), ours.model.config.sizes.vocabulary)
    with torch.no_grad():
        made = torch_text_encoder(ours)(**{name: torch.from_numpy(value) for name, value in inputs.items()}).numpy()
    real = inputs["attention_mask"] != 0
    assert relative_error(made[real], hidden_state(published, inputs)[real]) <= TOLERANCE


def test_from_prompts_to_embeddings(encoders: Encoders) -> None:
    prompts = [
        "a red circle",
        "",
        "\u4e00\u53ea\u7ea2\u8272\u7684\u72d0\u72f8",
        "quick " * 40,
        "the lazy dog",
        "\U0001f98a",
    ]
    tokenizer = load_tokenizer(encoders.ours.tokenizer, CHAT_TEMPLATE)
    made = encode_prompts(encoders.engines["fp32"], tokenizer, prompts, HostDevice())
    published = published_tokenizer(train_tokenizer())
    for prompt, embeds in zip(prompts, made, strict=True):
        ids = np.asarray([published_tokens(published, prompt)])
        expected = hidden_state(encoders.published, {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0]
        assert embeds.shape == expected.shape
        assert embeds.dtype == np.float32
        assert relative_error(embeds, expected) <= TOLERANCE


@pytest.mark.parametrize("prefix", ["", "model."])
def test_bfloat16_weights_under_either_spelling(prefix: str, tmp_path: Path) -> None:
    """Weights stored in BF16, as published, are read at their stored values, with the prefix and without."""
    published = random_qwen3(400)
    state = {name: value.to(torch.bfloat16) for name, value in published.state_dict().items()}
    stored = {prefix + name: value for name, value in state.items()}
    published.config.save_pretrained(tmp_path)
    save_file(stored | {"lm_head.weight": torch.zeros(400, WIDTH)}, tmp_path / "model.safetensors")
    train_tokenizer().save(str(tmp_path / "tokenizer.json"))
    published.load_state_dict(state)
    inputs = token_inputs((9,), 400)
    with torch.no_grad():
        tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
        made = torch_text_encoder(open_text_encoder(tmp_path, WIDTH))(**tensors).numpy()
    assert relative_error(made, hidden_state(published, inputs)) <= TOLERANCE


def token_inputs(lengths: tuple[int, ...], vocabulary: int) -> dict[str, NDArray[np.int64]]:
    """Random token numbers, padded at the right."""
    longest = max(lengths)
    ids = np.random.default_rng(longest).integers(0, vocabulary, (len(lengths), longest))
    mask = (np.arange(longest) < np.asarray(lengths)[:, np.newaxis]).astype(np.int64)
    return {"input_ids": ids, "attention_mask": mask}


def hidden_state(model: Qwen3Model, inputs: dict[str, NDArray[np.int64]]) -> NDArray[np.float32]:
    """What the published pipeline takes."""
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    with torch.no_grad():
        state: torch.Tensor = model(**tensors, output_hidden_states=True).hidden_states[-2]
    return state.numpy()
