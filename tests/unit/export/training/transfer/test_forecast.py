"""Forecasts of training: published parameters, what autograd really keeps, and refusals that name a way out."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fakes.sources import tiny_dimensions, tiny_spec, write_published_folder, write_tiny_corpus
from l2p_export.cli.train import transfer_command
from l2p_export.families.z_image_l2p.dimensions import Dimensions, published_dimensions
from l2p_export.families.z_image_l2p.pixel import PixelModel, checkpoint_activations
from l2p_export.families.z_image_l2p.specs import model_spec
from l2p_export.training.loop.distributed import ALONE, ProcessGroup
from l2p_export.training.loop.loop import Schedule
from l2p_export.training.transfer import forecast as forecasting
from l2p_export.training.transfer.forecast import TrainingForecast, kept_bytes, require_memory, transfer_forecast
from l2p_export.training.transfer.spec import PLAIN, TrainingOptions, TransferSpec
from l2p_runtime.errors import HostError
from l2p_runtime.positions import rope_tables

CAPTION_TOKENS = 32
GPU = ProcessGroup(device=torch.device("cuda", 0))


def published(options: TrainingOptions = PLAIN, ranks: ProcessGroup = GPU, **changes: Any) -> TrainingForecast:
    return transfer_forecast(published_dimensions("1k"), spec_1k(**changes), options, ranks, caption_tokens=128)


def spec_1k(batch: int = 8, **changes: Any) -> TransferSpec:
    values = {"variant": "1k", "sizes_px": (1024,)} | changes
    return TransferSpec(schedule=Schedule(steps=1, batch=batch, learning_rate=5e-5), **values)


def test_the_published_model_trains_two_and_a_half_billion_parameters() -> None:
    with torch.device("meta"):
        model = PixelModel(published_dimensions("1k"))
    model.trunk.requires_grad_(requires_grad=False)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    forecast = published()
    assert trained == forecast.trained_parameters == 2_548_257_795
    assert forecast.frozen_parameters == sum(parameter.numel() for parameter in model.trunk.parameters())
    for what, bytes_each in {"weights": 4, "gradients": 4, "moments": 8, "averages": 4}.items():
        assert forecast.device_bytes[what] == bytes_each * trained
    assert forecast.device_bytes["trunk"] == 4 * forecast.frozen_parameters


def test_a_folder_of_the_published_sizes_is_forecast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From headers alone: by the command, on a folder as it is downloaded; a machine that is too small is told so."""
    write_published_folder(tmp_path / "z-image")
    write_tiny_corpus(tmp_path / "corpus")
    paths = [tmp_path / "z-image", "--corpus", tmp_path / "corpus", "--out", tmp_path / "a.safetensors"]
    more = ["--device", "cpu", "--checkpointing", "--trunk-storage", "bfloat16", "--batch", "1", "--dry-run"]
    command = [*map(str, paths), *more]
    monkeypatch.setattr(forecasting, "available_host_bytes", lambda: 100 << 30)
    transfer_command.main([*command, "--json"], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)["forecast"]
    assert found["trained_parameters"] == 2_548_257_795
    assert found["frozen_parameters"] == 3_618_206_720
    assert found["device_bytes"]["moments"] == 8 * 2_548_257_795
    assert found["device_bytes"]["trunk"] == pytest.approx(2 * 3_618_206_720, rel=0.01)
    # Qwen3-4B has 4.02 B parameters; its last layer, of 0.1 B, is not used.
    assert found["host_bytes"]["text encoder"] == pytest.approx(4 * 3.92e9, rel=0.01)
    assert 60 << 30 < found["host_bytes"]["total"] < 100 << 30
    monkeypatch.setattr(forecasting, "available_host_bytes", lambda: 24 << 30)
    with pytest.raises(HostError, match="the host's memory, and 25,769,803,776 are free"):
        transfer_command.main(command, standalone_mode=False)
    assert "trained parameters 2,548,257,795, frozen 3,618,206,720" in capsys.readouterr().out
    assert not (tmp_path / "a.safetensors").exists()


def test_each_option_lowers_what_it_says() -> None:
    whole = published()
    assert published(checkpointing=True).device_bytes["activations"] < whole.device_bytes["activations"] / 2
    assert published(window_tokens=16).device_bytes["activations"] < whole.device_bytes["activations"]
    for storage, part in {"bfloat16": 0.5, "float8": 0.25}.items():
        trunk = published(TrainingOptions(trunk_storage=storage)).device_bytes["trunk"]
        assert trunk == pytest.approx(part * whole.device_bytes["trunk"], rel=0.01)
    moved = published(TrainingOptions("bf16", "float8", "cpu"), checkpointing=True)
    assert moved.device_bytes["weights"] == 2 * whole.trained_parameters
    assert "moments" not in moved.device_bytes
    assert moved.host_bytes["masters"] + moved.host_bytes["moments"] == 12 * whole.trained_parameters
    cut = published(ranks=replace(GPU, size=4, local_size=4, is_sharded=True))
    assert cut.device_bytes["moments"] == pytest.approx(whole.device_bytes["moments"] / 4)
    assert cut.device_bytes["activations"] == pytest.approx(whole.device_bytes["activations"] / 4)


