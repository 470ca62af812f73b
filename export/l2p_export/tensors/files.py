"""Weights on disk: one safetensors file, or a Hugging Face folder with one file or many shards.

Folders come from untrusted sources. So an index may only name plain files of its own folder, each tensor belongs to one
file, and nothing outside the folder is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from l2p_export.tensors.sources import FileTensor
from l2p_runtime.errors import ArtifactError
from l2p_runtime.tensorfile import TensorFile, open_tensorfile

INDEX_BYTES_MAX = 64 << 20
STEMS = ("diffusion_pytorch_model", "model")
"""File stems of Hugging Face folders: diffusers' models, transformers' models."""

_PICKLE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")


@dataclass(frozen=True, slots=True)
class Weights:
    """All tensors of a file or folder under the names they are stored with."""

    path: Path
    tensors: Mapping[str, FileTensor]
    metadata: Mapping[str, str]


def open_weights(path: Path) -> Weights:
    """Open a safetensors file, a model folder, or a diffusers pipeline folder (its `transformer`).

    Raises:
        ArtifactError: absent, a pickle, a folder that holds no weights or contradicts itself, or a damaged header.
    """
    if path.suffix.lower() in _PICKLE_SUFFIXES:
        raise ArtifactError(
            f"`{path}` is a pickle by its name ({path.suffix}), which can run code when opened and is refused",
            hint="convert it to .safetensors where you trust it: torch.load(..., weights_only=True), "
            "then safetensors.torch.save_file",
        )
    if not _exists(path):
        raise ArtifactError(f"there is no checkpoint `{path}`", hint="give a .safetensors file or a model folder")
    if not path.is_dir():
        return _one_file(path)
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    for stem in STEMS:
        if (folder / f"{stem}.safetensors").exists() or (folder / f"{stem}.safetensors.index.json").exists():
            tensors = open_folder_tensors(folder, stem)
            return Weights(folder, tensors, _folder_metadata(tensors))
    found = sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found[:4]) or "none"
        raise ArtifactError(
            f"the folder `{folder}` holds {len(found)} .safetensors files ({names}) and no index, expected one",
            hint="give the .safetensors file itself",
        )
    return _one_file(_inside(folder, found[0].name))


def open_folder_tensors(folder: Path, stem: str) -> dict[str, FileTensor]:
    """Open `STEM.safetensors`, or all shards that `STEM.safetensors.index.json` names.

    Raises:
        ArtifactError: the index is damaged or names shards or tensors that are not there, two files claim a tensor, a
            link leads out of the folder, or a single file beside the index holds something else.
    """
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    sharded = _read_shards(folder, _inside(folder, index.name)) if index.exists() else None
    if not single.exists():
        if sharded is None:
            raise ArtifactError(f"`{folder}` has neither `{single.name}` nor `{index.name}`")
        return sharded
    whole = _whole(open_tensorfile(_inside(folder, single.name)))
    if sharded is not None:
        shapes = [{name: source.shape for name, source in tensors.items()} for tensors in (whole, sharded)]
        if shapes[0] != shapes[1]:
            wrong = sorted(name for name in whole.keys() | sharded.keys() if shapes[0].get(name) != shapes[1].get(name))
            raise ArtifactError(
                f"`{folder}`: `{single.name}` and `{index.name}` disagree on {len(wrong)} tensors, `{wrong[0]}` first",
                hint="remove the one that is out of date",
            )
    return whole


def _one_file(path: Path) -> Weights:
    file = open_tensorfile(path)
    return Weights(path, _whole(file), file.metadata)


def _whole(file: TensorFile) -> dict[str, FileTensor]:
    return {name: FileTensor(file, info, info.shape) for name, info in file.tensors.items()}


def _read_shards(folder: Path, index: Path) -> dict[str, FileTensor]:
    weight_map = _weight_map(index)
    tensors: dict[str, FileTensor] = {}
    missing = sorted({shard for shard in weight_map.values() if not (folder / shard).is_file()})
    if missing:
        raise ArtifactError(
            f"`{index.name}` names shards that are not in `{folder}`: {', '.join(missing[:4])}",
            hint="the download is incomplete; fetch the folder again",
        )
    for shard in sorted(set(weight_map.values())):
        for name, source in _whole(open_tensorfile(_inside(folder, shard))).items():
            if name in tensors:
                raise ArtifactError(f"`{tensors[name].file.path.name}` and `{shard}` both hold `{name}`")
            if weight_map.get(name) != shard:
                raise ArtifactError(f"`{shard}` holds `{name}`, which `{index.name}` does not place there")
            tensors[name] = source
    absent = sorted(weight_map.keys() - tensors.keys())
    if absent:
        raise ArtifactError(f"`{index.name}` names {len(absent)} tensors that no shard holds, `{absent[0]}` first")
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    if index.stat().st_size > INDEX_BYTES_MAX:
        raise ArtifactError(f"`{index}` has {index.stat().st_size:,} bytes, which is no index")
    try:
        parsed = json.loads(index.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"`{index}` is not JSON: {error}") from error
    weight_map = parsed.get("weight_map") if isinstance(parsed, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ArtifactError(f"`{index}` has no `weight_map`")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ArtifactError(f"`{index}` places `{name}` in {shard!r}, expected a .safetensors file of the folder")
    return weight_map


def _inside(folder: Path, name: str) -> Path:
    """A file of the folder; links may not lead out of it."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ArtifactError(
            f"`{path}` is a link that leaves its folder",
            hint=f"copy the folder with what its links point to: cp -rL {folder} COPY",
        )
    return path


def _folder_metadata(tensors: Mapping[str, FileTensor]) -> dict[str, str]:
    """The metadata of all files of a folder; of equal keys the first one counts."""
    metadata: dict[str, str] = {}
    for source in tensors.values():
        metadata = {**source.file.metadata, **metadata}
    return metadata


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long, a folder that may not be entered
        return False
