"""Sorts the tensors of a file: those of a model, without the prefix that a tool put before them, and its company.

Tools save a transformer inside other objects, and pipelines in one file. So a name may have several prefixes, and text
encoders, autoencoders and tokenizers may lie beside the model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from l2p_export.tensors.sources import FileTensor
from l2p_runtime.errors import ArtifactError

PREFIXES = (
    "base_model.",
    "model.",
    "diffusion_model.",
    "transformer.",
    "pipe.",
    "dit.",
    "module.",
    "_orig_mod.",
    "_fsdp_wrapped_module.",
    "_forward_module.",
    "state_dict.",
)
"""Prefixes of PEFT, ComfyUI, diffusers, DiffSynth-Studio, and torch's wrappers for data parallelism and compilation."""

_COMPANY = re.compile(
    r"(?:text_encoders?(?:_\d)?|text_model|cond_stage_model|conditioner|vae|first_stage_model|autoencoder|image_encoder"
    r"|clip_vision|vision_model|scheduler|model_sampling|norm_final|(?:\w*_)?tokenizer\w*|spiece_model|tekken_model)"
    r"(?:\.|$)"
)


@dataclass(frozen=True, slots=True)
class Sorted:
    """Tensors of one file.

    Attributes:
        prefix: the prefix that most of the model's tensors have; empty for none.
        model: the model's tensors under names without prefix, and tensors that are unknown under their stored names.
        company: stored names of the tensors of other models and of tokenizers.
    """

    prefix: str
    model: Mapping[str, FileTensor]
    company: tuple[str, ...]


def sort_tensors(path: Path, tensors: Mapping[str, FileTensor], is_own: Callable[[str], bool]) -> Sorted:
    """Tell a model's tensors from its company.

    Args:
        path: file or folder, for messages.
        tensors: stored name to tensor.
        is_own: whether a name without prefix can be a tensor of the model.

    Raises:
        ArtifactError: two tensors have one name without their prefixes.
    """
    model: dict[str, FileTensor] = {}
    stored_as: dict[str, str] = {}
    company: list[str] = []
    prefixes: Counter[str] = Counter()
    for stored, tensor in tensors.items():
        name = without_prefix(stored, is_own)
        if not is_own(name) and _is_company(stored, tensor):
            company.append(stored)
            continue
        if name in model:
            raise ArtifactError(
                f"`{path}`: `{stored_as[name]}` and `{stored}` both hold `{name}`",
                hint="the file holds two copies of the model, such as raw and averaged weights: save one of them",
            )
        model[name], stored_as[name] = tensor, stored
        if is_own(name):
            prefixes[stored.removesuffix(name)] += 1
    prefix = prefixes.most_common(1)[0][0] if prefixes else ""
    return Sorted(prefix, model, tuple(sorted(company)))


def without_prefix(name: str, is_own: Callable[[str], bool]) -> str:
    """A name without the prefixes before a name of the model; the name as it is if that leads to none."""
    bare = name
    while not is_own(bare):
        prefix = next((prefix for prefix in PREFIXES if bare.startswith(prefix)), "")
        if not prefix:
            return name
        bare = bare.removeprefix(prefix)
    return bare


def grouped(names: Iterable[str]) -> list[str]:
    """Names for a message: one by itself, several that begin alike as `vae.* (244 tensors)`."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        groups.setdefault(name.partition(".")[0], []).append(name)
    return [
        f"`{members[0]}`" if len(members) == 1 else f"`{first}.*` ({len(members)} tensors)"
        for first, members in groups.items()
    ]


def _is_company(stored: str, tensor: FileTensor) -> bool:
    # A tokenizer may lie beside the weights under any name, as the bytes of its file.
    if tensor.dtype == "U8" and len(tensor.shape) == 1:
        return True
    bare = stored
    while not _COMPANY.match(bare):
        prefix = next((prefix for prefix in PREFIXES if bare.startswith(prefix)), "")
        if not prefix:
            return False
        bare = bare.removeprefix(prefix)
    return True
