"""Every method of PEFT is merged or refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from safetensors.numpy import save_file

from l2p_export.checkpoint.lora import LoraRequest, open_lora
from l2p_export.checkpoint.lora.refused import MERGED, method_of
from l2p_runtime.errors import ArtifactError

SHAPES = {"layers.0.attention.to_q.weight": (4, 4)}
LAYER = "base_model.model.layers.0.attention.to_q"

OTHERS = [kind for kind in PeftType if kind.value not in MERGED]


@pytest.mark.parametrize("kind", OTHERS)
def test_by_its_configuration(tmp_path: Path, kind: PeftType) -> None:
    lora = {
        f"{LAYER}.lora_A.weight": np.ones((1, 4), np.float32),
        f"{LAYER}.lora_B.weight": np.ones((4, 1), np.float32),
    }
    save_file(lora, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(f'{{"peft_type": "{kind.value}"}}')
    with pytest.raises(ArtifactError, match=f"is a {kind.value}, expected LoRA, LoHa or LoKr"):
        open_lora(LoraRequest(tmp_path), SHAPES, {})


@pytest.mark.parametrize("kind", [kind for kind in OTHERS if kind is not PeftType.ADALORA])
def test_by_its_keys(tmp_path: Path, kind: PeftType) -> None:
    key = f"{LAYER}.{PEFT_TYPE_TO_PREFIX_MAPPING[kind]}x"
    method = method_of(key)
    assert method.lower().replace("-", "").replace("_", "") in key.replace("_", "") or "OFT" in method
    save_file({key: np.ones(4, np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(ArtifactError, match=f"is a {method} "):
        open_lora(LoraRequest(tmp_path / "x.safetensors"), SHAPES, {})
