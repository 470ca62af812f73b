"""Prompt embeddings from files that other tools wrote."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2p_runtime.errors import ArtifactError, UsageError
from l2p_runtime.tensorfile import open_tensorfile

if TYPE_CHECKING:
    from numpy.typing import NDArray

EMBEDDINGS_BYTES_MAX = 256 << 20


def read_embeddings(path: Path | None) -> NDArray[Any] | None:
    """Read embeddings [L,C] or [1,L,C]; None for None.

    A `.npy` file holds the array; a `.safetensors` file holds it as `prompt_embeds`, or as its only tensor, and padded
    rows are dropped where a `caption_mask` beside it says so.

    Raises:
        UsageError: no such file, or another kind of file.
        ArtifactError: the file is damaged.
    """
    if path is None:
        return None
    if not path.is_file():
        raise UsageError(f"there is no embeddings file `{path}`")
    if path.stat().st_size > EMBEDDINGS_BYTES_MAX:
        raise UsageError(f"`{path}` has {path.stat().st_size:,} bytes, which is more than any prompt takes")
    if path.suffix == ".npy":
        return _read_npy(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    raise UsageError(f"`{path}` is neither .npy nor .safetensors")


def _read_npy(path: Path) -> NDArray[Any]:
    import numpy as np

    try:
        # Mapping checks the size that the header claims against the file before anything is allocated.
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ArtifactError(f"`{path}` is no .npy array: {error}") from error
    return _without_batch(values)


def _read_safetensors(path: Path) -> NDArray[Any]:
    file = open_tensorfile(path)
    name = "prompt_embeds" if "prompt_embeds" in file.tensors else next(iter(file.tensors))
    if name != "prompt_embeds" and len(file.tensors) > 1:
        raise ArtifactError(f"`{path}` holds {len(file.tensors)} tensors, none called `prompt_embeds`")
    if file.tensors[name].dtype not in ("F32", "F16", "F64"):
        raise ArtifactError(f"`{path}`: `{name}` is {file.tensors[name].dtype}, expected F32, F16 or F64")
    values = _without_batch(file.read(name))
    if "caption_mask" in file.tensors:
        mask = file.read("caption_mask").reshape(-1)
        values = values[: int(mask.sum())]
    return values


def _without_batch(values: NDArray[Any]) -> NDArray[Any]:
    return values[0] if values.ndim == 3 and values.shape[0] == 1 else values
