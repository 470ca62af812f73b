"""Checks a model repository without a server, for what a server would refuse, hang on or ignore silently.

The protobuf parser finds unknown fields and wrong types. It does not find dims of 0, names that differ from folders,
missing files (a Python model without `model.py` makes the server hang for ever), warm-ups that are skipped, or tensors
that are not the bundle's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l2p_export.serving.configs import (
    DIGEST,
    IMAGE_MODELS,
    NETWORK_PREFIX,
    TENSOR_TYPES,
    WARM_UP_FOLDER,
    image_config,
    network_config,
    plan_file,
    require_client,
    stated,
)
from l2p_export.serving.repository import CONFIG, versions
from l2p_runtime.bundle import Bundle, open_bundle
from l2p_runtime.contract import target_from_spelling
from l2p_runtime.errors import L2PError, UsageError, counted
from l2p_runtime.serving import ServiceSpec

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TYPE_BYTES = {"BOOL": 1, "UINT8": 1, "INT8": 1, "UINT16": 2, "INT16": 2, "FP16": 2, "BF16": 2}
_TYPE_BYTES |= {"UINT32": 4, "INT32": 4, "FP32": 4, "UINT64": 8, "INT64": 8, "FP64": 8}


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault: the model, the place in it, and what is wrong."""

    model: str
    place: str
    text: str


def lint_repository(root: Path) -> list[Finding]:
    """Everything wrong with a model repository; empty if a server can start on it.

    Raises:
        UsageError: no folder, or one without models.
        HostError: tritonclient is not installed.
    """
    require_client()
    if not root.is_dir():
        raise UsageError(f"`{root}` is not a folder")
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir())
    if not folders:
        raise UsageError(f"`{root}` holds no model", hint="write one with `l2p-export triton BUNDLE --out REPO`")
    return [Finding(folder.name, place, text) for folder in folders for place, text in _lint_model(folder)]


def _lint_model(folder: Path) -> Iterator[tuple[str, str]]:
    path = folder / CONFIG
    if not path.is_file():
        yield CONFIG, "is missing; the server cannot load the model with --disable-auto-complete-config"
        return
    from google.protobuf import text_format

    try:
        config = text_format.Parse(path.read_text(encoding="utf-8"), require_client().ModelConfig())
    except text_format.ParseError as error:
        yield CONFIG, f"line {error}"
        return
    except (OSError, ValueError) as error:
        yield CONFIG, f"cannot be read: {error}"
        return
    for check in _CHECKS:
        yield from check(folder, config)


def _check_names(folder: Path, config: Any) -> Iterator[tuple[str, str]]:
    if config.name != folder.name:
        yield "name", f"is `{config.name}`, the folder is `{folder.name}`: the server will not find the model"
    if not _NAME.fullmatch(folder.name):
        yield "name", "has characters that do not go into a URL"
    if not config.backend and not config.platform:
        yield "backend", "is missing"
    for what, tensors in (("input", config.input), ("output", config.output)):
        names = [tensor.name for tensor in tensors]
        if not names:
            yield what, "is missing: the model takes or gives nothing"
        for name in {name for name in names if names.count(name) > 1}:
            yield f"{what} {name}", "stands twice"


def _check_shapes(_folder: Path, config: Any) -> Iterator[tuple[str, str]]:
    if config.max_batch_size < 0:
        yield "max_batch_size", f"is {config.max_batch_size}, expected 0 or more"
    for what, tensors in (("input", config.input), ("output", config.output)):
        for tensor in tensors:
            place = f"{what} {tensor.name}"
            if not tensor.name:
                yield place, "has no name"
            if not tensor.data_type:
                yield place, "has no data_type"
            if not tensor.dims:
                yield place, "has no dims"
            if any(dim == 0 or dim < -1 for dim in tensor.dims):
                yield place, f"has dims {list(tensor.dims)}, expected each 1 or more, or -1"


