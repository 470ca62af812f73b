"""What a transfer saves: trained tensors alone, in BF16, with the digest of the trunk that they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from l2p_export.families.z_image_l2p.dimensions import Dimensions, network_shapes
from l2p_export.tensors import weights_digest
from l2p_runtime.errors import HostError

if TYPE_CHECKING:
    from l2p_export.training.pipeline_folder import Source


def trunk_sha256(source: Source, d: Dimensions) -> str:
    """The digest of a source's trunk (design section 5); reads its values."""
    return weights_digest(source.transformer.tensors, network_shapes("trunk", d))


def write_adapters(path: Path, trained: Mapping[str, Tensor], digest: str, metadata: Mapping[str, str]) -> None:
    """Write the trained tensors, named `NETWORK.PUBLISHED`; the file is whole or absent.

    Raises:
        HostError: the disk is full or refuses.
    """
    from safetensors.torch import save_file

    tensors = {
        name.partition(".")[2]: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in trained.items()
    }
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, {"format": "pt", "l2p.trunk_sha256": digest, "l2p.trained": "true", **metadata})
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise HostError(f"cannot write `{path}`: {error.strerror or error}", hint="make room, then again") from error
