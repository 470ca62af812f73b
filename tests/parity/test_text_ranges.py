"""Text encoders of which float16 does not hold everything: those layers are raised, and the others stay."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from l2p_calib.plans.plan import LayerRule, PrecisionPlan
from l2p_engines.store.stages import Home, StageRunner
from l2p_export.build.text import add_text_encoder
from l2p_export.families.qwen3 import TextEncoder, open_text_encoder, peaks
from l2p_export.precision.plans import plain_plan
from l2p_export.precision.text import plans_by_ranges
from l2p_export.tensors.sources import read_tensor
from l2p_runtime.backends import open_backend
from l2p_runtime.contract import TEXT_ENCODER, LedgerEntry
from l2p_runtime.errors import ArtifactError, ParityError
from l2p_runtime.progress import Silent
from parity.models import relative_error
from parity.text_models import WIDTH, write_qwen3

FLOAT16 = 0.005
LAYER = "model.layers.1"

STRESSES: Mapping[str, Mapping[str, float]] = {
    "values": {"self_attn.v_proj": 2.0**20, "self_attn.o_proj": 2.0**-20},
    "one channel": {"mlp.up_proj[3]": 2.0**24, "mlp.down_proj[:,3]": 2.0**-24},
    "products of queries and keys": {"self_attn.q_norm": 2.0**18, "self_attn.k_norm": 2.0**-18},
}
"""What cancels in exact arithmetic, and overflows in float16 on the way."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_qwen3(tmp_path / "qwen3")
    return tmp_path / "qwen3"


def stress(folder: Path, scales: Mapping[str, float]) -> TextEncoder:
    """Scale weights of one layer in the folder."""
    path = folder / "model.safetensors"
    state = load_file(path)
    for name, scale in scales.items():
        layer, _, part = name.partition("[")
        weight = next(value for key, value in state.items() if key.endswith(f"layers.1.{layer}.weight"))
        view = weight[:, 3] if part.startswith(":") else weight[3] if part else weight
        view *= scale
    save_file(state, path, {"format": "pt"})
    return open_text_encoder(folder, WIDTH)


def by_ranges(encoder: TextEncoder, out: Path, *names: str) -> tuple[list[PrecisionPlan], tuple[LedgerEntry, ...]]:
    plans = [plain_plan(encoder.model, name) for name in names]
    out.mkdir(exist_ok=True)
    return plans_by_ranges(StageRunner(Home(out)), encoder, plans, "0" * 64, Silent())


def embeds(encoder: TextEncoder, plan: PrecisionPlan) -> NDArray[np.float32]:
    """What torch makes of one prompt with the dtypes of a plan, in real float16 arithmetic."""

    def dtype_of(layer: str) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, plan.dtype(layer))
        return dtype

    module = encoder.model.module(TEXT_ENCODER, dtype_of)
    own = dict(module.named_parameters())
    tensors: dict[str, Tensor] = {name: torch.from_numpy(read_tensor(encoder.tensors[name])) for name in own}
    module.load_state_dict({name: value.to(own[name].dtype) for name, value in tensors.items()})
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        made: NDArray[np.float32] = module(input_ids=ids, attention_mask=torch.ones_like(ids)).numpy()
    return made


@pytest.mark.parametrize("name", STRESSES)
def test_a_layer_that_overflows_is_raised(folder: Path, tmp_path: Path, name: str) -> None:
    encoder = stress(folder, STRESSES[name])
    (wide, raised), (entry,) = by_ranges(encoder, tmp_path / "out", "fp32", "fp16")
    assert wide == plain_plan(encoder.model, "fp32")
    assert [rule.layer for rule in raised.rules] == [LAYER]
    assert raised.dtype(f"{LAYER}.mlp.up_proj.weight") == "float32"
    assert raised.dtype("model.layers.0.mlp.up_proj.weight") == "float16"
    assert entry.status == "passed"
    assert f"in float32: {LAYER}" in entry.reason
    expected = embeds(encoder, wide)
    assert not relative_error(embeds(encoder, plain_plan(encoder.model, "fp16")), expected) <= 0.5
    assert relative_error(embeds(encoder, raised), expected) <= FLOAT16


