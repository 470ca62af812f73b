"""Measures the maximum magnitudes in each layer of a text encoder, in torch float32, one layer in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from l2p_calib.prompts import read_prompts
from l2p_export.families.qwen3.dimensions import PRODUCT_SCALE
from l2p_export.tensors.sources import read_tensor
from l2p_runtime.contract import TEXT_ENCODER
from l2p_runtime.errors import ArtifactError, HostError
from l2p_runtime.memory import available_host_bytes
from l2p_runtime.text import CHAT_TEMPLATE, load_tokenizer

if TYPE_CHECKING:
    from torch import Tensor, nn

    from l2p_export.families.qwen3.folder import TextEncoder
    from l2p_runtime.progress import Reporter

PROMPTS = 16
"""Number of the package's prompts that are measured; the published encoder takes about 5 TFLOP for them."""

_EMBEDDING = "model.embed_tokens"


@dataclass(frozen=True, slots=True)
class LayerPeak:
    """The maximum magnitude that float16 would have to hold in a layer, and where.

    Attributes:
        layer: as `model.layers.3`.
        place: as `mlp.up_proj:out`.
        is_bound: the peak is an upper bound from the lengths of queries and keys, and was not measured.
    """

    layer: str
    place: str
    peak: float
    is_bound: bool = False


def _needed_bytes(encoder: TextEncoder) -> int:
    """Host memory for the embedding table and one layer in float32, their copies as read, and some activations."""
    parts = dict.fromkeys((_EMBEDDING, *encoder.model.blocks(TEXT_ENCODER)), 0)
    for name, shape in encoder.model.shapes.items():
        parts[next(part for part in parts if name.startswith(f"{part}."))] += 8 * math.prod(shape)
    return parts.pop(_EMBEDDING) + max(parts.values(), default=0) + (256 << 20)


def measure_peaks(encoder: TextEncoder, reporter: Reporter) -> tuple[LayerPeak, ...]:
    """The maximum peaks of the embedding table and of each layer, over all rows, padding included.

    Returns:
        One entry for the embedding table; for each layer its measured peak and its bound, in the order of the layers.

    Raises:
        ArtifactError: a layer makes NaN or Inf.
        HostError: too little memory.
    """
    import torch

    needed = _needed_bytes(encoder)
    if needed > available_host_bytes():
        raise HostError(f"measuring the text encoder takes about {needed:,} bytes here, more than are free")

    with torch.device("meta"):
        module = encoder.model.module(TEXT_ENCODER, lambda layer: torch.float32)
    embedding = module.get_submodule(_EMBEDDING)
    found = [LayerPeak(_EMBEDDING, "weight", _fill(encoder, _EMBEDDING, embedding)["weight"])]
    layers = encoder.model.blocks(TEXT_ENCODER)
    with reporter.task("measuring the text encoder in torch float32", len(layers), "layers") as advance:
        for name in layers:
            _observe(encoder, name, module.get_submodule(name), found, advance)
        with torch.no_grad():
            module(**_prompts(encoder))
    return tuple(found)


def _observe(
    encoder: TextEncoder, name: str, layer: nn.Module, found: list[LayerPeak], advance: Callable[[int], None]
) -> None:
    """Add hooks that load a layer before it runs, and then append its peaks to `found` and drop its weights."""
    peaks: dict[str, float] = {}
    lengths: dict[str, float] = {}

    def load(layer: nn.Module, inputs: object) -> None:
        del inputs
        peaks.update(_fill(encoder, name, layer))

    def finish(layer: nn.Module, inputs: object, output: Tensor) -> None:
        del inputs
        # The lengths of rows bound their rotated values and their products.
        query, key = (lengths[f"self_attn.{norm}"] for norm in ("q_norm", "k_norm"))
        bounds = {"a query": query, "a key": key, "a product of query and key": query * key}
        if not (output.isfinite().all() and all(map(math.isfinite, (*peaks.values(), *bounds.values())))):
            raise ArtifactError(
                f"the text encoder makes NaN or Inf in float32, in `{name}`", hint="fetch its folder again"
            )
        for places, is_bound in ((peaks, False), (bounds, True)):
            place, peak = max(places.items(), key=lambda item: item[1])
            found.append(LayerPeak(name, place, peak, is_bound))
        layer.to("meta")
        advance(1)

    layer.register_forward_pre_hook(load)
    for own, part in layer.named_modules():
        if own.endswith("_proj"):
            part.register_forward_hook(partial(_note_linear, peaks, own))
        elif own.endswith(("q_norm", "k_norm")):
            part.register_forward_hook(partial(_note_normed, peaks, lengths, own))
    layer.register_forward_hook(finish)


def _note_linear(
    peaks: dict[str, float], name: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
) -> None:
    del layer
    scale = PRODUCT_SCALE if name.endswith("down_proj") else 1.0
    for side, tensor in {"in": inputs[0], "out": output}.items():
        peaks[f"{name}:{side}"] = scale * float(tensor.abs().max())


def _note_normed(
    peaks: dict[str, float],
    lengths: dict[str, float],
    name: str,
    layer: nn.Module,
    inputs: tuple[Tensor, ...],
    output: Tensor,
) -> None:
    del layer, inputs
    scale = output.shape[-1] ** -0.5 if name.endswith("q_norm") else 1.0
    lengths[name] = scale * float(output.norm(dim=-1).max())
    # However a pair is rotated, one of its two values keeps at least this share of the larger one.
    peaks[f"{name}:out"] = scale * float(output.abs().max()) / math.sqrt(2.0)


def _fill(encoder: TextEncoder, name: str, part: nn.Module) -> dict[str, float]:
    """Load the weights of a part in float32; returns the maximum magnitude of each, by its own name."""
    import torch

    own = [parameter for parameter, _ in part.named_parameters()]
    state = {parameter: torch.from_numpy(read_tensor(encoder.tensors[f"{name}.{parameter}"])) for parameter in own}
    part.load_state_dict(state, assign=True)
    return {parameter: float(tensor.abs().max()) for parameter, tensor in state.items()}


def _prompts(encoder: TextEncoder) -> dict[str, Tensor]:
    """Token ids and mask of the prompts, both int64 [B,L], padded at the right."""
    import torch

    tokenizer = load_tokenizer(encoder.tokenizer, CHAT_TEMPLATE)
    rows = [torch.tensor(tokenizer.tokens(prompt)) for prompt in read_prompts()[:PROMPTS]]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).to(torch.int64)
    return {"input_ids": ids, "attention_mask": mask}
