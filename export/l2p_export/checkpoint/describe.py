"""Describes any weights file from its header, for `inspect`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from l2p_export.checkpoint.loading import LoadedModel, load_model, missing_layers, trunk_digest
from l2p_export.checkpoint.lora.layers import methods_of, rank_of
from l2p_export.checkpoint.lora.names import is_text_encoder, parse_key
from l2p_export.families import Family, family_claiming, known_as, qwen3
from l2p_export.families.company import grouped
from l2p_export.tensors.checkpoint import Checkpoint, fingerprint
from l2p_export.tensors.files import Weights, open_weights
from l2p_export.tensors.foreign_layouts import unreadable_layout
from l2p_export.tensors.metadata import is_trained, licence
from l2p_export.tensors.quantized import quantization
from l2p_export.tensors.sources import TensorSource
from l2p_runtime.contract.codec import to_json
from l2p_runtime.errors import ArtifactError
from l2p_runtime.foreign import ForeignFileError

_WRITERS = {
    ("", False): "the published training code",
    ("diffusion_model.", False): "ai-toolkit",
    ("model.diffusion_model.", True): "ComfyUI",
}


def describe(path: Path, source: Path | None = None, *, digest: bool = False) -> dict[str, Any]:
    """Facts about any weights file or folder.

    Args:
        path: file or folder.
        source: latent checkpoint to complete it from and compare it with.
        digest: also hash the trunk, which reads its values.

    Returns:
        Facts as JSON values; `kind` and `path` are always among them.

    Raises:
        ArtifactError: absent, or damaged weights. A file of a known other format is described by its name.
    """
    try:
        weights = open_weights(path)
    except ForeignFileError as error:
        return {"path": str(path), "kind": error.format, "problem": str(error), "hint": error.hint}
    facts: dict[str, Any] = {
        "path": str(weights.path),
        "kind": "unknown weights",
        "tensors": len(weights.tensors),
        "size_bytes": _size_bytes(weights),
        "licence": licence(weights.metadata) or "not stated",
    }
    layout = unreadable_layout(weights.tensors, weights.metadata)
    lora = _lora_facts(weights) if layout is None else None
    if lora:
        return facts | {"kind": "LoRA", "dtypes": _dtypes(weights.tensors.values()), **lora}
    family = family_claiming(weights.tensors)
    if family is None:
        kind = "text encoder" if qwen3.claims(weights.tensors) else facts["kind"]
        mark = fingerprint({name: tensor.shape for name, tensor in weights.tensors.items()})
        facts |= {"kind": kind, "fingerprint": mark, "known_as": known_as(mark) or "unknown"}
        if layout is not None:
            facts |= {"quantization": f"{layout.name}, not read", "hint": layout.conversion}
        return facts | {"dtypes": _dtypes(weights.tensors.values())}
    return facts | _family_facts(weights, family, path, source, digest=digest)


def _family_facts(weights: Weights, family: Family, path: Path, source: Path | None, *, digest: bool) -> dict[str, Any]:
    try:
        checkpoint = family.read(weights)
    except ArtifactError as error:
        refused = {"family": family.name, "kind": "checkpoint that cannot be used", "problem": str(error)}
        layout = unreadable_layout(weights.tensors, weights.metadata)
        if layout is not None:
            refused["quantization"] = f"{layout.name}, not read"
        return refused | {"dtypes": _dtypes(weights.tensors.values()), "hint": error.hint}
    mark = fingerprint(checkpoint.shapes)
    facts: dict[str, Any] = {
        "kind": "latent source" if family.is_source(checkpoint.tensors) else "checkpoint",
        "family": family.name,
        "fingerprint": mark,
        "known_as": known_as(mark) or "unknown",
        "parameters": checkpoint.parameters,
        "dtypes": _dtypes_by_group(checkpoint),
        "quantization": quantization(checkpoint.tensors.values()) or "none",
        "passed_over": grouped(checkpoint.company) or "none",
        "spelling": {
            "prefix": checkpoint.spelling.prefix or "none",
            "fused_qkv": checkpoint.spelling.fused,
            "as_written_by": _WRITERS.get((checkpoint.spelling.prefix, checkpoint.spelling.fused), "another tool"),
        },
        "trained": is_trained(checkpoint.metadata),
        "metadata": {key: value[:200] for key, value in checkpoint.metadata.items() if key.startswith("l2p.")},
    }
    if facts["kind"] == "latent source":
        return facts
    try:
        loaded = load_model(path, source)
    except ArtifactError as error:
        has_layers = any(family.main_layer(name) is not None for name in checkpoint.tensors)
        kind = "adapters" if missing_layers(family, checkpoint) or not has_layers else "incomplete checkpoint"
        return facts | {"kind": kind, "problem": str(error)}
    return facts | _model_facts(loaded, digest=digest)


def _model_facts(loaded: LoadedModel, *, digest: bool) -> dict[str, Any]:
    facts: dict[str, Any] = {"variant": loaded.model.spec.variant, "model": to_json(loaded.model.spec)}
    if loaded.source is not None:
        facts["equal_layers"] = list(loaded.equal_layers)
    if digest:
        facts["trunk_sha256"] = trunk_digest(loaded)
    return facts


def _lora_facts(weights: Weights) -> dict[str, Any]:
    """Layers, their methods and ranks, and keys of a text encoder; empty for a file that is no LoRA."""
    layers: dict[str, dict[str, TensorSource]] = {}
    text_encoder = 0
    for name, tensor in weights.tensors.items():
        key = parse_key(name)
        if key is not None and is_text_encoder(name):
            text_encoder += 1
        elif key is not None:
            layers.setdefault(key.layer, {})[key.part] = tensor
    layers = {layer: parts for layer, parts in layers.items() if parts.keys() != {"alpha"}}
    if not layers and not text_encoder:
        return {}
    methods = Counter(method for parts in layers.values() for method in methods_of(parts))
    ranks = Counter(rank for parts in layers.values() if (rank := rank_of(parts)))
    return {
        "layers": len(layers),
        "methods": dict(sorted(methods.items())),
        "ranks": {str(rank): count for rank, count in sorted(ranks.items())},
        "text_encoder_keys": text_encoder,
    }


def _size_bytes(weights: Weights) -> int:
    return sum(file.stat().st_size for file in {source.file.path for source in weights.tensors.values()})


def _dtypes(sources: Iterable[TensorSource]) -> Mapping[str, int]:
    return dict(Counter(source.dtype for source in sources))


def _dtypes_by_group(checkpoint: Checkpoint) -> dict[str, Mapping[str, int]]:
    groups: dict[str, list[TensorSource]] = {}
    for name, source in sorted(checkpoint.tensors.items()):
        groups.setdefault(name.partition(".")[0], []).append(source)
    return {group: _dtypes(sources) for group, sources in groups.items()}
