"""Weights on disk: one safetensors file, or a Hugging Face folder with one file or many shards.

Folders come from untrusted sources. So an index may only name plain files of its own folder, each tensor belongs to one
file, and nothing outside the folder is read (`folders.inside`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from l2p_export.tensors.folders import (
    STEMS,
    UNFINISHED_SUFFIXES,
    WeightSet,
    find_weights,
    inside,
    is_part,
    model_folder,
    nested_weights,
    require_target,
    set_name,
    visible_files,
    weight_sets,
)
from l2p_export.tensors.sources import FileTensor
from l2p_runtime.errors import ArtifactError
from l2p_runtime.foreign import ForeignFileError, format_of_name
from l2p_runtime.tensorfile import TensorFile, open_tensorfile

INDEX_BYTES_MAX = 64 << 20


@dataclass(frozen=True, slots=True)
class Weights:
    """All tensors of a file or folder under the names they are stored with."""

    path: Path
    tensors: Mapping[str, FileTensor]
    metadata: Mapping[str, str]


def open_weights(path: Path) -> Weights:
    """Open a safetensors file, a model folder, a diffusers pipeline folder (its `transformer`), or a cached model.

    An index, or one of several shards, stands for the whole set that it belongs to.

    Raises:
        ForeignFileError: a file of another format, such as a pickle.
        ArtifactError: absent, a folder that holds no weights or contradicts itself, or a damaged header.
    """
    _require_present(path)
    if path.is_dir():
        folder = model_folder(path)
        return _open_folder(inside(folder, "transformer") if (folder / "transformer").is_dir() else folder)
    if is_part(path.name):
        return _open_set(weight_sets(path.parent)[set_name(path.name)])
    return _one_file(path)


def open_folder_tensors(folder: Path, stem: str) -> dict[str, FileTensor]:
    """Open `STEM.safetensors`, or all shards that `STEM.safetensors.index.json` names, or the only variant of them.

    Raises:
        ArtifactError: the index is damaged or names shards or tensors that are not there, two files claim a tensor, a
            link leads out of the folder, or a single file beside the index holds something else.
    """
    found = find_weights(folder, (stem,))
    if found is None or not f"{found.name}.".startswith(f"{stem}."):
        raise ArtifactError(f"`{folder}` has neither `{stem}.safetensors` nor `{stem}.safetensors.index.json`")
    return _set_tensors(found)


def _require_present(path: Path) -> None:
    require_target(path)
    if not _exists(path):
        half = next((half for suffix in UNFINISHED_SUFFIXES if _exists(half := Path(f"{path}{suffix}"))), None)
        hint = "give a .safetensors file or a model folder"
        if half is not None:
            hint = f"its download did not finish, `{half}` is what there is of it: download it again"
        elif len(path.parts) == 2 and not path.is_absolute() and not path.suffix and not path.parent.exists():
            hint += f"; if this is a model on Hugging Face, fetch it first: hf download {path} --local-dir {path.name}"
        raise ArtifactError(f"there is no checkpoint `{path}`", hint=hint)
    if path.suffix.lower() in UNFINISHED_SUFFIXES and not path.is_dir():
        raise ArtifactError(
            f"`{path}` is an unfinished download by its name ({path.suffix})",
            hint="finish the download; if it is complete, rename it to .safetensors",
        )


def _open_folder(folder: Path) -> Weights:
    found = find_weights(folder)
    if found is not None:
        return _open_set(found)
    names = visible_files(folder)
    for name in names:
        if format_of_name(name) is not None:
            return _one_file(inside(folder, name))
    unfinished = [name for name in names if name.lower().endswith(UNFINISHED_SUFFIXES)]
    nested = nested_weights(folder)
    if unfinished:
        hint = f"finish the download of {', '.join(f'`{name}`' for name in unfinished[:4])}"
    elif nested:
        hint = f"give one of: {', '.join(map(str, nested))}"
    else:
        hint = "give a .safetensors file, or the folder that holds one"
    raise ArtifactError(f"the folder `{folder}` holds 0 .safetensors files", hint=hint)


def _open_set(found: WeightSet) -> Weights:
    if found.whole and not found.indices and not found.shards and found.name.partition(".")[0] not in STEMS:
        return _one_file(inside(found.folder, found.whole))
    tensors = _set_tensors(found)
    return Weights(found.folder, tensors, _folder_metadata(tensors))


def _set_tensors(found: WeightSet) -> dict[str, FileTensor]:
    """All tensors of a set. A whole file beside shards must hold the same ones."""
    sharded = _sharded(found)
    if not found.whole:
        return sharded
    whole = _whole(open_tensorfile(inside(found.folder, found.whole)))
    shapes = [{name: source.shape for name, source in tensors.items()} for tensors in (whole, sharded)]
    if sharded and shapes[0] != shapes[1]:
        wrong = sorted(name for name in whole.keys() | sharded.keys() if shapes[0].get(name) != shapes[1].get(name))
        raise ArtifactError(
            f"`{found.folder}`: `{found.whole}` and `{found.path.name if found.indices else 'its shards'}` disagree on "
            f"{len(wrong)} tensors, `{wrong[0]}` first",
            hint="remove the one that is out of date",
        )
    return whole


def _sharded(found: WeightSet) -> dict[str, FileTensor]:
    if not found.indices:
        return _join_shards(found.folder, _complete_shards(found))
    maps = {name: _weight_map(inside(found.folder, name)) for name in found.indices}
    first, *others = found.indices
    wrong = [name for name in others if maps[name] != maps[first]]
    if wrong:
        raise ArtifactError(
            f"`{found.folder}`: `{first}` and `{wrong[0]}` are indices of one model and disagree",
            hint="remove the one that is out of date",
        )
    return _read_index(found.folder, first, maps[first])


def _complete_shards(found: WeightSet) -> list[str]:
    """The shards of a set that has no index; their names tell how many there must be."""
    counts = sorted({count for _, count in found.shards})
    if len(counts) > 1:
        raise ArtifactError(
            f"`{found.folder}` holds shards of `{found.name}` split into {' and into '.join(map(str, counts))} files",
            hint="remove those of one split, or fetch the index of the other",
        )
    numbers = {number for number, _ in found.shards}
    missing = [number for number in range(1, max(counts, default=0) + 1) if number not in numbers]
    if missing or not numbers <= set(range(1, max(counts, default=0) + 1)):
        listed = ", ".join(f"{number:05d}" for number in missing[:8])
        raise ArtifactError(
            f"`{found.folder}` holds {len(numbers)} of {counts[0]} shards of `{found.name}`"
            + (f"; missing: {listed} of {counts[0]:05d}" if missing else ", numbered beyond that"),
            hint="the download is incomplete; fetch the folder again",
        )
    return [found.shards[key] for key in sorted(found.shards)]


def _read_index(folder: Path, index: str, weight_map: Mapping[str, str]) -> dict[str, FileTensor]:
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not (folder / shard).is_file() and not (folder / shard).is_symlink()]
    if missing:
        raise ArtifactError(
            f"`{index}` names shards that are not in `{folder}`: {', '.join(missing[:4])}",
            hint="the download is incomplete; fetch the folder again",
        )
    tensors = _join_shards(folder, shards)
    for name, source in tensors.items():
        if weight_map.get(name) != source.file.path.name:
            raise ArtifactError(f"`{source.file.path.name}` holds `{name}`, which `{index}` does not place there")
    absent = sorted(weight_map.keys() - tensors.keys())
    if absent:
        raise ArtifactError(f"`{index}` names {len(absent)} tensors that no shard holds, `{absent[0]}` first")
    return tensors


def _join_shards(folder: Path, shards: Iterable[str]) -> dict[str, FileTensor]:
    tensors: dict[str, FileTensor] = {}
    for shard in shards:
        for name, source in _whole(open_tensorfile(inside(folder, shard))).items():
            if name in tensors:
                raise ArtifactError(f"`{tensors[name].file.path.name}` and `{shard}` both hold `{name}`")
            tensors[name] = source
    return tensors


def _one_file(path: Path) -> Weights:
    try:
        file = open_tensorfile(path)
    except ForeignFileError:
        raise
    except ArtifactError as error:
        found = format_of_name(path.name)
        if found is None:
            raise
        raise ForeignFileError(path, found) from error
    return Weights(path, _whole(file), file.metadata)


def _whole(file: TensorFile) -> dict[str, FileTensor]:
    return {name: FileTensor(file, info, info.shape) for name, info in file.tensors.items()}


def _weight_map(index: Path) -> dict[str, str]:
    if index.stat().st_size > INDEX_BYTES_MAX:
        raise ArtifactError(f"`{index}` has {index.stat().st_size:,} bytes, which is no index")
    try:
        parsed = json.loads(index.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"`{index}` is not JSON: {error}", hint="download the index again") from error
    weight_map = parsed.get("weight_map") if isinstance(parsed, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ArtifactError(f"`{index}` has no `weight_map`")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ArtifactError(f"`{index}` places `{name}` in {shard!r}, expected a .safetensors file of the folder")
    return weight_map


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
