"""Completes adapters from their source: the latent model has the frozen layers, the adapter file all trained ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from l2p_export.tensors.sources import TensorSource, read_tensor
from l2p_runtime.errors import ArtifactError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from l2p_export.families.base import Family
    from l2p_export.tensors.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class Overlay:
    """A checkpoint completed from its source, and the layers in which the two are equal."""

    checkpoint: Checkpoint
    equal_layers: tuple[int, ...]


def overlay(checkpoint: Checkpoint, source: Checkpoint, family: Family) -> Overlay:
    """Take missing tensors from the source, and find the main layers in which both are equal.

    Layers are compared by value, rounded to BF16, because published files keep the source's F32 in some layers only.

    Raises:
        ArtifactError: a tensor that both have differs in shape, or no main layer is equal: another source.
    """
    shared = {name: tensor for name, tensor in source.tensors.items() if family.is_shared(name)}
    for name in sorted(shared.keys() & checkpoint.tensors.keys()):
        if tuple(shared[name].shape) != tuple(checkpoint.tensors[name].shape):
            raise ArtifactError(
                f"`{name}` has shape {list(checkpoint.tensors[name].shape)} in `{checkpoint.path}` "
                f"and {list(shared[name].shape)} in `{source.path}`",
                hint="the checkpoint was made from another source",
            )
    tensors = {**shared, **checkpoint.tensors}
    layers: dict[int, list[str]] = {}
    for name in tensors:
        index = family.main_layer(name)
        if index is not None:
            layers.setdefault(index, []).append(name)
    equal = tuple(index for index, names in sorted(layers.items()) if _are_equal(names, tensors, shared))
    if not equal:
        raise ArtifactError(
            f"no main layer of `{checkpoint.path}` equals that of `{source.path}`",
            hint="the checkpoint was made from another source; leave --source out if it is complete",
        )
    return Overlay(replace(checkpoint, tensors=tensors), equal)


def _are_equal(names: Sequence[str], tensors: Mapping[str, TensorSource], source: Mapping[str, TensorSource]) -> bool:
    return all(name in source and _equal(tensors[name], source[name]) for name in names)


def _equal(first: TensorSource, second: TensorSource) -> bool:
    import ml_dtypes
    import numpy as np

    if first is second:
        return True
    # Chunks differ in length between dtypes; the largest tensor of a layer takes 157 MB as float32.
    rounded = [read_tensor(tensor).astype(ml_dtypes.bfloat16).view(np.uint16) for tensor in (first, second)]
    return np.array_equal(rounded[0], rounded[1])
