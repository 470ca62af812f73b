"""Quantized layouts that are not read are named, with what converts them; and floats are never taken for one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from golden import tiny_checkpoint
from l2p_export.checkpoint.describe import describe
from l2p_export.checkpoint.loading import load_model
from l2p_runtime.errors import ArtifactError
from unit.export.tensors.raw import Raw, marker, raw, write_raw

LAYER = "layers.1.feed_forward.w1"
ROWS, COLUMNS = 170, 64


def filled(dtype: str, *shape: int, bits: int = 8) -> Raw:
    return dtype, shape, bytes(int(np.prod(shape)) * bits // 8)


# Layers as the tools write them: docs and code of each, at the versions of November 2026.
LAYOUTS: dict[str, tuple[dict[str, Raw], str, str]] = {
    "NVFP4 (U8)": (
        {
            ".weight": filled("U8", ROWS, COLUMNS // 2),
            ".weight_scale": filled("F8_E4M3", 256, 4),
            ".weight_scale_2": filled("F32", bits=32),
            ".comfy_quant": marker(format="nvfp4"),
        },
        "NVFP4",
        "comfy_kitchen.dequantize_nvfp4(",
    ),
    "NVFP4 (F4)": (
        {".weight": filled("F4", ROWS, COLUMNS, bits=4), ".weight_scale": filled("F8_E4M3", ROWS, 4)},
        "NVFP4",
        "comfy_kitchen.dequantize_nvfp4(",
    ),
    "MXFP4": (
        {".weight": filled("F4", ROWS, COLUMNS, bits=4), ".weight_scale": filled("F8_E8M0", ROWS, 2)},
        "MXFP4",
        "BF16 or FP8",
    ),
    "FP4 without scales": ({".weight": filled("F4", ROWS, COLUMNS, bits=4)}, "FP4 (F4)", "BF16 or FP8"),
    "FP6": ({".weight": filled("F6_E3M2", ROWS, COLUMNS, bits=6)}, "FP6 (F6_E3M2)", "BF16 or FP8"),
    "GPTQ": (
        {
            ".qweight": filled("I32", COLUMNS // 8, 176, bits=32),
            ".qzeros": filled("I32", 1, 22, bits=32),
            ".scales": filled("F16", 1, 176, bits=16),
            ".g_idx": filled("I32", COLUMNS, bits=32),
        },
        "GPTQ",
        "BF16 or FP8",
    ),
    "GPTQ without order": (
        {
            ".qweight": filled("I32", COLUMNS // 8, 176, bits=32),
            ".qzeros": filled("I32", 1, 22, bits=32),
            ".scales": filled("F16", 1, 176, bits=16),
        },
        "GPTQ",
        "BF16 or FP8",
    ),
    "AWQ": (
        {
            ".qweight": filled("I32", COLUMNS, 22, bits=32),
            ".qzeros": filled("I32", 1, 22, bits=32),
            ".scales": filled("F16", 1, 176, bits=16),
        },
        "AWQ",
        "BF16 or FP8",
    ),
    "SVDQuant": (
        {
            ".qweight": filled("I8", ROWS, COLUMNS // 2),
            ".wscales": filled("BF16", 1, ROWS, bits=16),
            ".smooth_factor": filled("BF16", COLUMNS, bits=16),
            ".proj_down": filled("BF16", COLUMNS, 16, bits=16),
            ".proj_up": filled("BF16", ROWS, 16, bits=16),
        },
        "SVDQuant (nunchaku)",
        "BF16 or FP8",
    ),
    "SVDQuant with LoRA names": (
        {
            ".qweight": filled("I8", ROWS, COLUMNS // 2),
            ".wscales": filled("BF16", 1, ROWS, bits=16),
            ".lora_down": filled("BF16", COLUMNS, 16, bits=16),
            ".lora_up": filled("BF16", ROWS, 16, bits=16),
        },
        "SVDQuant (nunchaku)",
        "BF16 or FP8",
    ),
    "NF4": (
        {
            ".weight": filled("U8", ROWS * COLUMNS // 2, 1),
            ".weight.absmax": filled("U8", ROWS),
            ".weight.quant_map": filled("F32", 16, bits=32),
            ".weight.quant_state.bitsandbytes__nf4": filled("U8", 8),
        },
        "bitsandbytes NF4",
        "dequantize()",
    ),
    "LLM.int8": (
        {".weight": filled("I8", ROWS, COLUMNS), ".SCB": filled("F32", ROWS, bits=32)},
        "bitsandbytes LLM.int8()",
        "dequantize()",
    ),
    "torchao": (
        {"._weight_qdata": filled("F8_E4M3", ROWS, COLUMNS), "._weight_scale": filled("F32", ROWS, 1, bits=32)},
        "torchao",
        "dequantize()",
    ),
    "quanto": (
        {".weight._data": filled("I8", ROWS, COLUMNS), ".weight._scale": filled("F32", ROWS, 1, bits=32)},
        "optimum-quanto",
        "dequantize()",
    ),
    "compressed-tensors": (
        {".weight_packed": filled("I32", ROWS, 8, bits=32), ".weight_scale": filled("BF16", ROWS, 1, bits=16)},
        "compressed-tensors",
        "BF16 or FP8",
    ),
    "INT8 of ComfyUI": (
        {
            ".weight": filled("I8", ROWS, COLUMNS),
            ".weight_scale": filled("F32", bits=32),
            ".comfy_quant": marker(format="int8_tensorwise", convrot=False),
        },
        "I8 with scales, int8_tensorwise",
        "comfy-kitchen",
    ),
    "rotated": (
        {
            ".weight": filled("F8_E4M3", ROWS, COLUMNS),
            ".weight_scale": raw(np.ones((), np.float32)),
            ".comfy_quant": marker(format="float8_e4m3fn", convrot=True),
        },
        "float8_e4m3fn with rotated columns (ConvRot)",
        "comfy-kitchen",
    ),
}


STATE = {name: raw(value) for name, value in tiny_checkpoint.checkpoint().items() if name != f"{LAYER}.weight"}


def state(layer: dict[str, Raw]) -> dict[str, Raw]:
    """A checkpoint with one quantized layer."""
    return STATE | {LAYER + suffix: value for suffix, value in layer.items()}


@pytest.mark.parametrize("case", LAYOUTS)
def test_import_and_inspect_name_a_layout(case: str, tmp_path: Path) -> None:
    layer, name, conversion = LAYOUTS[case]
    # A layout is told before anything is said of the model, so the large head may be absent.
    tensors = {key: value for key, value in state(layer).items() if not key.startswith("local_decoder.")}
    path = write_raw(tmp_path / "x.safetensors", {f"model.diffusion_model.{key}": tensors[key] for key in tensors})
    with pytest.raises(ArtifactError) as caught:
        load_model(path)
    assert f"is quantized as {name} (it has `{LAYER}" in str(caught.value)
    assert conversion in caught.value.hint
    facts = describe(path)
    assert facts["kind"] == "checkpoint that cannot be used"
    assert facts["quantization"] == f"{name}, not read"
    assert conversion in facts["hint"]


@pytest.mark.parametrize("case", LAYOUTS)
def test_a_layout_of_an_unknown_model_is_named_too(case: str, tmp_path: Path) -> None:
    layer, name, _ = LAYOUTS[case]
    path = write_raw(tmp_path / "x.safetensors", {f"blocks.0{suffix}": value for suffix, value in layer.items()})
    facts = describe(path)
    assert facts["kind"] == "unknown weights"
    assert facts["quantization"] == f"{name}, not read"


def test_markers_that_are_no_json_are_passed_over(tmp_path: Path) -> None:
    layer = {".weight": filled("F8_E4M3", ROWS, COLUMNS), ".comfy_quant": ("U8", (3,), b"{{{")}
    for text in ("{", "[]", '{"layers": 5}', '{"layers": {"x": 1}}', "[" * 5000):
        path = write_raw(tmp_path / "x.safetensors", state(layer), {"_quantization_metadata": text})
        assert load_model(path).checkpoint.tensors[f"{LAYER}.weight"].dtype == "F8_E4M3"


def test_a_newer_dtype_is_named(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "x.safetensors", state({".weight": ("F3_E1M1", (ROWS, COLUMNS), bytes(4080))}))
    with pytest.raises(ArtifactError, match="unknown dtype 'F3_E1M1'") as caught:
        load_model(path)
    assert "fetch the model as BF16, F16, F32 or FP8" in caught.value.hint


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3"])
def test_values_that_do_not_fill_whole_bytes(dtype: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not fill whole bytes"):
        describe(write_raw(tmp_path / "x.safetensors", {"x": (dtype, (3, 3), bytes(5))}))
