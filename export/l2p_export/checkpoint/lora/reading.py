"""Opens LoRA files, and checks every key and shape against the checkpoint and every value for NaN and Inf."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from l2p_export.checkpoint.lora.changes import Summed
from l2p_export.checkpoint.lora.layers import Group, bias_of, change_of, decomposition_of
from l2p_export.checkpoint.lora.model import Delta, Lora, LoraRequest
from l2p_export.checkpoint.lora.names import PEFT_PREFIX, LayerNames, Shapes, is_text_encoder, module_name, parse_key
from l2p_export.checkpoint.lora.refused import method_of
from l2p_export.checkpoint.lora.scale import PEFT_CONFIG, PEFT_FILE, Settings, read_settings
from l2p_export.tensors.sources import FileTensor
from l2p_runtime.errors import ArtifactError
from l2p_runtime.tensorfile import TensorFile, TensorInfo, open_tensorfile

_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_LISTED = 20


def open_lora(
    request: LoraRequest, shapes: Shapes, aliases: Mapping[str, tuple[str, ...]], replaced: Shapes | None = None
) -> Lora:
    """Open a LoRA, LoHa, LoKr, DoRA or difference under published names. Reads its values once, for NaN and Inf.

    Args:
        request: file, or folder with one file, and strength.
        shapes: published name to shape, of the checkpoint that it is merged into.
        aliases: further names of its layers, from `Family.aliases`.
        replaced: layers that only the latent source has, from `Family.replaced_layers`; they are left out.

    Raises:
        ArtifactError: absent, damaged, another method, keys that match no layer (all of them listed), keys of a text
            encoder, an incomplete layer, shapes that do not fit, no float, NaN or Inf.
    """
    file = open_tensorfile(_find(request.path))
    _refuse_other_methods(file)
    settings = read_settings(file)
    names = LayerNames(shapes, aliases, replaced)
    sorted_keys = _sort(file, names, shapes)
    if sorted_keys.text_encoder and not request.skip_text_encoder:
        raise ArtifactError(
            f"`{file.path}` has {len(sorted_keys.text_encoder)} keys of a text encoder, which are not merged: "
            f"{_list(sorted_keys.text_encoder)}",
            hint="pass --skip-text-encoder-lora to merge the others without them",
        )
    groups, left_out = _without_replaced(sorted_keys.groups, names, shapes)
    if not groups:
        raise ArtifactError(f"`{file.path}` changes no layer of the checkpoint", hint="give a LoRA made for this model")
    scales = _scales(groups, settings)
    deltas: dict[str, Delta] = {}
    owners: dict[str, Group] = {}
    doubled: set[tuple[str, str]] = set()
    summed: set[tuple[str, str]] = set()
    for group, scale in zip(groups, scales, strict=True):
        for name, delta in _deltas(group, scale, shapes):
            if name in deltas:
                layers = owners[name].layer, group.layer
                if not deltas[name].agrees(delta, shapes[name][0]):
                    deltas[name] = _summed(name, deltas[name], delta, layers, shapes[name], file)
                    summed.add(layers)
                    continue
                doubled.add(layers)
                if len(delta.layer) >= len(deltas[name].layer):
                    continue
            deltas[name], owners[name] = delta, group
    notes = _notes(file, groups, settings, left_out, sorted_keys.text_encoder, doubled, summed)
    return Lora(file.path, request.strength, deltas, notes)


@dataclass(slots=True)
class _Sorted:
    """The keys of a file: by layer, and those that are left out."""

    groups: list[Group] = field(default_factory=list)
    text_encoder: list[str] = field(default_factory=list)


def _find(path: Path) -> Path:
    try:
        found = sorted(path.glob("*.safetensors")) if path.is_dir() else [path] if path.exists() else []
    except OSError:  # a name that is too long, a folder that may not be entered
        found = []
    if len(found) > 1:
        # macOS leaves `._style.safetensors` beside a file.
        found = [file for file in found if not file.name.startswith(".")]
        found = [file for file in found if file.name == PEFT_FILE] or found
    if len(found) > 1:
        names = ", ".join(file.name for file in found[:4])
        raise ArtifactError(
            f"the folder `{path}` holds {len(found)} .safetensors files ({names}), expected one LoRA",
            hint="give the file itself",
        )
    if not found:
        raise ArtifactError(f"there is no LoRA `{path}`", hint="give a .safetensors file as FILE or FILE:STRENGTH")
    return found[0]


def _refuse_other_methods(file: TensorFile) -> None:
    for name in file.tensors:
        method = method_of(name)
        if method:
            raise ArtifactError(
                f"`{file.path}` is a {method} (it has `{name}`), expected LoRA, LoHa, LoKr, DoRA or "
                "differences of weights",
                hint="merge it with the tool that trained it, and give the merged checkpoint",
            )


def _sort(file: TensorFile, names: LayerNames, shapes: Shapes) -> _Sorted:
    """Group the keys by layer; refuse unknown keys, several adapters and incomplete layers."""
    groups: dict[str, Group] = {}
    adapters: set[str] = set()
    unmatched: list[str] = []
    text_encoder: list[str] = []
    for info in file.tensors.values():
        key = parse_key(info.name)
        layer = names.find(key.layer) if key else ""
        if key is None or not layer or not _is_possible(key.part, names.weights(layer), shapes):
            (text_encoder if is_text_encoder(info.name) else unmatched).append(info.name)
            continue
        adapters |= {key.adapter} - {""}
        group = groups.setdefault(layer, Group(file, key.layer, names.weights(layer)))
        if key.part in group.parts:
            raise ArtifactError(
                f"`{file.path}`: `{group.parts[key.part].name}` and `{info.name}` are both the {key.part} of one layer"
            )
        group.parts[key.part] = info
    if unmatched:
        raise ArtifactError(
            f"`{file.path}` has {len(unmatched)} keys that match no layer of the checkpoint: {_list(unmatched)}",
            hint="it was made for another model, or trains more than matrices and convolutions; expected keys as "
            "`layers.0.attention.to_q.lora_A.weight`",
        )
    if len(adapters) > 1:
        raise ArtifactError(
            f"`{file.path}` holds {len(adapters)} adapters: {_list(adapters)}, expected one",
            hint="save each with PEFT's save_pretrained(selected_adapters=[...]), and give --lora for each",
        )
    halves = [info.name for group in groups.values() for info in group.parts.values() if not group.is_whole]
    if halves:
        raise ArtifactError(
            f"`{file.path}` has {len(halves)} keys without their other half: {_list(halves)}",
            hint="every layer needs lora_A and lora_B (lora_down and lora_up), or all factors of its LoHa or LoKr; the "
            "file is incomplete",
        )
    return _Sorted(list(groups.values()), text_encoder)


def _is_possible(part: str, weights: tuple[str, ...], shapes: Shapes) -> bool:
    """Norms have no two sides: only a difference can change them."""
    return part in {"diff", "diff_b"} or all(len(shapes[name]) in {2, 4} for name in weights)


def _without_replaced(groups: list[Group], names: LayerNames, shapes: Shapes) -> tuple[list[Group], list[str]]:
    """The layers that the checkpoint has, and the names of those that only the latent source has."""
    kept, left_out = [], []
    for group in groups:
        replaced = names.replaced(group.layer)
        fits = bool(group.weights) and _fits(group, _shape(group, shapes))
        if replaced is not None and not fits and (not group.weights or _fits(group, replaced)):
            left_out.append(group.layer)
        else:
            kept.append(group)
    return kept, left_out


def _fits(group: Group, shape: tuple[int, ...]) -> bool:
    try:
        change_of(group, shape)
    except ArtifactError:
        return False
    return True


def _shape(group: Group, shapes: Shapes) -> tuple[int, ...]:
    """The shape of a layer's weight: the rows of all of its weights."""
    first = shapes[group.weights[0]]
    return (sum(shapes[name][0] for name in group.weights), *first[1:])