def _check_files(folder: Path, config: Any) -> Iterator[tuple[str, str]]:
    found = versions(folder)
    odd = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name.isdigit())
    for name in odd:
        if name.startswith("0"):
            yield name, "is no version: the server passes over numbers that begin with 0"
    if not found:
        yield "versions", "there is none; at least one folder called 1, 2, ... must be there"
        return
    policy = config.version_policy
    missing = [number for number in policy.specific.versions if number not in found]
    for number in missing:
        yield "version_policy", f"names version {number}, which is not there"
    served = list(policy.specific.versions) or found[-(policy.latest.num_versions or 1) :]
    wanted = _files(config)
    for number in served:
        for name in wanted:
            if number in found and not (folder / str(number) / name).is_file():
                hang = "; the server would wait for it for ever" if name == "model.py" else ""
                yield f"{number}/{name}", f"is missing{hang}"


def _files(config: Any) -> list[str]:
    named = list(config.cc_model_filenames.values()) or [config.default_model_filename]
    if config.backend == "python":
        return ["model.py"] + (["glue.py"] if config.name in IMAGE_MODELS else [])
    if config.platform == "tensorrt_plan" or config.backend == "tensorrt":
        return [name or "model.plan" for name in named]
    if config.backend == "onnxruntime":
        return [config.default_model_filename or "model.onnx"]
    return []


def _check_instances(_folder: Path, config: Any) -> Iterator[tuple[str, str]]:
    for index, group in enumerate(config.instance_group):
        place = f"instance_group[{index}]"
        if group.count < 1:
            yield place, f"has count {group.count}, expected 1 or more"
        if config.platform == "tensorrt_plan" and group.kind == group.KIND_CPU:
            yield place, "is KIND_CPU; TensorRT engines run only on GPUs"
        for profile in group.profile:
            if not profile.isdigit():
                yield place, f'has profile "{profile}", expected a number'


def _check_warm_up(folder: Path, config: Any) -> Iterator[tuple[str, str]]:
    known = {tensor.name: tensor for tensor in config.input}
    for request in config.model_warmup:
        place = f"model_warmup {request.name}"
        if request.batch_size < 1:
            yield place, "has batch_size 0: the server skips it without a word"
        absent = [t.name for t in config.input if not t.optional and t.name not in request.inputs]
        if absent:
            yield place, f"sends no {', '.join(absent)}"
        for name, tensor in request.inputs.items():
            yield from ((place, text) for text in _warm_up_input(folder, known.get(name), name, tensor))


def _warm_up_input(folder: Path, declared: Any, name: str, tensor: Any) -> Iterator[str]:
    if declared is None:
        yield f"sends `{name}`, which is no input"
        return
    if declared.data_type != tensor.data_type:
        yield f"sends `{name}` as another data_type than the input's"
    dims = list(declared.dims)
    if len(dims) != len(tensor.dims) or any(d not in (-1, t) for d, t in zip(dims, tensor.dims, strict=False)):
        yield f"sends `{name}` as {list(tensor.dims)}, the input is {dims}"
    if tensor.WhichOneof("input_data_type") != "input_data_file":
        return
    path = folder / WARM_UP_FOLDER / tensor.input_data_file
    kind = require_client().DataType.Name(tensor.data_type).removeprefix("TYPE_")
    size = _TYPE_BYTES.get(kind, 0)
    for dim in tensor.dims:
        size *= dim
    if not path.is_file():
        yield f"reads {WARM_UP_FOLDER}/{tensor.input_data_file}, which is missing"
    elif size and path.stat().st_size != size:
        found = counted(path.stat().st_size, "byte")
        yield f"reads {WARM_UP_FOLDER}/{tensor.input_data_file} of {found}, `{name}` takes {size:,}"


