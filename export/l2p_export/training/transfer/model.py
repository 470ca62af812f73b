"""Initial pixel model of a transfer, with the source's weights where names and shapes match."""

from __future__ import annotations

import torch
from torch import nn

from l2p_export.families.z_image_l2p.dimensions import (
    Dimensions,
)
from l2p_export.families.z_image_l2p.pixel import PixelModel
from l2p_export.tensors.sources import read_tensor
from l2p_export.training.source.folder import Source
from l2p_export.training.transfer.storage import StoredLinear
from l2p_runtime.errors import ArtifactError


def initial_model(source: Source, d: Dimensions, seed: int, trunk_storage: str = "float32") -> PixelModel:
    """Make a pixel model with the source's weights where name and shape match, else with PyTorch's initial values.

    The trunk takes no gradient. The model is made part by part, so that memory holds the trunk only in its storage
    dtype.

    Raises:
        ArtifactError: the source lacks a tensor that has no initial value.
    """
    with torch.device("meta"):
        model = PixelModel(d)
    model.trunk.requires_grad_(requires_grad=False)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for name in [name for name, _ in model.named_modules()]:
            part = model.get_submodule(name)
            if not dict(part.named_parameters(recurse=False)):
                continue
            part.to_empty(device="cpu", recurse=False)
            is_frozen = name.startswith("trunk.")
            has_initial = False
            if isinstance(part, (nn.Linear, nn.Conv2d)) and not is_frozen:
                part.reset_parameters()
                has_initial = True
            _copy_from_source(source, name.partition(".")[2], part, has_initial=has_initial)
            if is_frozen and isinstance(part, nn.Linear) and trunk_storage != "float32":
                model.set_submodule(name, StoredLinear(part, trunk_storage))
    return model


def _copy_from_source(source: Source, layer: str, part: nn.Module, *, has_initial: bool) -> None:
    for own, parameter in part.named_parameters(recurse=False):
        published = f"{layer}.{own}" if layer else own
        found = source.transformer.tensors.get(published)
        if found is not None and tuple(found.shape) == tuple(parameter.shape):
            parameter.copy_(torch.from_numpy(read_tensor(found)))
        elif not has_initial:
            what = "lacks it" if found is None else f"has it as {list(found.shape)}"
            raise ArtifactError(
                f"the model needs `{published}` {list(parameter.shape)} from the source, which {what}",
                hint="fetch the folder again",
            )
