"""Finds the weights in a folder by the names of its files: shards, variants, snapshots of a Hugging Face cache.

Folders come from untrusted sources. So hidden files are not looked at, and no link may leave the folder. Links of a
snapshot may lead to the blobs of their own repository in the cache.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from l2p_runtime.errors import ArtifactError

STEMS = ("diffusion_pytorch_model", "model")
"""File stems of Hugging Face folders: diffusers' models, transformers' models."""

UNFINISHED_SUFFIXES = (".part", ".partial", ".incomplete", ".crdownload", ".download", ".aria2", ".tmp")

_SHARD = re.compile(r"(.+?)-(\d{1,6})-of-(\d{1,6})(?:\.([^.]+))?\.safetensors")
_INDEX = re.compile(r"(.+)\.safetensors\.index(?:\.([^.]+))?\.json")
_REVISION = re.compile(r"\w[\w.-]{0,199}")
_SEARCHED_FOLDERS = 200


@dataclass(slots=True)
class WeightSet:
    """The files of one folder that hold one model, under one name such as `model` or `model.bf16`.

    Attributes:
        whole: the one file that holds all tensors, if there is one.
        indices: files that say which shard holds which tensor.
        shards: number of each shard, counted from 1, and the number of shards that its name states, to its file.
    """

    folder: Path
    name: str
    whole: str = ""
    indices: list[str] = field(default_factory=list)
    shards: dict[tuple[int, int], str] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """A file that stands for the set: `open_weights` opens the whole set from it."""
        return self.folder / (self.indices[0] if self.indices else self.whole or min(self.shards.values()))


def find_weights(folder: Path, stems: Iterable[str] = STEMS) -> WeightSet | None:
    """The set of weights in a folder: the one with a usual stem, else its only variant, else the only one there is.

    Returns:
        None if the folder holds no .safetensors files.

    Raises:
        ArtifactError: several are equally likely; the hint has the path of each.
    """
    sets = weight_sets(folder)
    stems = tuple(stems)
    for found in (
        [each for name, each in sets.items() if name in stems],
        [each for name, each in sets.items() if name.startswith(tuple(f"{stem}." for stem in stems))],
        list(sets.values()),
    ):
        if len(found) > 1:
            raise ArtifactError(
                f"the folder `{folder}` holds {len(found)} .safetensors files or sets of shards "
                f"({', '.join(each.path.name for each in found[:4])}), expected one",
                hint=f"give the file itself, one of: {', '.join(str(each.path) for each in found[:8])}",
            )
        if found:
            return found[0]
    return None


def weight_sets(folder: Path) -> dict[str, WeightSet]:
    """Every set of weights that the names of a folder's files tell, by name."""
    sets: dict[str, WeightSet] = {}
    for file in visible_files(folder):
        name = set_name(file)
        if not name:
            continue
        found = sets.setdefault(name, WeightSet(folder, name))
        if _INDEX.fullmatch(file):
            found.indices.append(file)
        elif match := _SHARD.fullmatch(file):
            found.shards[int(match[2]), int(match[3])] = file
        else:
            found.whole = file
    return sets


def set_name(file: str) -> str:
    """The name of the set that a file belongs to: `model.bf16` for `model.safetensors.index.bf16.json`; empty if none.

    A variant stands before or after the number of a shard, and before or after `.safetensors.index`.
    """
    match = _INDEX.fullmatch(file)
    if match:
        return ".".join(filter(None, match.groups()))
    match = _SHARD.fullmatch(file)
    if match:
        return ".".join(filter(None, (match[1], match[4])))
    return file.removesuffix(".safetensors") if file.endswith(".safetensors") else ""


def is_part(file: str) -> bool:
    """Whether a file is an index or one of several shards, so that it stands for more than itself."""
    match = _SHARD.fullmatch(file)
    return bool(_INDEX.fullmatch(file)) or (match is not None and int(match[3]) > 1)


