"""The spellings a `z_image_l2p` file may use, brought to the published one (l2p.md 2.2)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator

from l2p_export.checkpoint import Checkpoint, Spelling
from l2p_export.tensors import FileTensor, TensorSource
from l2p_runtime.errors import ArtifactError
from l2p_runtime.tensorfile import TensorFile, TensorInfo

PREFIXES = ("model.diffusion_model.", "diffusion_model.")

_RENAMES = (
    (".attention.out.", ".attention.to_out.0."),
    (".attention.q_norm.", ".attention.norm_q."),
    (".attention.k_norm.", ".attention.norm_k."),
)
_TELLING = re.compile(r"local_decoder\.|all_x_embedder\.|all_final_layer\.|(?:noise|context)_refiner\.\d")


def claims(names: Iterable[str]) -> bool:
    """Whether any name is one that only Z-Image and L2P files use."""
    return any(_TELLING.match(_without_prefix(name)) for name in names)


def read_checkpoint(file: TensorFile) -> Checkpoint:
    """Put a file's tensors under published names: no prefix, split q/k/v, embedder named after its patch.

    Raises:
        ArtifactError: two tensors claim one name, or a fused matrix does not split in three.
    """
    tensors: dict[str, TensorSource] = {}
    claimed_by: dict[str, str] = {}
    fused = False
    for info in file.tensors.values():
        for name, source in _published(file, info):
            if name in tensors:
                raise ArtifactError(f"`{file.path}`: `{claimed_by[name]}` and `{info.name}` both hold `{name}`")
            tensors[name], claimed_by[name] = source, info.name
            fused |= ".qkv." in info.name
    prefix = next((prefix for prefix in PREFIXES if any(name.startswith(prefix) for name in file.tensors)), "")
    return Checkpoint(file.path, Spelling(prefix, fused), tensors, file.metadata)


def _published(file: TensorFile, info: TensorInfo) -> Iterator[tuple[str, TensorSource]]:
    name = _without_prefix(info.name)
    if name.endswith(".attention.qkv.weight"):
        if not info.shape or info.shape[0] % 3:
            raise ArtifactError(
                f"`{file.path}`: `{info.name}` has shape {list(info.shape)}, its rows do not split in three"
            )
        rows = info.shape[0] // 3
        for index, projection in enumerate(("to_q", "to_k", "to_v")):
            shape = (rows, *info.shape[1:])
            yield name.replace(".qkv.", f".{projection}."), FileTensor(file, info, shape, index * rows)
        return
    for old, new in _RENAMES:
        name = name.replace(old, new)
    if name.startswith("x_embedder."):
        name = f"all_x_embedder.{_patch_px(file)}-1." + name.removeprefix("x_embedder.")
    yield name, FileTensor(file, info, info.shape)


def _without_prefix(name: str) -> str:
    for prefix in PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def _patch_px(file: TensorFile) -> int:
    """The patch of an embedder that is not named after it: its inputs are 3 p p values."""
    for info in file.tensors.values():
        if _without_prefix(info.name) == "x_embedder.weight" and len(info.shape) == 2:
            patch = math.isqrt(info.shape[1] // 3)
            # 64 inputs are the latent model's 2x2 patches of 16 channels.
            return 2 if info.shape[1] == 64 else patch
    return 0
