"""Loads a checkpoint for a build: opens it, completes it from its source, merges LoRAs, and checks names and shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from l2p_export.checkpoint.lora import Lora, LoraRequest, merge_loras, open_lora
from l2p_export.checkpoint.overlay import overlay
from l2p_export.families import Family, Model, family_of
from l2p_export.families.company import grouped
from l2p_export.tensors.checkpoint import Checkpoint, fingerprint
from l2p_export.tensors.digests import weights_digest
from l2p_export.tensors.files import open_weights
from l2p_export.tensors.metadata import TRUNK_SHA256, is_trained, licence
from l2p_export.tensors.sources import TensorSource
from l2p_runtime.contract import CheckpointRecord
from l2p_runtime.errors import ArtifactError, counted


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A complete checkpoint of correct shapes, with its family and dimensions; its weights are still in their files.

    Attributes:
        source: the latent checkpoint that completes it and that it was compared with, if any.
        equal_layers: numbers of the main layers that equal the source's.
        loras: the LoRAs that were merged into it.
        files: every file that its values are read from.
    """

    family: Family
    checkpoint: Checkpoint
    model: Model
    source: Path | None = None
    equal_layers: tuple[int, ...] = ()
    loras: tuple[Lora, ...] = ()
    files: tuple[Path, ...] = ()


def load_model(path: Path, source: Path | None = None, loras: Sequence[LoraRequest] = ()) -> LoadedModel:
    """Open a checkpoint, complete it from its source, merge LoRAs, and check every name and shape.

    Reads only headers, except for layers that are compared with a source's.

    Args:
        path: file or folder; with a source it may hold only adapters.
        source: latent checkpoint, as file, model folder or diffusers pipeline folder.
        loras: to merge, in FP32.

    Raises:
        ArtifactError: the file is absent, damaged or of no known family; tensors are missing, unknown or misshapen; it
            was made from another source; or a LoRA does not fit.
    """
    weights = open_weights(path)
    family = family_of(weights)
    checkpoint = family.read(weights)
    equal: tuple[int, ...] | None = None
    files = {tensor.file.path for tensor in weights.tensors.values()} | {request.path for request in loras}
    own = checkpoint.tensors
    if source is not None:
        latent = open_weights(source)
        files |= {tensor.file.path for tensor in latent.tensors.values()}
        completed = overlay(checkpoint, family.read(latent), family)
        checkpoint, equal = completed.checkpoint, completed.equal_layers
    model = family.model(checkpoint.shapes, equal)
    # What a source has besides the model's layers is no fault of the adapters.
    used = {name: tensor for name, tensor in checkpoint.tensors.items() if name in own or name in model.shapes}
    checkpoint = replace(checkpoint, tensors=used)
    _require_fit(family, model, checkpoint, own, source)
    merged = _merge(family, checkpoint, loras)
    loaded = LoadedModel(family, checkpoint, model, source, equal or (), merged, tuple(sorted(files)))
    if not merged:
        return loaded
    return replace(loaded, checkpoint=replace(checkpoint, tensors=merge_loras(checkpoint.tensors, merged)))


def checkpoint_record(loaded: LoadedModel, trunk_sha256: str | None = None) -> CheckpointRecord:
    """Describe a checkpoint for the manifest; reads the trunk's values for their digest, unless it is given."""
    checkpoint, mark = loaded.checkpoint, fingerprint(loaded.checkpoint.shapes)
    return CheckpointRecord(
        name=_text(checkpoint.path.name),
        fingerprint=mark,
        known_as=loaded.family.known_as(mark),
        tensors=len(checkpoint.tensors),
        parameters=checkpoint.parameters,
        trunk_sha256=trunk_digest(loaded) if trunk_sha256 is None else trunk_sha256,
        trained=is_trained(checkpoint.metadata),
        licence=licence(checkpoint.metadata),
        source=_text(loaded.source.name) if loaded.source else "",
        loras=tuple(f"{_text(lora.path.name)}:{lora.strength:g}" for lora in loaded.loras),
    )