def _scales(groups: list[Group], settings: Settings) -> list[float]:
    """The factor of each layer's change: of its own alpha, else of what the file states for all."""
    modules = [module_name(group.layer) for group in groups]
    alphas, ranks = settings.alpha.of_modules(modules), settings.rank.of_modules(modules)
    scales = []
    for group, module in zip(groups, modules, strict=True):
        own = group.parts.get("alpha")
        alpha = alphas[module] if own is None else _alpha(group.file, own)
        # Two whole factors of a LoKr have no rank. LyCORIS and its readers then ignore alpha; PEFT divides it by r.
        rank = ranks[module] if group.rank is None and own is None else group.rank
        if group.rank is None and rank is not None and rank < 1:
            raise ArtifactError(f"`{group.file.path}` states rank {rank:g} for `{group.layer}`, expected 1 or more")
        if alpha is None or not rank or "difference" in group.methods:
            scales.append(1.0)
        else:
            scales.append(alpha / (math.sqrt(rank) if settings.root and own is None else rank))
    return scales


def _deltas(group: Group, scale: float, shapes: Shapes) -> Iterator[tuple[str, Delta]]:
    """The published tensors that a layer's parts change, each with its change; they share its rows in order."""
    shape = _shape(group, shapes)
    change, decomposition = change_of(group, shape), decomposition_of(group, shape)
    for part, info in group.parts.items():
        if part != "alpha":
            _check_values(group.file, info)
    if change is not None:
        yield from _split(group.weights, shapes, Delta(change, scale, 0, group.weights, decomposition))
    biases = tuple(name.removesuffix("weight") + "bias" for name in group.weights)
    for part in ("bias", "diff_b"):
        if part in group.parts:
            if any(name not in shapes for name in biases):
                raise ArtifactError(
                    f"`{group.file.path}`: `{group.parts[part].name}` changes the bias of `{group.layer}`, which has "
                    "none in the checkpoint"
                )
            whole = Delta(bias_of(group, part, shape[0]), scale if part == "bias" else 1.0, 0, biases)
            yield from _split(biases, shapes, whole)


