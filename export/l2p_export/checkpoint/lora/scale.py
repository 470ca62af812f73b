"""Reads the alpha of a LoRA from its metadata or its PEFT configuration."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from l2p_export.checkpoint.lora.names import without_prefix
from l2p_runtime.errors import ArtifactError
from l2p_runtime.tensorfile import TensorFile

PEFT_FILE = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"

_CONFIG_BYTES_MAX = 1 << 20
_CONFIG_KEYS = ("lora_adapter_metadata", "adapter_config", "peft_config")
# These methods subtract the initial LoRA from the base before training, so the sum with the published base is wrong.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, slots=True)
class StatedAlpha:
    """Alpha as a file's metadata or its configuration states it; `.alpha` tensors are read elsewhere.

    Attributes:
        alpha: for every layer without its own; None if it is not stated, which means alpha = r.
        by_layer: layer, or the end of its name, to alpha.
        root: the scale is alpha / sqrt(r) (rsLoRA) instead of alpha / r.
    """

    alpha: float | None = None
    by_layer: Mapping[str, float] = field(default_factory=dict)
    root: bool = False

    def scale(self, layer: str, rank: int) -> float:
        """The factor of `up @ down` for a layer, given without prefix."""
        alpha = next((value for end, value in self.by_layer.items() if f".{layer}".endswith(f".{end}")), self.alpha)
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.root else rank)


def stated_alpha(file: TensorFile) -> StatedAlpha:
    """Read alpha from the file's metadata, or from the configuration that PEFT writes beside its file.

    Raises:
        ArtifactError: the configuration is not JSON, an alpha is not a finite number, or the method changes the base
            weights.
    """
    for key in _CONFIG_KEYS:
        if key in file.metadata:
            return _from_config(_parse(file.metadata[key], f"`{file.path}` metadata `{key}`"), file.path)
    if "lora_alpha" in file.metadata:
        return StatedAlpha(_number(file.metadata["lora_alpha"], "lora_alpha", file.path))
    # PEFT writes alpha nowhere else; without it a LoRA of alpha = 2 r would silently act at half its strength.
    config = file.path.with_name(PEFT_CONFIG)
    if file.path.name == PEFT_FILE and config.is_file():
        return _from_config(_parse(_read(config), f"`{config}`"), config)
    return StatedAlpha()


def _from_config(config: dict[str, Any], path: Path) -> StatedAlpha:
    # diffusers pipelines put the component's name in front: `transformer.lora_alpha`.
    config = {key.removeprefix("transformer."): value for key, value in config.items()}
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise ArtifactError(
            f"`{path}` was trained with init_lora_weights = {start!a}, which changes the base weights, expected a LoRA "
            "on the base as published",
            hint="save it with PEFT's path_initial_model_for_weight_conversion, which makes a plain LoRA of it",
        )
    pattern = config.get("alpha_pattern") or {}
    if not isinstance(pattern, dict):
        raise ArtifactError(f"`{path}` has an alpha_pattern that is no object, expected layer to alpha")
    alpha = config.get("lora_alpha")
    return StatedAlpha(
        None if alpha is None else _number(alpha, "lora_alpha", path),
        {_layer(key, path): _number(value, f"alpha_pattern of {key!a}", path) for key, value in pattern.items()},
        root=config.get("use_rslora") is True,
    )


def _layer(pattern: str, path: Path) -> str:
    """A key of `alpha_pattern`. PEFT allows a regular expression; real files have the name of a layer or its end."""
    layer = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
    # A regular expression from an untrusted file may never finish matching.
    if not re.fullmatch(r"[\w.-]+", layer):
        raise ArtifactError(
            f"`{path}` has the alpha_pattern {pattern!a}, a regular expression, expected names of layers",
            hint="write the name of each layer, or its end, into alpha_pattern",
        )
    return without_prefix(layer)


def _number(value: object, what: str, path: Path) -> float:
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, str | int | float) else float(value)
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ArtifactError(f"`{path}` has {what} = {str(value)[:40]!a}, expected a finite number")
    return number


def _parse(text: str, what: str) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{what} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ArtifactError(f"{what} is a {type(config).__name__}, expected an object of settings")
    return config


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_CONFIG_BYTES_MAX + 1)
    except OSError as error:
        raise ArtifactError(f"cannot read `{path}`: {error.strerror or error}") from error
    if len(data) > _CONFIG_BYTES_MAX:
        raise ArtifactError(f"`{path}` has more than {_CONFIG_BYTES_MAX} bytes, expected PEFT's settings")
    return data.decode(errors="replace")
