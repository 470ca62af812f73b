"""Settings of a `config.pbtxt` that parse and that a server refuses or skips."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

from l2p_export.serving.configs import IMAGE_MODELS, WARM_UP_FOLDER, require_client
from l2p_export.serving.lint_model import DEFAULT_FILES, PLATFORMS, Fault, Model
from l2p_runtime.errors import counted

_BACKENDS = (*DEFAULT_FILES, "dali", "fil", "identity", "openvino", "repeat", "square", "tensorrtllm", "vllm")
_TYPE_BYTES = {"BOOL": 1, "UINT8": 1, "INT8": 1, "UINT16": 2, "INT16": 2, "FP16": 2, "BF16": 2}
_TYPE_BYTES |= {"UINT32": 4, "INT32": 4, "FP32": 4, "UINT64": 8, "INT64": 8, "FP64": 8}
_MODEL_FOLDER = "$$TRITON_MODEL_DIRECTORY"


def check_backend(model: Model) -> Iterator[Fault]:
    """A backend or platform that no server has."""
    config, backend = model.config, model.backend
    if config.platform and not config.backend and config.platform not in PLATFORMS:
        yield "platform", f"is `{config.platform}`, expected one of {', '.join(PLATFORMS)}, or a `backend`"
    elif not backend:
        yield "backend", "is missing, and no file of a version tells it"
    elif model.folder.name in IMAGE_MODELS and backend != "python":
        yield "backend", f"is `{backend}`, expected `python`"
    elif backend not in _BACKENDS and (near := difflib.get_close_matches(backend.lower(), _BACKENDS, n=1, cutoff=0.8)):
        # A server may have backends of its own, so a name is refused only where it looks misspelt.
        yield "backend", f"is `{backend}`, which servers do not have; did you mean `{near[0]}`?"
    if backend == "python" and config.runtime not in ("", "libtriton_python.so"):
        yield "runtime", f"is `{config.runtime}`, expected libtriton_python.so"
    is_ensemble = backend == "ensemble" and not config.backend
    if is_ensemble != (config.WhichOneof("scheduling_choice") == "ensemble_scheduling"):
        text = "is missing" if is_ensemble else f"is set, and the backend is `{backend}`"
        yield "ensemble_scheduling", text


def check_tensors(model: Model) -> Iterator[Fault]:
    """Inputs and outputs that are described incompletely, or in a way that the backend does not take."""
    config = model.config
    if config.max_batch_size < 0:
        yield "max_batch_size", f"is {config.max_batch_size}, expected 0 or more"
    for what, tensors in (("input", config.input), ("output", config.output)):
        for tensor in tensors:
            place = f"{what} {tensor.name}"
            if not tensor.name:
                yield place, "has no name"
            if not tensor.data_type:
                yield place, "has no data_type"
            yield from ((place, text) for text in _shape_faults(model, tensor))
    for tensor in config.input:
        if tensor.format and len(tensor.dims) != 3:
            yield f"input {tensor.name}", f"has format and {counted(len(tensor.dims), 'dim')}, expected 3"
    for tensor in config.output:
        if tensor.label_filename and not (model.folder / tensor.label_filename).is_file():
            yield f"output {tensor.name}", f"names the label file `{tensor.label_filename}`, which is missing"


def _shape_faults(model: Model, tensor: Any) -> Iterator[str]:
    dims, reshaped = list(tensor.dims), list(tensor.reshape.shape)
    if not dims:
        yield "has no dims"
    if any(dim == 0 or dim < -1 for dim in dims):
        yield f"has dims {dims}, expected each 1 or more, or -1"
    elif tensor.HasField("reshape") and (_values(dims) != _values(reshaped) or dims.count(-1) != reshaped.count(-1)):
        yield f"has dims {dims} and reshape {reshaped}, which hold different numbers of values"
    for field in ("is_shape_tensor", "is_non_linear_format_io"):
        if getattr(tensor, field) and model.backend != "tensorrt":
            yield f"has {field}, which only TensorRT models have"


def _values(dims: list[int]) -> int:
    """Values of the fixed dims of a tensor."""
    count = 1
    for dim in dims:
        count *= 1 if dim == -1 else dim
    return count


def check_instances(model: Model) -> Iterator[Fault]:
    """Instance groups that do not fit the backend; a server takes a count below 1, or none, for the default."""
    for index, group in enumerate(model.config.instance_group):
        place = f"instance_group[{index}]"
        if model.backend == "tensorrt" and group.kind == group.KIND_CPU:
            yield place, "is KIND_CPU; TensorRT engines run only on GPUs"
        if group.gpus and group.kind in (group.KIND_CPU, group.KIND_MODEL):
            yield place, f"has gpus {list(group.gpus)}, expected none for a group that is not KIND_GPU"
        if any(gpu < 0 for gpu in group.gpus):
            yield place, f"has gpus {list(group.gpus)}, expected numbers from 0"
        if group.profile and model.backend != "tensorrt":
            yield place, "has a profile, which only TensorRT models have"
        for profile in group.profile:
            if not (profile.isascii() and profile.isdigit()):
                yield place, f'has profile "{profile}", expected a number'
        if group.passive and all(each.passive for each in model.config.instance_group):
            yield place, "is passive: the server would wait for an instance for ever"


def check_batching(model: Model) -> Iterator[Fault]:
    """Batching, priorities and a cache that contradict the rest of the configuration."""
    config, batching = model.config, model.config.dynamic_batching
    if config.response_cache.enable and config.model_transaction_policy.decoupled:
        yield "response_cache", "is enabled for a decoupled model, which a server cannot cache"
    for size in batching.preferred_batch_size:
        if not 1 <= size <= config.max_batch_size:
            yield "dynamic_batching", f"has preferred_batch_size {size}, expected 1 to max_batch_size"
    levels = batching.priority_levels
    if not levels:
        return
    if not 1 <= batching.default_priority_level <= levels:
        yield (
            "dynamic_batching",
            f"has default_priority_level {batching.default_priority_level}, expected 1 to {levels}",
        )
    for level in batching.priority_queue_policy:
        if not 1 <= level <= levels:
            yield "dynamic_batching", f"has a priority_queue_policy for level {level}, expected 1 to {levels}"
    if batching.preserve_ordering and levels > 1:
        yield "dynamic_batching", f"has preserve_ordering and {levels} priority_levels, expected one level"


def check_parameters(model: Model) -> Iterator[Fault]:
    """Parameters of the Python backend."""
    if model.backend != "python":
        return
    parameters = {key: value.string_value for key, value in model.config.parameters.items()}
    forced = parameters.get("FORCE_CPU_ONLY_INPUT_TENSORS", "no")
    if forced not in ("yes", "no"):
        yield "parameters", f"say that FORCE_CPU_ONLY_INPUT_TENSORS is {forced!r}, expected `yes` or `no`"
    environment = parameters.get("EXECUTION_ENV_PATH", "")
    if environment.startswith(_MODEL_FOLDER):  # any other path is one of the server's machine
        path = model.folder / environment.removeprefix(_MODEL_FOLDER).lstrip("/")
        if not path.exists():
            yield "parameters", f"say that EXECUTION_ENV_PATH is `{environment}`, which is missing"


def check_warm_up(model: Model) -> Iterator[Fault]:
    """Warm-up requests that a server skips or that fail the load."""
    known = {tensor.name: tensor for tensor in model.config.input}
    required = [tensor for tensor in model.config.input if not tensor.optional]
    for request in model.config.model_warmup:
        place = f"model_warmup {request.name}"
        if request.batch_size < 1:
            yield place, "has batch_size 0: the server skips it without a word"
            continue
        if request.batch_size > max(1, model.config.max_batch_size):
            yield place, f"has batch_size {request.batch_size}, expected up to {max(1, model.config.max_batch_size)}"
        absent = [tensor.name for tensor in required if tensor.name not in request.inputs]
        if len(request.inputs) < len(required):  # a server counts them
            yield place, f"sends no {', '.join(absent)}"
        for name, tensor in request.inputs.items():
            yield from ((place, text) for text in _warm_up_input(model, known.get(name), name, tensor))


def _warm_up_input(model: Model, declared: Any, name: str, tensor: Any) -> Iterator[str]:
    if declared is None:
        yield f"sends `{name}`, which is no input"
        return
    if declared.data_type != tensor.data_type:
        yield f"sends `{name}` as another data_type than the input's"
    dims = list(declared.dims)
    if len(dims) != len(tensor.dims) or any(d not in (-1, t) for d, t in zip(dims, tensor.dims, strict=False)):
        yield f"sends `{name}` as {list(tensor.dims)}, the input is {dims}"
    if any(dim < 0 for dim in tensor.dims):
        yield f"sends `{name}` as {list(tensor.dims)}, expected sizes"
        return
    if (source := tensor.WhichOneof("input_data_type")) is None:
        yield f"sends `{name}` without data: expected zero_data, random_data or input_data_file"
    if source != "input_data_file":
        return
    path = model.folder / WARM_UP_FOLDER / tensor.input_data_file
    kind = require_client().DataType.Name(tensor.data_type).removeprefix("TYPE_")
    size = _TYPE_BYTES.get(kind, 0) * _values(list(tensor.dims))
    if not path.is_file():
        yield f"reads {WARM_UP_FOLDER}/{tensor.input_data_file}, which is missing"
    elif size and path.stat().st_size < size:
        found = counted(path.stat().st_size, "byte")
        yield f"reads {WARM_UP_FOLDER}/{tensor.input_data_file} of {found}, `{name}` takes {size:,}"