def visible_files(folder: Path) -> list[str]:
    """Names of the files of a folder in order, without hidden ones: macOS leaves `._NAME` beside a copied file."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith(".") and not path.is_dir())


def model_folder(path: Path) -> Path:
    """The folder that holds a model's files: of a Hugging Face cache the snapshot of `main`, else the folder itself.

    Raises:
        ArtifactError: a cache with several models or snapshots, none of which is the one of `main`; or with none.
    """
    if path.name == "snapshots" and _is_cached_model(path.parent):
        return _snapshot(path.parent)
    if _is_cached_model(path):
        return _snapshot(path)
    models = sorted(entry for entry in path.glob("models--*") if _is_cached_model(entry))
    if len(models) > 1:
        raise ArtifactError(
            f"`{path}` is a Hugging Face cache of {len(models)} models, expected one",
            hint=f"give the folder of one of them: {', '.join(map(str, models[:8]))}",
        )
    return _snapshot(models[0]) if models else path


def inside(folder: Path, name: str) -> Path:
    """A file of a folder, which may be a link within the folder or, in a Hugging Face cache, to the model's blobs.

    Raises:
        ArtifactError: a link that leads elsewhere, or to a file that is not there.
    """
    path = folder / name
    # `Path.resolve` raises for a loop of links.
    target = Path(os.path.realpath(path))
    if not any(target.is_relative_to(root) for root in _roots(folder)):
        raise ArtifactError(
            f"`{path}` is a link that leaves its folder",
            hint=f"copy the folder with what its links point to: cp -rL {folder} COPY",
        )
    require_target(path)
    return path


def require_target(path: Path) -> None:
    """Refuse a link to a file that is not there.

    Raises:
        ArtifactError: the path is such a link.
    """
    if os.path.islink(path) and not os.path.exists(path):  # noqa: PTH110, PTH114 - False for a name too long
        raise ArtifactError(
            f"`{path}` is a link to `{os.path.realpath(path)}`, which is not there",
            hint="what it points to was deleted, or its download did not finish: download the model again",
        )


def nested_weights(folder: Path) -> list[Path]:
    """Up to 4 sets of weights in folders of this folder, for hints."""
    found: list[Path] = []
    for count, (place, folders, _) in enumerate(os.walk(folder)):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [each.path for each in weight_sets(Path(place)).values()]
        if count >= _SEARCHED_FOLDERS or len(found) >= 4:
            break
    return found[:4]


def _is_cached_model(path: Path) -> bool:
    return path.name.startswith("models--") and (path / "snapshots").is_dir()


def _snapshot(model: Path) -> Path:
    snapshots = {entry.name: entry for entry in sorted((model / "snapshots").iterdir()) if entry.is_dir()}
    main = _revision(model / "refs" / "main")
    if main in snapshots:
        return snapshots[main]
    if len(snapshots) == 1 and not main:
        return next(iter(snapshots.values()))
    what = f"names snapshot {main}, which is not among them" if main else "is missing"
    raise ArtifactError(
        f"the cache folder `{model}` holds {len(snapshots)} snapshots, and its `refs/main` {what}",
        hint=f"give the snapshot itself, one of: {', '.join(map(str, list(snapshots.values())[:8]))}"
        if snapshots
        else f"download the model again: hf download {model.name.removeprefix('models--').replace('--', '/')}",
    )


def _revision(ref: Path) -> str:
    """The commit that a reference of the cache names; empty if it names none."""
    try:
        with ref.open(encoding="ascii") as file:
            text = file.read(256).strip()
    except (OSError, ValueError):
        return ""
    return text if _REVISION.fullmatch(text) else ""


def _roots(folder: Path) -> Iterator[Path]:
    real = Path(os.path.realpath(folder))
    yield real
    for place in (real, *real.parents):
        model = place.parent.parent
        if place.parent.name == "snapshots" and model.name.startswith("models--"):
            yield model / "blobs"
