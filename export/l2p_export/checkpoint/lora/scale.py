"""Reads the alpha of a LoRA from its metadata or its PEFT configuration; `.alpha` tensors are read elsewhere."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from l2p_export.checkpoint.lora.patterns import first_matches
from l2p_export.checkpoint.lora.refused import MERGED, refused_setting
from l2p_runtime.errors import ArtifactError
from l2p_runtime.tensorfile import TensorFile

PEFT_FILE = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"

_CONFIG_BYTES_MAX = 1 << 20
_CONFIG_KEYS = ("lora_adapter_metadata", "adapter_config", "peft_config")
# These methods subtract the initial LoRA from the base before training, so the sum with the published base is wrong.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, slots=True)
class Pattern:
    """One setting of PEFT's: a number for every layer, and other numbers for layers that match a key.

    Attributes:
        default: None where it is not stated.
        by_key: regular expression to number, in the order of the file.
        name: of the setting, for messages.
        path: the file that states it.
    """

    default: float | None = None
    by_key: Mapping[str, float] = field(default_factory=dict)
    name: str = ""
    path: Path = Path()

    def of_modules(self, modules: Iterable[str]) -> dict[str, float | None]:
        """Module name to its number.

        Raises:
            ArtifactError: a key cannot be matched.
        """
        modules = tuple(modules)
        keys = first_matches(tuple(self.by_key), modules, self.name, self.path) if self.by_key else {}
        return {module: self.by_key[keys[module]] if module in keys else self.default for module in modules}


@dataclass(frozen=True, slots=True)
class Settings:
    """What a file states for all its layers.

    Attributes:
        alpha: None by default, which means alpha = r.
        rank: needed where the factors themselves do not show it.
        root: the scale is alpha / sqrt(r) (rsLoRA) instead of alpha / r.
        is_peft: they are PEFT's.
    """

    alpha: Pattern = field(default_factory=Pattern)
    rank: Pattern = field(default_factory=Pattern)
    root: bool = False
    is_peft: bool = False


def read_settings(file: TensorFile) -> Settings:
    """Read the file's metadata, or the configuration that PEFT writes beside its file.

    Raises:
        ArtifactError: the configuration is not JSON, a number is not finite, or the method changes the base weights or
            is none that can be merged.
    """
    for key in _CONFIG_KEYS:
        if key in file.metadata:
            return _from_config(_parse(file.metadata[key], f"`{file.path}` metadata `{key}`"), file.path)
    if "lora_alpha" in file.metadata:
        return Settings(Pattern(_number(file.metadata["lora_alpha"], "lora_alpha", file.path)))
    # PEFT writes alpha nowhere else; without it a LoRA of alpha = 2 r would silently act at half its strength.
    config = file.path.with_name(PEFT_CONFIG)
    if file.path.name == PEFT_FILE and config.is_file():
        return _from_config(_parse(_read(config), f"`{config}`"), config)
    return Settings()


def _from_config(config: dict[str, Any], path: Path) -> Settings:
    # diffusers pipelines put the component's name in front: `transformer.lora_alpha`.
    config = {key.removeprefix("transformer."): value for key, value in config.items()}
    _require_sum(config, path)
    # PEFT's LoHa and LoKr call it alpha.
    alpha = config.get("lora_alpha", config.get("alpha"))
    return Settings(
        _pattern(alpha, "lora_alpha", config.get("alpha_pattern"), "alpha_pattern", path),
        _pattern(config.get("r"), "r", config.get("rank_pattern"), "rank_pattern", path),
        root=config.get("use_rslora") is True,
        is_peft=True,
    )


def _require_sum(config: dict[str, Any], path: Path) -> None:
    """Refuse adapters whose change is none of ours, or none on the base as published."""
    method = config.get("peft_type")
    if method is not None and str(method).upper() not in MERGED:
        raise ArtifactError(
            f"`{path}` is a {str(method)[:40]}, expected LoRA, LoHa or LoKr",
            hint="merge it with the tool that trained it, and give the merged checkpoint",
        )
    setting = refused_setting(config)
    if setting:
        raise ArtifactError(
            f"`{path}` was trained with {setting}, with which the change is more than a LoRA's",
            hint="merge it with the tool that trained it, and give the merged checkpoint",
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise ArtifactError(
            f"`{path}` was trained with init_lora_weights = {start!a}, which changes the base weights, expected a LoRA "
            "on the base as published",
            hint="save it with PEFT's path_initial_model_for_weight_conversion, which makes a plain LoRA of it",
        )


def _pattern(default: object, default_name: str, by_key: object, name: str, path: Path) -> Pattern:
    by_key = by_key or {}
    if not isinstance(by_key, dict):
        raise ArtifactError(f"`{path}` has {name} that is no object, expected layer to number")
    return Pattern(
        None if default is None else _number(default, default_name, path),
        {key: _number(value, f"{name} of {key[:60]!a}", path) for key, value in by_key.items()},
        name,
        path,
    )


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
