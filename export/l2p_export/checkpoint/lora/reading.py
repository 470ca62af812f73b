"""Opens LoRA files, and checks every key and shape against the checkpoint and every value for NaN and Inf."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from l2p_export.checkpoint.lora.model import Delta, Lora, LoraRequest
from l2p_export.checkpoint.lora.names import LayerNames, Shapes, parse_key, refusal
from l2p_export.checkpoint.lora.scale import StatedAlpha, stated_alpha
from l2p_export.tensors.sources import FileTensor
from l2p_runtime.errors import ArtifactError
from l2p_runtime.tensorfile import TensorFile, TensorInfo, open_tensorfile

_FLOATS = ("F64", "F32", "F16", "BF16")
_LISTED = 20


def open_lora(request: LoraRequest, shapes: Shapes, aliases: Mapping[str, tuple[str, ...]]) -> Lora:
    """Open a LoRA under published names. Reads its values once, to check for NaN and Inf.

    Args:
        request: file, or folder with one file, and strength.
        shapes: published name to shape, of the checkpoint that it is merged into.
        aliases: further names of its layers, from `Family.aliases`.

    Raises:
        ArtifactError: absent, damaged, another method than LoRA, keys that match no layer (all of them listed), half a
            pair, shapes that do not fit, no float, NaN or Inf.
    """
    file = open_tensorfile(_find(request.path))
    pairs = _pairs(file, LayerNames(shapes, aliases))
    stated = stated_alpha(file)
    deltas: dict[str, Delta] = {}
    claimed_by: dict[str, str] = {}
    for pair in pairs:
        for name, delta in _deltas(pair, stated, shapes, file):
            if name in deltas:
                raise ArtifactError(f"`{file.path}`: `{claimed_by[name]}` and `{pair.layer}` both change `{name}`")
            deltas[name], claimed_by[name] = delta, pair.layer
    return Lora(file.path, request.strength, deltas)


@dataclass(slots=True)
class _Pair:
    """What a file holds for one layer, as it spells the layer."""

    layer: str
    weights: Sequence[str]
    parts: dict[str, TensorInfo] = field(default_factory=dict)


def _find(path: Path) -> Path:
    try:
        found = sorted(path.glob("*.safetensors")) if path.is_dir() else [path] if path.exists() else []
    except OSError:  # a name that is too long, a folder that may not be entered
        found = []
    if len(found) > 1:
        names = ", ".join(file.name for file in found[:4])
        raise ArtifactError(
            f"the folder `{path}` holds {len(found)} .safetensors files ({names}), expected one LoRA",
            hint="give the file itself",
        )
    if not found:
        raise ArtifactError(f"there is no LoRA `{path}`", hint="give a .safetensors file as FILE or FILE:STRENGTH")
    return found[0]


def _pairs(file: TensorFile, names: LayerNames) -> list[_Pair]:
    """Group the keys by layer, and refuse incomplete pairs."""
    _refuse_other_methods(file)
    pairs: dict[str, _Pair] = {}
    unmatched = []
    for info in file.tensors.values():
        key = parse_key(info.name)
        weights = names.weights(key.layer) if key else ()
        if key is None or not weights:
            unmatched.append(info.name)
            continue
        pair = pairs.setdefault(key.layer, _Pair(key.layer, weights))
        if key.part in pair.parts:
            raise ArtifactError(
                f"`{file.path}`: `{pair.parts[key.part].name}` and `{info.name}` are both the {key.part} of one layer"
            )
        pair.parts[key.part] = info
    if unmatched:
        raise ArtifactError(
            f"`{file.path}` has {len(unmatched)} keys that match no layer of the checkpoint: {_list(unmatched)}",
            hint="it was made for another model, or trains more than matrices and convolutions; expected keys as "
            "`layers.0.attention.to_q.lora_A.weight`",
        )
    halves = [info.name for pair in pairs.values() for info in pair.parts.values() if not _is_whole(pair)]
    if halves:
        raise ArtifactError(
            f"`{file.path}` has {len(halves)} keys without their other half: {_list(halves)}",
            hint="every layer needs lora_A and lora_B (lora_down and lora_up); the file is incomplete",
        )
    return list(pairs.values())


def _is_whole(pair: _Pair) -> bool:
    return {"down", "up"} <= pair.parts.keys()


def _refuse_other_methods(file: TensorFile) -> None:
    for name in file.tensors:
        refused = refusal(name)
        if refused:
            method, reason = refused
            raise ArtifactError(
                f"`{file.path}` is a {method}, not a LoRA (it has `{name}`): {reason}, expected pairs of two matrices",
                hint="merge it with the tool that trained it, and give the merged checkpoint",
            )


def _deltas(pair: _Pair, stated: StatedAlpha, shapes: Shapes, file: TensorFile) -> Iterator[tuple[str, Delta]]:
    """The published weights that a pair changes, each with its change; they share the rows of `up` in order."""
    down, up = pair.parts["down"], pair.parts["up"]
    _check_shapes(down, up, [shapes[name] for name in pair.weights], file)
    for info in (down, up):
        _check_values(file, info)
    alpha = pair.parts.get("alpha")
    rank = down.shape[0]
    scale = stated.scale(pair.layer, rank) if alpha is None else _alpha(file, alpha) / rank
    first_row = 0
    for name in pair.weights:
        rows = shapes[name][0]
        part = FileTensor(file, up, (rows, *up.shape[1:]), first_row)
        yield name, Delta(FileTensor(file, down, down.shape), part, scale)
        first_row += rows


def _check_shapes(down: TensorInfo, up: TensorInfo, weights: Sequence[tuple[int, ...]], file: TensorFile) -> None:
    """Require down [r, in...] and up [out, r]; trailing axes of size 1 do not count."""
    inputs, rows = weights[0][1:], sum(shape[0] for shape in weights)
    rank = down.shape[0] if down.shape else 0
    wanted = {down: (rank, *inputs), up: (rows, rank)}
    if rank and len(up.shape) > 1 and up.shape[1] != rank and _bare(down.shape) == _bare(wanted[down]):
        raise ArtifactError(
            f"`{file.path}`: `{down.name}` {list(down.shape)} has rank {rank}, but `{up.name}` {list(up.shape)} has "
            f"rank {up.shape[1]}"
        )
    for info, shape in wanted.items():
        if not rank or _bare(info.shape) != _bare(shape):
            of_rank = ["r" if axis == (0 if info is down else 1) else size for axis, size in enumerate(shape)]
            raise ArtifactError(
                f"`{file.path}`: `{info.name}` has shape {list(info.shape)}, expected "
                f"[{', '.join(map(str, of_rank))}] with a rank r of 1 or more",
                hint="the LoRA was made for a model of another width",
            )


def _bare(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without the trailing axes of 1x1 convolutions: tools write [out, r] or [out, r, 1, 1] for the same."""
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


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
    if math.prod(info.shape) != 1 or info.dtype == "BOOL" or info.dtype.startswith("F8"):
        raise ArtifactError(f"`{file.path}`: `{info.name}` is {info.dtype} {list(info.shape)}, expected one number")
    value = float(next(FileTensor(file, info, info.shape).chunks())[0])
    if not math.isfinite(value):
        raise ArtifactError(f"`{file.path}`: `{info.name}` is {value}, expected a finite number")
    return value


def _list(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(f"`{name}`" for name in names[:_LISTED]) + more
