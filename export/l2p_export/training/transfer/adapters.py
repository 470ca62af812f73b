"""Adapter files of a transfer: only the trained tensors, in BF16, with the digest of their trunk."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from l2p_export.families.z_image_l2p.dimensions import Dimensions, network_shapes
from l2p_export.tensors.digests import weights_digest
from l2p_export.tensors.files import Weights, open_weights
from l2p_export.tensors.metadata import TRUNK_SHA256
from l2p_export.tensors.sources import read_tensor
from l2p_runtime.errors import ArtifactError, HostError
from l2p_runtime.tensorfile import write_tensorfile

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from l2p_export.training.source.folder import Source
    from l2p_runtime.progress import Reporter


HEAD_DECODERS = ("local_decoder.up", "local_decoder.dec")
EMBEDDER = re.compile(r"all_x_embedder\.[1-9]\d{0,3}-1\.weight")


def trunk_sha256(source: Source, d: Dimensions) -> str:
    """Hex digest of a source's trunk (docs/design.md, "Trunk digest"); reads all its values."""
    return weights_digest(source.transformer.tensors, network_shapes("trunk", d))


def write_adapters(path: Path, trained: Mapping[str, Tensor], digest: str, metadata: Mapping[str, str]) -> None:
    """Write the trained tensors, named `NETWORK.PUBLISHED`, atomically.

    Raises:
        HostError: the file cannot be written.
    """
    tensors = {name.partition(".")[2]: _bfloat16(tensor) for name, tensor in trained.items()}
    stated = {"format": "pt", TRUNK_SHA256: digest, "l2p.trained": "true", **metadata}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensorfile(path, dict(sorted(tensors.items())), stated)
    except OSError as error:
        raise HostError(f"cannot write `{path}`: {error.strerror or error}", hint="make room, then again") from error


def check_adapters(path: Path) -> None:
    """Refuse a file that cannot initialize a transfer, by its header.

    Raises:
        ArtifactError: the file is damaged, or does not state the trunk that it was trained on.
    """
    if TRUNK_SHA256 not in open_weights(path).metadata:
        raise ArtifactError(
            f"`{path}` belongs to no stated trunk, so it holds no adapters of this source",
            hint="begin with adapters that were trained from the same source",
        )


def copy_adapters(path: Path, model: nn.Module, digest: str, report: Reporter) -> str:
    """Copy the adapters that match by published name and shape into the trained part of a model.

    If the file is for a smaller patch, the additional layers of the larger one start as those adapters on a downscaled
    picture: the patch embedding reads means of squares, and new decoder levels pass on their input.

    Args:
        path: adapters that a transfer wrote, of any variant.
        model: model with parameters named `NETWORK.PUBLISHED`.
        digest: digest of the trunk that the adapters must belong to.
        report: gets the number of copied tensors.

    Returns:
        Hex digest of the copied weights.

    Raises:
        ArtifactError: the file is damaged or of another trunk, or no tensor matches.
    """
    adapters = open_weights(path)
    stated = adapters.metadata.get(TRUNK_SHA256)
    if stated != digest:
        raise ArtifactError(
            f"`{path}` belongs to {f'trunk {stated[:16]}' if stated else 'no stated trunk'}, the source has trunk "
            f"{digest[:16]}",
            hint="begin with adapters that were trained from the same source",
        )
    trained = {name.partition(".")[2]: value for name, value in model.named_parameters() if value.requires_grad}
    found = {
        name: tensor
        for name, tensor in adapters.tensors.items()
        if name in trained and tuple(tensor.shape) == tuple(trained[name].shape)
    }
    if not found:
        raise ArtifactError(f"nothing in `{path}` fits this model", hint="leave --init out")
    with torch.no_grad():
        for name, tensor in found.items():
            trained[name].copy_(torch.from_numpy(read_tensor(tensor)))
        for name in trained.keys() - adapters.tensors.keys():
            if name.endswith(".weight") and name.startswith(HEAD_DECODERS):
                _pass_on(trained[name])
        _embed_reduced(adapters, trained)
    report.note(f"{len(found)} of {len(trained)} trained tensors are initialized from `{path}`")
    return weights_digest(adapters.tensors, found)


def _bfloat16(tensor: Tensor) -> NDArray[Any]:
    """A tensor rounded to BF16 as a NumPy array with the bfloat16 dtype of `ml_dtypes`."""
    import ml_dtypes

    return tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)


def _pass_on(weight: Tensor) -> None:
    """Make a decoder's convolution [out,in,3,3] the identity of its first inputs; weights of skip inputs stay random.

    PyTorch's initial values shrink activations by a factor of about 2 per convolution, and a level has two. With them
    in two new levels, 2,400 samples taught no colour, although the initial adapters knew colours.
    """
    identity = nn.init.dirac_(torch.empty_like(weight))
    passed = min(len(weight), weight.shape[1])
    weight[:, :passed] = identity[:, :passed]


def _embed_reduced(adapters: Weights, trained: Mapping[str, Tensor]) -> None:
    """If the patch side is a multiple of the file's, embed a patch as its downscaled picture was embedded."""
    (own,) = (name for name in trained if EMBEDDER.fullmatch(name))
    other = next((name for name in adapters.tensors if EMBEDDER.fullmatch(name)), own)
    weight, found = trained[own], adapters.tensors.get(other)
    bias = trained[own.removesuffix("weight") + "bias"]
    found_bias = adapters.tensors.get(other.removesuffix("weight") + "bias")
    side_px, other_px = (int(name.partition(".")[2].partition("-")[0]) for name in (own, other))
    if other == own or side_px % other_px or found is None or found_bias is None:
        return
    if tuple(found.shape) != (len(weight), 3 * other_px**2) or tuple(found_bias.shape) != tuple(bias.shape):
        return
    factor = side_px // other_px
    smaller = torch.from_numpy(read_tensor(found)).reshape(-1, other_px, other_px, 3)
    larger = smaller.repeat_interleave(factor, 1).repeat_interleave(factor, 2) / factor**2
    weight.copy_(larger.reshape(len(weight), -1))
    bias.copy_(torch.from_numpy(read_tensor(found_bias)))
