"""Streams tensors into a safetensors file: the weights of an ONNX graph, or a whole checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from l2p_calib.fp8 import quantize
from l2p_runtime.errors import ArtifactError
from l2p_runtime.files import atomic_file
from l2p_runtime.tensorfile import TensorInfo, header_bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from l2p_export.tensors.sources import TensorSource

_NUMPY = {"F32": "<f4", "F16": "<f2"}


def write_weights(
    path: Path,
    tensors: Mapping[str, TensorSource],
    dtypes: Mapping[str, str],
    advance: Callable[[int], None],
    metadata: Mapping[str, str] | None = None,
) -> tuple[str, dict[str, TensorInfo]]:
    """Write tensors one after the other, converted chunk by chunk, and check them for NaN and Inf.

    The file appears only when it is complete.

    Args:
        path: file to write; replaced if it is there.
        tensors: published name to source, in the order to write.
        dtypes: name to `F32`, `F16`, `BF16` or `F8_E4M3`; a tensor for `F8_E4M3` is already divided by its
            scale.
        advance: called with the number of bytes written since its last call.
        metadata: text to store in the header.

    Returns:
        SHA-256 of the file, and where each tensor lies in it.

    Raises:
        ArtifactError: a weight is NaN, Inf or, in F16, larger than 65504.
    """
    header, places = header_bytes([(name, dtypes[name], source.shape) for name, source in tensors.items()], metadata)
    digest = hashlib.sha256(header)
    with atomic_file(path) as file:
        file.write(header)
        for name, source in tensors.items():
            for chunk in source.chunks():
                data = _stored(chunk, name, dtypes[name]).tobytes()
                digest.update(data)
                file.write(data)
                advance(len(data))
    return digest.hexdigest(), places


def _stored(chunk: NDArray[np.float32], name: str, dtype: str) -> NDArray[np.generic]:
    import numpy as np

    if not np.isfinite(chunk).all():
        count = int((~np.isfinite(chunk)).sum())
        raise ArtifactError(
            f"weight `{name}` holds NaN or Inf ({count} values in one chunk)",
            hint="the training that wrote this checkpoint diverged, or the file is damaged; use an earlier one",
        )
    if dtype == "BF16":
        import ml_dtypes

        return chunk.astype(ml_dtypes.bfloat16)
    if dtype == "F8_E4M3":
        return quantize(chunk, 1.0)
    with np.errstate(over="ignore"):
        stored = chunk.astype(_NUMPY[dtype])
    if dtype == "F16" and not np.isfinite(stored).all():
        raise ArtifactError(
            f"weight `{name}` reaches {float(np.abs(chunk).max()):.3g}, beyond the 65504 of float16",
            hint="build with --precision bf16 or fp32",
        )
    return stored
