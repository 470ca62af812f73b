"""Reads a bundle's ONNX graphs: its model, and the published names, shapes, values and digests of its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2p_export.families import family_named
from l2p_export.graphs.names import SCALE, published_names
from l2p_export.tensors.sources import CHUNK_BYTES
from l2p_runtime.contract import NETWORKS, Manifest
from l2p_runtime.errors import ArtifactError
from l2p_runtime.tensorfile import open_tensorfile

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from l2p_export.families import Model
    from l2p_runtime.bundle import Bundle
    from l2p_runtime.progress import Reporter
    from l2p_runtime.tensorfile import TensorFile


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a published tensor is in an ONNX graph's weights.

    Attributes:
        stored: name in the file: the published one, or that of a transposed matrix [in, out], which may join several.
        part: index among the tensors that are joined along `out`.
        parts: number of joined tensors.
        is_transposed: whether it is stored transposed.
    """

    stored: str
    part: int
    parts: int
    is_transposed: bool


def float32_plan(bundle: Bundle) -> str:
    """Name of the plan whose ONNX graphs hold all weights in float32, as published.

    Raises:
        ArtifactError: the bundle has no such ONNX graphs.
    """
    name = find_float32_plan(bundle.manifest)
    if name is None:
        raise ArtifactError(
            f"`{bundle.root}` has no fp32 graphs to measure", hint="build it with --precision fp32 in addition"
        )
    return name


def find_float32_plan(manifest: Manifest) -> str | None:
    """Like `float32_plan`, but None if the bundle has no such ONNX graphs."""
    whole = [plan.name for plan in manifest.plans if plan.base == "fp32" and plan.file is None]
    return next((name for name in whole if manifest.has_graph("trunk", name)), None)


def bundle_model(bundle: Bundle, plan: str | None = None) -> Model:
    """The architecture that a bundle was built from, read from the shapes of its weights.

    Args:
        bundle: the bundle.
        plan: the plan whose ONNX graphs are read; shapes are equal in all. The float32 one if None.

    Raises:
        ArtifactError: the family is not known, or the weights are not a model's.
    """
    spec = bundle.manifest.model
    family = family_named(spec.family)
    if family is None:
        raise ArtifactError(f"`{bundle.root}` is of family `{spec.family}`, which this version does not know")
    shapes: dict[str, tuple[int, ...]] = {}
    read = plan if plan is not None else float32_plan(bundle)
    for network in NETWORKS:
        shapes |= published_shapes(bundle.path(bundle.manifest.graph(network, read).weights))
    return family.model(shapes, tuple(range(*spec.trunk_layers)))


def bundle_digests(bundle: Bundle, reporter: Reporter) -> dict[str, str]:
    """Network to the digest of its weights, the same as in builds, from the bundle's float32 ONNX graphs."""
    found = {"trunk": bundle.manifest.checkpoint.trunk_sha256}
    with reporter.task("hashing weights") as advance:
        for name, weights in _stored_weights(bundle, float32_plan(bundle)).items():
            if name != "trunk":
                found[name] = _weights_digest(weights, advance)
    return found


def published_shapes(weights: Path) -> dict[str, tuple[int, ...]]:
    """Published name to shape of every tensor in an ONNX graph's weights; reads only the header."""
    file = open_tensorfile(weights)
    return {name: _shape(file.tensors[place.stored].shape, place) for name, place in published_places(file).items()}


def published_places(file: TensorFile) -> dict[str, StoredTensor]:
    """Published name to place of every tensor in an ONNX graph's weights; FP8 scales have no published name."""
    places = {}
    for stored in (name for name in file.tensors if not name.endswith(SCALE)):
        names = published_names(stored)
        for part, name in enumerate(names):
            places[name] = StoredTensor(stored, part, len(names), is_transposed=name != stored)
    return places


def read_published(file: TensorFile, place: StoredTensor) -> NDArray[Any]:
    """The values of one tensor in its published shape; a view into the mapped file."""
    values = file.read(place.stored)
    if not place.is_transposed:
        return values
    outputs = values.shape[1] // place.parts
    return values[:, place.part * outputs : (place.part + 1) * outputs].T


def _stored_weights(bundle: Bundle, plan: str) -> dict[str, Path]:
    return {network: bundle.path(bundle.manifest.graph(network, plan).weights) for network in NETWORKS}


def _shape(stored: tuple[int, ...], place: StoredTensor) -> tuple[int, ...]:
    return (stored[1] // place.parts, stored[0]) if place.is_transposed else stored


def _weights_digest(path: Path, advance: Callable[[int], None]) -> str:
    """The same digest as `digests.weight_digests` makes: names in sorted order, each with its values as published."""
    import numpy as np

    file = open_tensorfile(path)
    places = published_places(file)
    digest = hashlib.sha256()
    for name in sorted(places):
        digest.update(name.encode() + b"\0")
        flat = np.ascontiguousarray(read_published(file, places[name])).reshape(-1)
        step = CHUNK_BYTES // 4
        for start in range(0, flat.size, step):
            digest.update(flat[start : start + step].data)
        advance(flat.nbytes)
    return digest.hexdigest()
