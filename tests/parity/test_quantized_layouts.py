"""FP8 layouts as their tools define them: whole checkpoints dequantized by torch or NumPy, and by import.

Sources: transformers' fine-grained FP8 and DeepSeek-V3 (`weight_scale_inv`, 128 x 128, float32), OCP MX v1.0 (32
columns, E8M0), ComfyUI's QUANTIZATION.md and comfy-kitchen 0.2 (markers; MXFP8 scales in the order of cuBLAS),
musubi-tuner (`scale_weight` of [rows, blocks, 1]).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from golden import tiny_checkpoint
from l2p_export.checkpoint.convert import write_checkpoint
from l2p_export.checkpoint.describe import describe
from l2p_export.checkpoint.loading import load_model

State = dict[str, Tensor]
Quantized = tuple[State, Tensor]
"""Stored tensors by suffix, and the weight that they stand for, in float32."""

FP8_MAX = 448.0


def blocks(weight: Tensor, rows: int, columns: int) -> Tensor:
    """The largest absolute value of each block, [blocks of rows, blocks of columns]; the last ones may be partial."""
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % columns, 0, -weight.shape[0] % rows))
    return padded.unflatten(0, (-1, rows)).unflatten(2, (-1, columns)).abs().amax((1, 3))


def spread(scales: Tensor, rows: int, columns: int, like: Tensor) -> Tensor:
    """One scale for each value of a weight."""
    return scales.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: like.shape[0], : like.shape[1]]


def with_blocks(weight: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """E4M3 values, float32 scales of blocks, and their product."""
    scales = blocks(weight, rows, columns).clamp(min=1e-12) / FP8_MAX
    whole = spread(scales, rows, columns, weight)
    stored = (weight / whole).to(torch.float8_e4m3fn)
    return stored, scales, stored.float() * whole


def with_exponents(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """MXFP8: E4M3 values, E8M0 scales of 32 columns, and their product."""
    scales = torch.exp2((blocks(weight, 1, 32).clamp(min=1e-12) / FP8_MAX).log2().ceil()).to(torch.float8_e8m0fnu)
    whole = spread(scales.float(), 1, 32, weight)
    stored = (weight / whole).to(torch.float8_e4m3fn)
    return stored, scales, stored.float() * whole


def fine_grained(weight: Tensor) -> Quantized:
    stored, scales, meant = with_blocks(weight, 128, 128)
    return {"weight": stored, "weight_scale_inv": scales}, meant


def fine_grained_e8m0(weight: Tensor) -> Quantized:
    _, scales, _ = with_blocks(weight, 128, 128)
    rounded = torch.exp2(scales.log2().ceil()).to(torch.float8_e8m0fnu)
    whole = spread(rounded.float(), 128, 128, weight)
    stored = (weight / whole).to(torch.float8_e4m3fn)
    return {"weight": stored, "scale": rounded}, stored.float() * whole


def mx(weight: Tensor) -> Quantized:
    stored, scales, meant = with_exponents(weight)
    return {"weight": stored, "weight_scale": scales}, meant


def mx_as_bytes(weight: Tensor) -> Quantized:
    stored, scales, meant = with_exponents(weight)
    return {"weight": stored, "weight_scale": scales.view(torch.uint8)}, meant


def mx_of_comfyui(weight: Tensor) -> Quantized:
    stored, scales, meant = with_exponents(weight)
    rows, columns = scales.shape
    padded = torch.nn.functional.pad(scales.view(torch.uint8), (0, -columns % 4, 0, -rows % 128))
    tiles = padded.unflatten(0, (-1, 4, 32)).unflatten(3, (-1, 4)).permute(0, 3, 2, 1, 4)
    marker = torch.frombuffer(bytearray(b'{"format": "mxfp8"}'), dtype=torch.uint8)
    ordered = tiles.reshape(padded.shape).contiguous()
    return {"weight": stored, "weight_scale": ordered.view(torch.float8_e8m0fnu), "comfy_quant": marker}, meant


def thirty_two(weight: Tensor) -> Quantized:
    stored, scales, meant = with_blocks(weight, 1, 32)
    return {"weight": stored, "weight_scale": scales}, meant


def musubi(weight: Tensor) -> Quantized:
    if weight.shape[1] % 32:
        return fine_grained(weight)
    stored, scales, meant = with_blocks(weight, 1, 32)
    return {"weight": stored, "scale_weight": scales[:, :, None]}, meant


def comfyui(weight: Tensor) -> Quantized:
    stored, scales, meant = with_blocks(weight, *weight.shape)
    marker = torch.frombuffer(bytearray(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    scalar = {"weight_scale": scales.reshape(()), "input_scale": torch.ones(()), "comfy_quant": marker}
    return {"weight": stored, **scalar}, meant


def per_row(weight: Tensor) -> Quantized:
    stored, scales, meant = with_blocks(weight, 1, weight.shape[1])
    return {"weight": stored, "scale_weight": scales.flatten(), "scale_input": torch.ones(())}, meant


def fnuz(weight: Tensor) -> Quantized:
    stored = weight.to(torch.float8_e4m3fnuz)
    return {"weight": stored, "weight_scale": torch.full((), 0.25)}, stored.float() * 0.25


LAYOUTS: dict[str, tuple[Callable[[Tensor], Quantized], str]] = {
    "fine-grained": (fine_grained, "F8_E4M3, one scale per 64 x 128 block"),
    "fine-grained E8M0": (fine_grained_e8m0, "F8_E4M3, one scale per 64 x 128 block"),
    "MX": (mx, "F8_E4M3, one scale per 1 x 32 block"),
    "MX as bytes": (mx_as_bytes, "F8_E4M3, one scale per 1 x 32 block"),
    "MX of ComfyUI": (mx_of_comfyui, "F8_E4M3, one scale per 1 x 32 block"),
    "1 x 32 of float32": (thirty_two, "F8_E4M3, one scale per 1 x 32 block"),
    "musubi-tuner": (musubi, "F8_E4M3, one scale per 1 x 32 block"),
    "ComfyUI": (comfyui, "F8_E4M3, one scale per tensor"),
    "per row": (per_row, "F8_E4M3, one scale per row"),
    "FNUZ": (fnuz, "F8_E4M3FNUZ, one scale per tensor"),
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_dequantized_exactly(layout: str, tmp_path: Path, *, fused: bool) -> None:
    """The tiny model is 64 wide, and 170 in its feed-forward, so last blocks are partial."""
    quantize, kind = LAYOUTS[layout]
    arrays = tiny_checkpoint.checkpoint()
    spelled = tiny_checkpoint.fused(arrays) if fused else arrays
    stored: State = {}
    meant: State = {}
    for name, array in spelled.items():
        weight = torch.from_numpy(np.array(array))
        is_linear = weight.ndim == 2 and any(part in name for part in (".attention.", ".feed_forward."))
        if is_linear:
            parts, meant[name] = quantize(weight)
            stored |= {name.removesuffix("weight") + suffix: part for suffix, part in parts.items()}
        else:
            stored[name] = meant[name] = weight
    save_file({name: value.contiguous() for name, value in stored.items()}, tmp_path / "x.safetensors")
    loaded = load_model(tmp_path / "x.safetensors")
    write_checkpoint(loaded, tmp_path / "out.safetensors", "node-ui" if fused else "published", lambda size: None)
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == meant.keys()
    for name, value in meant.items():
        assert torch.equal(found[name].float(), value), name
    assert kind in describe(tmp_path / "x.safetensors")["quantization"]
