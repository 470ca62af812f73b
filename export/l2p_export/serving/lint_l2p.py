"""Holds the models that `l2p-export triton` writes against their bundles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from l2p_export.serving.configs import (
    DIGEST,
    IMAGE_MODELS,
    NETWORK_PREFIX,
    STREAMING,
    WARM_UP_FOLDER,
    Placement,
    image_config,
    network_config,
    plan_file,
    require_client,
    stated,
)
from l2p_export.serving.lint_model import Fault, Model
from l2p_export.serving.repository import BUNDLE, versions
from l2p_runtime.backends import backend_names
from l2p_runtime.bundle import Bundle, open_bundle
from l2p_runtime.coarse import Coarse, check_coarse
from l2p_runtime.contract import ENGINE_BACKENDS, NETWORKS, Manifest, target_from_spelling
from l2p_runtime.errors import L2PError, UsageError
from l2p_runtime.memory import parse_bytes
from l2p_runtime.requests import check_size
from l2p_runtime.serving import Limits, ServiceSpec


def check_image_model(model: Model) -> Iterator[Fault]:
    """Scheduling, parameters, bundle, tensors and warm-up of a model that draws images."""
    name = model.folder.name
    if name not in IMAGE_MODELS or model.backend != "python":
        return
    yield from _scheduling_faults(model)
    parameters = {key: value.string_value for key, value in model.config.parameters.items()}
    try:
        spec = ServiceSpec.from_parameters(parameters)
        if spec.memory_budget:
            parse_bytes(spec.memory_budget)
    except L2PError as error:
        yield "parameters", str(error)
        return
    if spec.backend.replace("_", "-") not in ("auto", *backend_names()):
        yield "parameters", f"say that backend is `{spec.backend}`, expected auto, {', '.join(backend_names())}"
    for number in model.served():
        folder = model.folder / str(number)
        on_server = Path(spec.bundle).is_absolute() and not Path(spec.bundle).exists()
        if on_server or not folder.is_dir():
            continue
        try:
            bundle = open_bundle(folder / spec.bundle)
        except L2PError as error:
            yield f"{number}/bundle", str(error).replace(f"{model.folder.absolute()}/", "")
            continue
        if bundle.digest != spec.bundle_digest:
            yield DIGEST, f"is {spec.bundle_digest[:12]}, the bundle of version {number} is {bundle.digest[:12]}"
        yield from _bundle_faults(model, bundle.manifest, spec, parameters)


def _scheduling_faults(model: Model) -> Iterator[Fault]:
    """What servers take, and no request that a client, the page or the health check sends fits."""
    config, streams = model.config, model.folder.name in STREAMING
    if config.max_batch_size > 0:
        yield "max_batch_size", f"is {config.max_batch_size}, expected 0: requests have no batch axis"
    if config.WhichOneof("scheduling_choice") == "sequence_batching":
        yield "sequence_batching", "is set: every request would need a correlation ID"
    if config.response_cache.enable and not streams:
        yield (
            "response_cache",
            "is enabled: a cache answers health checks and requests for PNG files with what it holds",
        )
    if config.model_transaction_policy.decoupled != streams:
        wanted = "`decoupled: true`" if streams else "no `decoupled: true`"
        yield "model_transaction_policy", f"does not fit the code of `{model.folder.name}`, which needs {wanted}"


def _bundle_faults(
    model: Model, manifest: Manifest, spec: ServiceSpec, parameters: Mapping[str, str]
) -> Iterator[Fault]:
    plans = [plan.name for plan in manifest.plans]
    if spec.plan and spec.plan not in plans:
        yield "parameters", f"say that plan is `{spec.plan}`, the bundle has {', '.join(plans)}"
    elif not any(_has_files(manifest, spec.backend, plan) for plan in ([spec.plan] if spec.plan else plans)):
        yield "parameters", f"say that backend is `{spec.backend}`, for which the bundle has no files"
    for key, value in stated(manifest).items():
        if parameters.get(key) != value:
            yield "parameters", f"say that {key} is {parameters.get(key, 'missing')}, the bundle says {value}"
    yield from _tensor_faults(model.config, image_config(model.folder.name, manifest, spec, Placement(), None))
    for request in model.config.model_warmup:
        if request.batch_size >= 1:
            place = f"model_warmup {request.name}"
            yield from ((place, text) for text in _warm_up_faults(model, request, manifest, spec.limits))


def _has_files(manifest: Manifest, backend: str, plan: str) -> bool:
    """Whether a bundle has all networks of a plan as a backend loads them."""
    backend = backend.replace("_", "-")
    built = {
        (target_from_spelling(record.target).backend, record.network)
        for record in manifest.engines
        if record.plan == plan
    }
    engines = [name for name in ENGINE_BACKENDS if backend in ("auto", name)]
    if any(all((name, network) in built for network in NETWORKS) for name in engines):
        return True
    return backend not in ENGINE_BACKENDS and all(manifest.has_graph(name, plan) for name in NETWORKS)


def _tensor_faults(config: Any, wanted: Any) -> Iterator[Fault]:
    """Tensors that differ from what the code reads and sends.

    Looser dims are taken, and optional inputs that it does not read.
    """
    for what in ("input", "output"):
        tensors = {tensor.name: tensor for tensor in getattr(wanted, what)}
        seen: set[str] = set()
        for tensor in getattr(config, what):
            place, expected = f"{what} {tensor.name}", tensors.get(tensor.name)
            seen.add(tensor.name)
            if expected is None:
                if what == "output" or not tensor.optional:
                    yield place, f"is {_described(tensor)}, the bundle's is none"
            elif tensor.data_type != expected.data_type or not _takes(tensor.dims, expected.dims):
                yield place, f"is {_described(tensor)}, the bundle's is {_described(expected)}"
            elif what == "input" and expected.optional and not tensor.optional:
                yield place, "is not optional, requests leave it out"
        for name in sorted(tensors.keys() - seen):
            yield f"{what} {name}", f"is missing, the bundle's is {_described(tensors[name])}"


def _takes(dims: Sequence[int], wanted: Sequence[int]) -> bool:
    return len(dims) == len(wanted) and all(dim in (-1, size) for dim, size in zip(dims, wanted, strict=True))


def _described(tensor: Any) -> str:
    return f"{require_client().DataType.Name(tensor.data_type)} {list(tensor.dims)}"


def _warm_up_faults(model: Model, request: Any, manifest: Manifest, limits: Limits) -> Iterator[str]:
    """Why the model would refuse its warm-up request."""
    if not {"prompt", "prompt_embeds"} & set(request.inputs):
        yield "sends neither prompt nor prompt_embeds"
    profile = manifest.profiles[0]
    sizes = {"height": profile.height_px.opt, "width": profile.width_px.opt, "steps": manifest.sampling.steps}
    is_coarse = not {"coarse_height", "coarse_width"}.isdisjoint(request.inputs)
    if is_coarse:
        sizes |= {"coarse_height": 0, "coarse_width": 0, "fine_steps": Coarse(1, 1).steps}
    for name in sizes:
        if name in request.inputs:
            value = _warm_up_number(model, request.inputs[name])
            if value is None:
                return
            sizes[name] = value
    height, width, steps = sizes["height"], sizes["width"], sizes["steps"]
    try:
        check_size(manifest.model, height, width)
        if is_coarse:
            check_size(manifest.model, sizes["coarse_height"], sizes["coarse_width"])
            coarse = Coarse(sizes["coarse_height"], sizes["coarse_width"], steps=sizes["fine_steps"])
            check_coarse(coarse, height, width)
            steps += coarse.steps
    except UsageError as error:
        yield f"draws an image that the model refuses: {error}"
        return
    if height * width > limits.pixels:
        yield f"draws {width}x{height}, the limit is {limits.pixels:,} pixels"
    if not 1 <= steps <= limits.steps:
        yield f"draws {steps} steps, expected 1 to {limits.steps}"


def _warm_up_number(model: Model, tensor: Any) -> int | None:
    """The number that a warm-up request sends; None if it cannot be told."""
    match tensor.WhichOneof("input_data_type"):
        case "zero_data":
            return 0
        case "input_data_file":
            path = model.folder / WARM_UP_FOLDER / tensor.input_data_file
            if not path.is_file():
                return None
            with path.open("rb") as file:
                data = file.read(4)
            return int.from_bytes(data, "little", signed=True) if len(data) == 4 else None
        case _:
            return None


def check_network(model: Model) -> Iterator[Fault]:
    """Tensors, profiles and engines of a network, if a bundle beside it tells what they must be."""
    folder, config = model.folder, model.config
    if not folder.name.startswith(NETWORK_PREFIX):
        return
    bundle = _bundle_of(folder.parent, config.parameters[DIGEST].string_value)
    network = folder.name.removeprefix(NETWORK_PREFIX)
    records = [] if bundle is None else [r for r in bundle.manifest.engines if r.network == network]
    records = [r for r in records if target_from_spelling(r.target).backend == "tensorrt"]
    if bundle is None or not records:
        return
    yield from _network_tensor_faults(
        config, network_config(bundle.manifest.network(network), records[:1], Placement())
    )
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


def _network_tensor_faults(config: Any, wanted: Any) -> Iterator[Fault]:
    """Tensors that differ from an engine's; TensorRT takes no looser dims."""
    for what in ("input", "output"):
        found, expected = (
            {tensor.name: _described(tensor) for tensor in getattr(each, what)} for each in (config, wanted)
        )
        for name in sorted(found.keys() | expected.keys()):
            if found.get(name) != expected.get(name):
                yield f"{what} {name}", f"is {found.get(name, 'missing')}, the bundle's is {expected.get(name, 'none')}"


def _bundle_of(root: Path, digest: str) -> Bundle | None:
    for name in IMAGE_MODELS:
        number = max(versions(root / name), default=0)
        try:
            bundle = open_bundle(root / name / str(number) / BUNDLE)
        except L2PError:
            continue
        if bundle.digest == digest:
            return bundle
    return None