def test_processes_of_one_machine_share_its_memory() -> None:
    one = published(ranks=ALONE)
    two = published(ranks=ProcessGroup(0, 2, 2))
    assert one.host_total > one.device_total
    assert two.host_total - one.host_total >= 20 * one.trained_parameters + 4 * one.frozen_parameters


def test_images_that_are_read_are_kept_up_to_a_limit() -> None:
    kept = [
        transfer_forecast(published_dimensions("1k"), spec_1k(), PLAIN, GPU, caption_tokens=128, files=files).host_bytes
        for files in (0, 10, 10_000)
    ]
    assert [host["images that were read"] for host in kept] == [0, 10 * 3 * 1024**2, 1 << 30]


@pytest.mark.parametrize("autocast", ["none", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_autograd_keeps(autocast: str, checkpointing: bool) -> None:
    d = replace(tiny_dimensions(), width=96, head_width=32, ffn_width=256, bottleneck=64)
    spec = tiny_spec(checkpointing=checkpointing, sizes_px=(32,))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = PixelModel(d)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    model.trunk.requires_grad_(requires_grad=False)
    if checkpointing:
        checkpoint_activations(model)
    inputs = _inputs(d, spec)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast == "bf16"):
        counted = _kept_by_autograd(lambda: model(*inputs), [*model.parameters(), *inputs])
    kept, largest = kept_bytes(d, spec, TrainingOptions(autocast), CAPTION_TOKENS)
    assert kept == pytest.approx(counted, rel=0.1)
    assert 0 < largest < kept


@pytest.mark.parametrize(
    ("options", "changes", "names"),
    [
        (PLAIN, {}, "--checkpointing, a larger --micro-batches, --trunk-storage"),
        (PLAIN, {"checkpointing": True, "batch": 1}, "--trunk-storage"),
        (TrainingOptions(trunk_storage="float8"), {"checkpointing": True, "batch": 1}, "--window-tokens"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_way_out(
    monkeypatch: pytest.MonkeyPatch, options: TrainingOptions, changes: dict[str, Any], names: str
) -> None:
    forecast = published(options, ALONE, **changes)
    monkeypatch.setattr(forecasting, "available_host_bytes", lambda: forecast.host_total)
    require_memory(forecast, spec_1k(**changes), options, ALONE)
    monkeypatch.setattr(forecasting, "available_host_bytes", lambda: forecast.host_total - 1)
    with pytest.raises(HostError, match=r"host's memory, and .* are free") as refused:
        require_memory(forecast, spec_1k(**changes), options, ALONE)
    assert refused.value.exit_code == 3
    assert refused.value.hint.startswith(f"lower it with {names}")


def test_a_gpu_that_is_too_small_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    forecast = published()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (24 << 30, 24 << 30))
    with pytest.raises(HostError, match=r"cuda:0.*activations") as refused:
        require_memory(forecast, spec_1k(), PLAIN, GPU)
    assert "--optimizer-device cpu" in refused.value.hint


def _inputs(d: Dimensions, spec: TransferSpec) -> list[Tensor]:
    side = spec.sizes_px[0] // spec.patch_px
    tables = rope_tables(model_spec(d), side, side, CAPTION_TOKENS)
    image = torch.randn(1, 3, *spec.sizes_px * 2)
    width = d.caption_width
    mask = torch.arange(CAPTION_TOKENS)[None] < 20
    return [image, torch.tensor([0.3]), torch.randn(1, CAPTION_TOKENS, width), mask, *map(torch.from_numpy, tables)]


def _kept_by_autograd(forward: Callable[[], Tensor], known: list[Tensor]) -> int:
    """Bytes of tensors that a forward pass leaves alive, besides weights, their copies, and inputs.

    Autograd's own are seen when they are saved; what checkpoints hold lives in Python.
    """
    parameters = {tuple(tensor.shape) for tensor in known if tensor.requires_grad}
    alive: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        alive[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    gc.collect()
    before = {id(part) for part in gc.get_objects() if type(part) is Tensor}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        made = forward()
    for part in gc.get_objects():
        if type(part) is Tensor and id(part) not in before and part is not made:
            pack(part)
    for tensor in known:
        alive.pop(tensor.untyped_storage().data_ptr(), None)
    # Autocast's copies of weights are counted with the weights.
    kept = [
        t
        for t in alive.values()
        if t.dtype != torch.bfloat16 or not {tuple(t.shape), tuple(t.shape[::-1])} & parameters
    ]
    return sum(tensor.untyped_storage().nbytes() for tensor in kept)