def _check_image_model(folder: Path, config: Any) -> Iterator[tuple[str, str]]:
    """Parameters, bundle and tensors of a model that `l2p-export triton` wrote."""
    if folder.name not in IMAGE_MODELS or config.backend != "python":
        return
    parameters = {key: value.string_value for key, value in config.parameters.items()}
    try:
        spec = ServiceSpec.from_parameters(parameters)
    except L2PError as error:
        yield "parameters", str(error)
        return
    number = max(versions(folder), default=0)
    path = folder / str(number) / spec.bundle
    if Path(spec.bundle).is_absolute() and not path.exists():
        return  # a path on the server's machine
    try:
        bundle = open_bundle(path)
    except L2PError as error:
        yield f"{number}/bundle", str(error).replace(f"{folder.absolute()}/", "")
        return
    if bundle.digest != spec.bundle_digest:
        yield DIGEST, f"is {spec.bundle_digest[:12]}, the bundle of version {number} is {bundle.digest[:12]}"
    for key, value in stated(bundle.manifest).items():
        if parameters.get(key) != value:
            yield "parameters", f"say that {key} is {parameters.get(key, 'missing')}, the bundle says {value}"
    yield from _tensors_differ(config, image_config(folder.name, bundle.manifest, spec, _placement(), None))


def _check_network(folder: Path, config: Any) -> Iterator[tuple[str, str]]:
    """Tensors, profiles and engines of a network, if a bundle beside it tells what they must be."""
    if not folder.name.startswith(NETWORK_PREFIX):
        return
    bundle = _bundle_of(folder.parent, config.parameters[DIGEST].string_value)
    network = folder.name.removeprefix(NETWORK_PREFIX)
    records = [] if bundle is None else [r for r in bundle.manifest.engines if r.network == network]
    records = [r for r in records if target_from_spelling(r.target).backend == "tensorrt"]
    if bundle is None or not records:
        return
    yield from _tensors_differ(config, network_config(bundle.manifest.network(network), records[:1], _placement()))
    profiles = min(len(record.profiles) for record in records)
    for group in config.instance_group:
        for profile in group.profile:
            if profile.isdigit() and int(profile) >= profiles:
                yield "instance_group", f"names profile {profile}, the engines have 0 to {profiles - 1}"
    number = max(versions(folder), default=0)
    sizes = {file.path: file.size_bytes for file in bundle.manifest.files}
    for record in records:
        path = folder / str(number) / plan_file(record)
        if path.is_file() and path.stat().st_size not in {
            sizes[r.engine] for r in records if plan_file(r) == path.name
        }:
            yield f"{number}/{path.name}", "is not the bundle's engine: its size differs"


def _bundle_of(root: Path, digest: str) -> Bundle | None:
    for name in IMAGE_MODELS:
        number = max(versions(root / name), default=0)
        try:
            bundle = open_bundle(root / name / str(number) / "bundle")
        except L2PError:
            continue
        if bundle.digest == digest:
            return bundle
    return None


def _tensors_differ(config: Any, wanted: Any) -> Iterator[tuple[str, str]]:
    for what in ("input", "output"):
        found, expected = _described(getattr(config, what)), _described(getattr(wanted, what))
        for name in sorted(found.keys() | expected.keys()):
            if found.get(name) != expected.get(name):
                yield f"{what} {name}", f"is {found.get(name, 'missing')}, the bundle's is {expected.get(name, 'none')}"


def _described(tensors: Any) -> Mapping[str, str]:
    kinds = require_client().DataType
    return {tensor.name: f"{kinds.Name(tensor.data_type)} {list(tensor.dims)}" for tensor in tensors}


def _placement() -> Any:
    from l2p_export.serving.configs import Placement

    return Placement()


_CHECKS: tuple[Callable[[Path, Any], Iterator[tuple[str, str]]], ...] = (
    _check_names,
    _check_shapes,
    _check_files,
    _check_instances,
    _check_warm_up,
    _check_image_model,
    _check_network,
)

__all__ = ["TENSOR_TYPES", "Finding", "lint_repository"]