@pytest.mark.parametrize("plan", ["fp16-plain", "fp8-plain"])
@pytest.mark.parametrize("name", STRESSES)
def test_the_cast_alone_is_refused(folder: Path, tmp_path: Path, name: str, plan: str) -> None:
    encoder = stress(folder, STRESSES[name])
    with pytest.raises(ParityError, match=rf"plan `{plan}` overflows in the text encoder: .*{LAYER}") as refused:
        by_ranges(encoder, tmp_path / "out", plan)
    assert refused.value.exit_code == 5


def test_a_usual_encoder_stays_as_it_is(folder: Path, tmp_path: Path) -> None:
    encoder, names = open_text_encoder(folder, WIDTH), ("fp16", "fp16-plain", "bf16", "fp8")
    plans, entries = by_ranges(encoder, tmp_path / "out", *names)
    assert plans == [plain_plan(encoder.model, name) for name in names]
    assert [str(entry.comparison) for entry in entries] == [
        f"float32 ranges -> {name} graph" for name in ("fp16", "fp16-plain", "fp8")
    ]
    assert {entry.case for entry in entries} == {"ranges"}


def test_the_graph_has_the_layer_in_float32(folder: Path, tmp_path: Path) -> None:
    # Two layers are built, one of each kind: each kind is traced, which takes seconds.
    write_qwen3(folder, num_hidden_layers=3)
    encoder = stress(folder, STRESSES["values"])
    plans = [plain_plan(encoder.model, "fp16")]
    parts = add_text_encoder(StageRunner(Home(tmp_path)), encoder, plans, open_backend("onnx"), Silent())
    weights = load_file(tmp_path / parts.record.graphs[0].weights)
    dtypes = {name: tensor.dtype for name, tensor in weights.items() if ".weight" in name}
    narrow = {name for name, dtype in dtypes.items() if dtype == torch.float16}
    wide = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert wide
    assert all("layers.1." in name for name in wide)
    assert narrow
    assert not any("layers.1." in name for name in narrow)
    assert [entry.status for entry in parts.ledger] == ["passed", "passed"]


def test_without_memory_nothing_is_measured(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "available_host_bytes", lambda: 1 << 20)
    encoder = open_text_encoder(folder, WIDTH)
    plans, (entry,) = by_ranges(encoder, tmp_path / "out", "fp16")
    assert plans == [plain_plan(encoder.model, "fp16")]
    assert entry.status == "not run"
    assert "more than are free" in entry.reason


def test_what_is_no_number_in_float32_is_the_folders_fault(folder: Path, tmp_path: Path) -> None:
    encoder = stress(folder, {"mlp.gate_proj": 1e38, "mlp.up_proj": 1e38})
    with pytest.raises(ArtifactError, match=rf"makes NaN or Inf in float32, in `{LAYER}`"):
        by_ranges(encoder, tmp_path / "out", "fp16")


def test_products_that_may_overflow_are_raised_and_not_refused(folder: Path, tmp_path: Path) -> None:
    """Each of 400 is far from 65504, and their product might be beyond it: that was not seen."""
    encoder = stress(folder, {"self_attn.q_norm": 2.0**8, "self_attn.k_norm": 2.0**8})
    (raised, plain), _ = by_ranges(encoder, tmp_path / "out", "fp16", "fp16-plain")
    (rule,) = raised.rules
    assert rule.layer == LAYER
    assert rule.reason.startswith("a product of query and key may reach")
    assert plain == plain_plan(encoder.model, "fp16-plain")


def test_what_was_measured_outlasts_the_memory(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = stress(folder, STRESSES["values"])
    (before,), _ = by_ranges(encoder, tmp_path, "fp16")
    monkeypatch.setattr(peaks, "available_host_bytes", lambda: 1 << 20)
    (after,), (entry,) = by_ranges(encoder, tmp_path, "fp16")
    assert before == after != plain_plan(encoder.model, "fp16")
    assert entry.status == "passed"


def test_a_large_embedding_is_raised_alone(folder: Path, tmp_path: Path) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    (name,) = (key for key in state if key.endswith("embed_tokens.weight"))
    state[name][7, 3] = 70_000.0
    save_file(state, path, {"format": "pt"})
    (plan,), _ = by_ranges(open_text_encoder(folder, WIDTH), tmp_path / "out", "fp16")
    assert plan.rules == (LayerRule("model.embed_tokens", "float32", "weight reaches 7e+04, float16 is given 16376"),)