def trunk_digest(loaded: LoadedModel) -> str:
    """The digest that names a trunk (docs/design.md, "Trunk digest"); reads the trunk's values.

    Raises:
        ArtifactError: the checkpoint says that it was trained on another trunk.
    """
    digest = weights_digest(loaded.checkpoint.tensors, loaded.model.network_shapes("trunk"))
    require_own_trunk(loaded, digest)
    return digest


def require_own_trunk(loaded: LoadedModel, digest: str) -> None:
    """Refuse adapters that were trained on another trunk than the one they were given.

    Raises:
        ArtifactError: the checkpoint states another digest.
    """
    checkpoint = loaded.checkpoint
    stated = checkpoint.metadata.get(TRUNK_SHA256, digest)
    # A LoRA may change the trunk, and a source may shorten it. The stated digest is then that of another trunk.
    if stated != digest and not loaded.loras and loaded.model.spec == loaded.family.model(checkpoint.shapes).spec:
        raise ArtifactError(
            f"`{checkpoint.path}` belongs to trunk {stated[:16]}, the layers it was given make trunk {digest[:16]}",
            hint="give the source that the adapters were trained from",
        )


def company_note(checkpoint: Checkpoint) -> str:
    """One line on the tensors of other models in a checkpoint's file, which are passed over; empty without any."""
    if not checkpoint.company:
        return ""
    return f"passed over what is no part of the transformer: {', '.join(grouped(checkpoint.company))}"


def missing_layers(family: Family, checkpoint: Checkpoint) -> list[int]:
    """Numbers of the main layers that a file lacks below its last one; empty for a file without any main layer."""
    indices = {index for index in map(family.main_layer, checkpoint.tensors) if index is not None}
    return sorted(set(range(max(indices, default=0))) - indices)


def _text(name: str) -> str:
    """A file name is bytes; those that are not UTF-8 are replaced, since the manifest cannot hold them."""
    return name.encode(errors="replace").decode()


def _require_fit(
    family: Family, model: Model, checkpoint: Checkpoint, own: Mapping[str, TensorSource], source: Path | None
) -> None:
    """Refuse missing, unknown and misshapen tensors; those of the source are told as the source's."""
    faults = model.faults(checkpoint.shapes)
    if not faults:
        return
    missing, trunk = missing_layers(family, checkpoint), checkpoint.metadata.get(TRUNK_SHA256)
    if source is None and missing and trunk:
        raise ArtifactError(
            f"`{checkpoint.path}` lacks layers {missing[0]} to {missing[-1]}, those of trunk {trunk[:16]}",
            hint="give the source that the adapters were trained from: --source DIR",
        )
    foreign = {
        name: shape for name, shape in checkpoint.shapes.items() if name not in own and shape != model.shapes[name]
    }
    if foreign:
        name, shape = next(iter(sorted(foreign.items())))
        raise ArtifactError(
            f"the source `{source}` does not fit `{checkpoint.path}`: {counted(len(foreign), 'tensor')} of other "
            f"shapes, `{name}` {list(shape)} first, expected {list(model.shapes[name])}",
            hint="give the source that the adapters were trained from",
        )
    strange = model.shapes.keys() ^ checkpoint.shapes.keys()
    lacks_layers = source is None and any(family.main_layer(name) is not None for name in strange)
    faults += [f"unknown {names}" for names in grouped(checkpoint.company)]
    raise ArtifactError(
        f"`{checkpoint.path}` does not fit a {model.spec.variant} model of {model.spec.layers} layers: "
        + "; ".join(faults),
        hint="if the file holds only adapters, give the source that they were trained from: --source DIR"
        if lacks_layers
        else "download it again, or check which tool wrote it",
    )


def _merge(family: Family, checkpoint: Checkpoint, loras: Sequence[LoraRequest]) -> tuple[Lora, ...]:
    if not loras:
        return ()
    shapes = checkpoint.shapes
    aliases, replaced = family.aliases(shapes), family.replaced_layers(shapes)
    return tuple(open_lora(request, shapes, aliases, replaced) for request in loras)
