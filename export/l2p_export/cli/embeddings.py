"""Reads prompt embeddings from files of other tools."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2p_runtime.errors import ArtifactError, UsageError
from l2p_runtime.tensorfile import TensorFile, open_tensorfile

if TYPE_CHECKING:
    from numpy.typing import NDArray

EMBEDDINGS_BYTES_MAX = 256 << 20

_HINT = "numpy.save an array [tokens, width] of float32"


def read_embeddings(path: Path | None) -> NDArray[Any] | None:
    """Read prompt embeddings from a file that holds [L,C] or [1,L,C].

    A `.npy` file holds the array. A `.safetensors` file holds it as `prompt_embeds`, or as its only tensor; with a
    `caption_mask` beside it, padded rows are dropped.

    Returns:
        Floats [L,C], a batch of one dropped; None for no path.

    Raises:
        UsageError: no such file, or another kind of file.
        ArtifactError: the file is damaged.
    """
    if path is None:
        return None
    if not path.is_file():
        raise UsageError(f"there is no embeddings file `{path}`")
    if path.stat().st_size > EMBEDDINGS_BYTES_MAX:
        raise UsageError(f"`{path}` has {path.stat().st_size:,} bytes, more than any prompt needs")
    if path.suffix == ".npy":
        return _read_npy(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    raise UsageError(f"`{path}` is neither .npy nor .safetensors")


def _read_npy(path: Path) -> NDArray[Any]:
    import numpy as np

    try:
        # Mapping checks the size that the header claims against the file before anything is allocated.
        with np.errstate(over="raise"):
            values = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # a damaged header fails in a dozen ways, from SyntaxError to OverflowError
        raise ArtifactError(f"`{path}` is no .npy array: {error}", hint=_HINT) from error
    return _floats(values, path)


def _read_safetensors(path: Path) -> NDArray[Any]:
    file = open_tensorfile(path)
    names = [name for name in file.tensors if name != "caption_mask"]
    name = "prompt_embeds" if "prompt_embeds" in names or not names else names[0]
    if name not in file.tensors or (name != "prompt_embeds" and len(names) > 1):
        raise ArtifactError(f"`{path}` holds {len(file.tensors)} tensors, none called `prompt_embeds`")
    if file.tensors[name].dtype not in ("F32", "F16", "F64"):
        raise ArtifactError(f"`{path}`: `{name}` is {file.tensors[name].dtype}, expected F32, F16 or F64")
    values = _floats(file.read(name), path)
    if "caption_mask" in file.tensors:
        values = values[: _caption_tokens(file, values.shape[0])]
    return values


def _caption_tokens(file: TensorFile, rows: int) -> int:
    """Number of rows that a mask keeps; they must be the first ones."""
    info = file.tensors["caption_mask"]
    mask = file.read("caption_mask").reshape(-1)
    kept = int(mask.sum()) if info.dtype == "BOOL" else -1
    if kept < 0 or mask.size != rows or not mask[:kept].all():
        raise ArtifactError(
            f"`{file.path}`: `caption_mask` is {info.dtype} {list(info.shape)}, "
            f"expected {rows} BOOL with the true ones first"
        )
    return kept


def _floats(values: NDArray[Any], path: Path) -> NDArray[Any]:
    """Drop a batch of one; refuse anything but floats [L,C] or [B,L,C]."""
    if values.dtype.kind != "f" or values.ndim not in (2, 3):
        raise ArtifactError(f"`{path}` holds {values.dtype} {list(values.shape)}, expected floats [L, C]", hint=_HINT)
    return values[0] if values.ndim == 3 and values.shape[0] == 1 else values
