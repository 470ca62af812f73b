"""Writes a loaded checkpoint as one file, under published names or those of ComfyUI."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from l2p_engines.store.locks import locked
from l2p_export.checkpoint.loading import trunk_digest
from l2p_export.tensors.metadata import TRUNK_SHA256
from l2p_export.tensors.quantized import canonical_dtype
from l2p_export.tensors.writing import write_weights
from l2p_runtime.errors import HostError
from l2p_runtime.files import sweep_partials
from l2p_runtime.tensorfile import ITEM_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from l2p_export.checkpoint.loading import LoadedModel
    from l2p_export.tensors.sources import TensorSource

TargetSpelling = Literal["published", "node-ui"]

_SPARE_BYTES = 1 << 20


def write_checkpoint(loaded: LoadedModel, out: Path, spelling: TargetSpelling, advance: Callable[[int], None]) -> str:
    """Stream a checkpoint into one file, which appears only when it is complete.

    Args:
        loaded: the checkpoint, completed from its source and with LoRAs merged, if asked for.
        out: file to write; an existing one is replaced.
        spelling: names of the tensors.
        advance: called with the number of bytes written since its last call.

    Returns:
        The trunk digest, which the file also carries as `l2p.trunk_sha256`.

    Raises:
        ArtifactError: a weight is NaN or Inf, or the checkpoint belongs to another trunk.
        HostError: the disk has no room, or another import writes that file.
    """
    with locked(out.with_name(f".{out.name}.lock"), busy=f"another import is writing `{out}`"):
        # A killed import may have left a partial file as large as the whole.
        sweep_partials(out.parent, out.name)
        return _write_checkpoint(loaded, out, spelling, advance)


def output_bytes(tensors: Mapping[str, TensorSource]) -> int:
    """Bytes of a file that `write_checkpoint` makes of these tensors, without its header."""
    return sum(math.prod(source.shape) * ITEM_BYTES[canonical_dtype(source)] for source in tensors.values())


def require_room(loaded: LoadedModel, out: Path) -> None:
    """Refuse to write a checkpoint for which the disk has no room.

    Raises:
        HostError: with the bytes that are needed and free.
    """
    needed, free = output_bytes(loaded.checkpoint.tensors) + _SPARE_BYTES, shutil.disk_usage(out.parent).free
    if needed > free:
        raise HostError(
            f"`{out.parent}` has {free:,} bytes free, the checkpoint needs {needed:,}",
            hint="free some space, or choose another --out",
        )


def _write_checkpoint(loaded: LoadedModel, out: Path, spelling: TargetSpelling, advance: Callable[[int], None]) -> str:
    require_room(loaded, out)
    digest = trunk_digest(loaded)
    tensors = _spelled(loaded, spelling)
    metadata = {**loaded.checkpoint.metadata, TRUNK_SHA256: digest}
    write_weights(out, tensors, {n: canonical_dtype(s) for n, s in tensors.items()}, advance, metadata)
    return digest


def _spelled(loaded: LoadedModel, spelling: TargetSpelling) -> dict[str, TensorSource]:
    tensors = dict(sorted(loaded.checkpoint.tensors.items()))
    return tensors if spelling == "published" else dict(sorted(loaded.family.node_ui(tensors).items()))