def _split(tensors: tuple[str, ...], shapes: Shapes, whole: Delta) -> Iterator[tuple[str, Delta]]:
    first_row = 0
    for name in tensors:
        yield name, Delta(whole.change, whole.scale, first_row, whole.layer, whole.decomposition)
        first_row += shapes[name][0]


def _summed(
    tensor: str, one: Delta, other: Delta, layers: tuple[str, str], shape: tuple[int, ...], file: TensorFile
) -> Delta:
    """Two statements on one tensor that differ, as a fused layer beside its parts: the weight gets both changes."""
    if one.decomposition is not None or other.decomposition is not None:
        raise ArtifactError(
            f"`{file.path}`: `{layers[0]}` and `{layers[1]}` both change `{tensor}`, and rescale it (DoRA)",
            hint="two rescalings of one weight have no one meaning: remove the keys of one",
        )
    both = (one.change, one.scale, one.first_row, other.change, other.scale, other.first_row)
    return Delta(Summed(*both, (shape[0], math.prod(shape[1:]))), 1.0, 0, (tensor,))


def _check_values(file: TensorFile, info: TensorInfo) -> None:
    import numpy as np

    if info.dtype not in _FLOATS:
        raise ArtifactError(
            f"`{file.path}`: `{info.name}` is {info.dtype}, expected one of {', '.join(_FLOATS)}",
            hint="quantized LoRAs are not read; fetch the original file",
        )
    if not all(np.isfinite(chunk).all() for chunk in FileTensor(file, info, info.shape).chunks()):
        raise ArtifactError(f"`{file.path}`: `{info.name}` holds NaN or Inf", hint="the training diverged")


def _alpha(file: TensorFile, info: TensorInfo) -> float:
    """A scalar of any dtype: kohya stores alpha as an integer when it was given as one."""
    if math.prod(info.shape) != 1 or info.dtype == "BOOL":
        raise ArtifactError(f"`{file.path}`: `{info.name}` is {info.dtype} {list(info.shape)}, expected one number")
    value = float(next(FileTensor(file, info, info.shape).chunks())[0])
    if not math.isfinite(value):
        raise ArtifactError(f"`{file.path}`: `{info.name}` is {value}, expected a finite number")
    return value


def _notes(
    file: TensorFile,
    groups: list[Group],
    settings: Settings,
    left_out: list[str],
    text_encoder: list[str],
    doubled: set[tuple[str, str]],
    summed: set[tuple[str, str]],
) -> tuple[str, ...]:
    """Sentences on what the file is and what of it is left out; none for a plain LoRA that is merged whole."""
    parts = {part for group in groups for part in group.parts}
    methods = sorted({method for group in groups for method in group.methods})
    is_dora = bool({"magnitude", "dora_scale"} & parts)
    is_peft = settings.is_peft or "magnitude" in parts or any(group.layer.startswith(PEFT_PREFIX) for group in groups)
    name, notes = file.path.name, []
    if is_dora or {"LoHa", "LoKr"} & set(methods):
        kind = " and ".join(methods) + (" with DoRA" if is_dora else "")
        notes.append(f"`{name}` is a {kind} as {'PEFT' if is_peft else 'LyCORIS'} computes it")
    if left_out:
        notes.append(f"left out {len(left_out)} layers of `{name}` that only the latent source has: {_list(left_out)}")
    if text_encoder:
        notes.append(f"left out {len(text_encoder)} keys of a text encoder from `{name}`")
    if doubled:
        pairs = _list(f"{one} and {other}" for one, other in doubled)
        notes.append(f"`{name}` states the change of some layers twice, which is added once: {pairs}")
    if summed:
        pairs = _list(f"{one} and {other}" for one, other in summed)
        notes.append(f"`{name}` changes some layers under two names, and both changes are added: {pairs}")
    if groups[0].layer.startswith(PEFT_PREFIX) and settings == Settings() and "alpha" not in parts:
        notes.append(f"`{name}` states no alpha, and there is no {PEFT_CONFIG} beside {PEFT_FILE}: alpha = r")
    return tuple(notes)


def _list(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(f"`{name}`" for name in names[:_LISTED]) + more
