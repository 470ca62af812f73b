"""Names the methods that are not merged, by the keys and settings that only they have."""

from __future__ import annotations

import re

_KEYS = (
    (r"\.(?:oft_|rescale$)", "OFT or BOFT"),
    (r"\.boft_", "BOFT"),
    (r"\.(?:ia3_|on_input$)", "IA3"),
    (r"\.(?:glora_|[ab][12]\.weight$|bm\.weight$)", "GLoRA"),
    (r"\.lora_E\b", "AdaLoRA"),
    (r"\.lora_(?:embedding_|parameter_)", "LoRA of embeddings or bare parameters"),
    (r"\.pvera_", "PVeRA"),
    (r"\.vera_", "VeRA"),
    (r"\.vblora_", "VB-LoRA"),
    (r"\.fourierft_", "FourierFT"),
    (r"\.randlora_", "RandLoRA"),
    (r"\.bone_", "Bone"),
    (r"\.poly_", "Poly"),
    (r"\.(?:q_layer|p_layer)\.weight$", "T-LoRA"),
    (r"\.lambda_layer$", "T-LoRA"),
    (r"\.set_weight$", "patch that replaces whole weights"),
)
_METHODS = tuple((re.compile(pattern), method) for pattern, method in _KEYS)

# PEFT's other methods begin their keys with their names.
_PEFT = re.compile(
    r"\.(adamss|adaption_prompt|beft|c3a|cartridge|cpt|deft|delora|frod|gralora|hira|hra|lily|ln_tuning|miss"
    r"|multitask_prompt_tuning|osf|p_tuning|peanut|prefix_tuning|prompt_tuning|psoft|road|shadow|shira|supertuning"
    r"|tinylora|trainable_tokens|unilora|waveft|xlora)_"
)

MERGED = ("LORA", "LOHA", "LOKR")
"""The `peft_type` of the methods that are merged."""

_CHANGES_SUM = (
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "layer_replication",
    "kasa_config",
    "arrow_config",
    "monteclora_config",
)


def method_of(name: str) -> str:
    """The method that a key belongs to, when that method is refused; empty for every other key."""
    named = _PEFT.search(name)
    return named[1].upper() if named else next((method for pattern, method in _METHODS if pattern.search(name)), "")


def refused_setting(config: dict[str, object]) -> str:
    """The setting of a PEFT configuration that makes the adapter more than a sum, as `use_qalora`; empty if none."""
    return next((name for name in _CHANGES_SUM if config.get(name)), "")
