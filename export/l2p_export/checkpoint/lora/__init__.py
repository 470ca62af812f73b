"""Merges LoRAs and their kin into a checkpoint before anything is exported; `--lora FILE:STRENGTH` of the commands.

request = parse_lora("style.safetensors:0.8")
lora = open_lora(request, checkpoint.shapes, family.aliases(checkpoint.shapes), family.replaced_layers(...))
tensors = merge_loras(checkpoint.tensors, [lora])
"""

from __future__ import annotations

from l2p_export.checkpoint.lora.merge import MergedTensor, merge_loras, trunk_layers_touched
from l2p_export.checkpoint.lora.model import Delta, Lora, LoraRequest, parse_lora
from l2p_export.checkpoint.lora.reading import open_lora

__all__ = [
    "Delta",
    "Lora",
    "LoraRequest",
    "MergedTensor",
    "merge_loras",
    "open_lora",
    "parse_lora",
    "trunk_layers_touched",
]
