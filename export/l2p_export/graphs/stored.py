"""Reads a bundle's ONNX graphs back: its model, the published names, shapes and digests of its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from l2p_export.families import family_named
from l2p_export.graphs.names import published_names, published_shapes
from l2p_export.tensors.sources import CHUNK_BYTES
from l2p_runtime.contract import NETWORKS
from l2p_runtime.errors import ArtifactError
from l2p_runtime.tensorfile import open_tensorfile

if TYPE_CHECKING:
    from l2p_export.families import Model
    from l2p_runtime.bundle import Bundle
    from l2p_runtime.progress import Reporter


PLAN = "fp32"
"""The plan whose graphs are run."""


def bundle_model(bundle: Bundle, plan: str = PLAN) -> Model:
    """The architecture that a bundle was built from, by the shapes of its weights.

    Args:
        bundle: the bundle.
        plan: whose ONNX graphs tell; all have the same shapes.

    Raises:
        ArtifactError: no known family, or weights of no model.
    """
    spec = bundle.manifest.model
    family = family_named(spec.family)
    if family is None:
        raise ArtifactError(f"`{bundle.root}` is of family `{spec.family}`, which this version does not know")
    shapes: dict[str, tuple[int, ...]] = {}
    for network in NETWORKS:
        file = open_tensorfile(bundle.path(bundle.manifest.graph(network, plan).weights))
        for stored, info in file.tensors.items():
            shapes |= published_shapes(stored, info.shape)
    return family.model(shapes, tuple(range(*spec.trunk_layers)))


def bundle_digests(bundle: Bundle, reporter: Reporter) -> dict[str, str]:
    """Network to the digest of its weights, as builds know it, from the bundle's float32 graphs."""
    records = {name: bundle.manifest.graph(name, PLAN) for name in NETWORKS}
    found = {"trunk": bundle.manifest.checkpoint.trunk_sha256}
    with reporter.stage("hashing weights") as advance:
        for name, record in records.items():
            if name != "trunk":
                found[name] = _weights_digest(bundle.path(record.weights), advance)
    return found


def _weights_digest(path: Path, advance: Callable[[int], None]) -> str:
    """As `digests.weight_digests` makes it: names in sorted order, each with its values as published."""
    import numpy as np

    file = open_tensorfile(path)
    places = {
        part: (stored, index, len(published_names(stored)))
        for stored in file.tensors
        for index, part in enumerate(published_names(stored))
    }
    digest = hashlib.sha256()
    for name in sorted(places):
        stored, index, parts = places[name]
        values = file.read(stored)
        digest.update(name.encode() + b"\0")
        if stored != name:
            values = np.split(values, parts, axis=1)[index].T
        flat = np.ascontiguousarray(values).reshape(-1)
        step = CHUNK_BYTES // 4
        for start in range(0, flat.size, step):
            digest.update(flat[start : start + step].data)
        advance(flat.nbytes)
    return digest.hexdigest()
