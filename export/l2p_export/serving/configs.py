"""Model configurations as Triton's own protobuf messages; no text is written by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from l2p_runtime.contract import DType, EngineRecord, Manifest, NetworkSpec, split_dim, target_from_spelling
from l2p_runtime.errors import HostError, UsageError
from l2p_runtime.requests import longest_px
from l2p_runtime.serving import ServiceSpec

Kind = Literal["auto", "cpu", "gpu"]
_Input: TypeAlias = tuple[str, str, tuple[int, ...], bool]
"""Name, type, dims and whether it may be left out."""

IMAGE_MODELS = ("l2p", "l2p_stream", "l2p_embeddings")
STREAMING = ("l2p_stream",)
NETWORK_PREFIX = "l2p_network_"
DIGEST, PRODUCER = "bundle_digest", "l2p_producer"

WARM_UP_FOLDER = "warmup"
WARM_UP_STEPS = 1

TENSOR_TYPES: Mapping[DType, str] = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "uint8": "TYPE_UINT8",
    "uint16": "TYPE_UINT16",
    "int64": "TYPE_INT64",
    "bool": "TYPE_BOOL",
}

_SETTINGS: Mapping[str, tuple[str, tuple[int, ...]]] = {
    "height": ("TYPE_INT32", (1,)),
    "width": ("TYPE_INT32", (1,)),
    "seed": ("TYPE_UINT64", (1,)),
    "steps": ("TYPE_INT32", (1,)),
    "guidance": ("TYPE_FP32", (1,)),
    # UTF-8 bytes: a text would end the process of a Python backend that cannot read texts.
    "positions": ("TYPE_UINT8", (-1,)),
    "base_grid": ("TYPE_INT32", (2,)),
    "coarse_height": ("TYPE_INT32", (1,)),
    "coarse_width": ("TYPE_INT32", (1,)),
    # Sigmas are computed from it in float64.
    "renoise": ("TYPE_FP64", (1,)),
    "fine_steps": ("TYPE_INT32", (1,)),
    "fine_guidance": ("TYPE_FP32", (1,)),
}
"""Optional inputs of every model that draws images, with type and dims."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a model runs and how many requests wait for it.

    Attributes:
        kind: `auto` is a GPU if the server sees one.
        instances: number of processes of the model, per GPU.
        queue_size: maximum requests that wait; further ones are refused at once.
        queue_seconds: maximum seconds that a request waits.
    """

    kind: Kind = "auto"
    instances: int = 1
    queue_size: int = 64
    queue_seconds: float = 600.0

    def __post_init__(self) -> None:
        if not 1 <= self.instances <= 64:
            raise UsageError(f"instances is {self.instances}, expected 1 to 64")
        if not 1 <= self.queue_size <= 100_000:
            raise UsageError(f"queue size is {self.queue_size}, expected 1 to 100000")
        if not 0 < self.queue_seconds <= 86_400:
            raise UsageError(f"queue time-out is {self.queue_seconds} s, expected more than 0 and at most 86400")


@dataclass(frozen=True, slots=True)
class WarmUp:
    """The size of the image that an instance draws before it is ready."""

    height: int
    width: int


def image_config(name: str, manifest: Manifest, spec: ServiceSpec, placement: Placement, warm_up: WarmUp | None) -> Any:
    """The configuration of a model that draws images.

    Args:
        name: one of `IMAGE_MODELS`.
        manifest: manifest of the bundle.
        spec: settings of its service.
        placement: where it runs, and its queue.
        warm_up: size of the image that it draws while it is loaded; None for no image.

    Raises:
        HostError: tritonclient is not installed.
    """
    config = _new(name)
    config.backend = "python"
    for tensor, kind, dims, optional in _inputs(name, manifest):
        config.input.add(name=tensor, data_type=_type(kind), dims=dims, optional=optional)
    pixels = "TYPE_UINT8" if spec.dtype == "uint8" else "TYPE_FP16"
    outputs = [("image", pixels, (-1, -1, 3)), ("image_png", "TYPE_STRING", (1,)), ("report", "TYPE_UINT8", (-1,))]
    if name in STREAMING:
        outputs += [("preview", "TYPE_UINT8", (-1, -1, 3)), ("preview_png", "TYPE_STRING", (1,))]
        outputs += [("step", "TYPE_INT32", (2,))]
        config.model_transaction_policy.decoupled = True
    for tensor, kind, dims in outputs:
        config.output.add(name=tensor, data_type=_type(kind), dims=dims)
    _place(config, placement)
    policy = config.dynamic_batching.default_queue_policy
    policy.max_queue_size = placement.queue_size
    policy.default_timeout_microseconds = round(placement.queue_seconds * 1e6)
    policy.allow_timeout_override = True
    # A health request goes first, so that it waits for the image being drawn and not for those behind it.
    config.dynamic_batching.priority_levels = 2
    config.dynamic_batching.default_priority_level = 2
    config.version_policy.latest.num_versions = 1
    for key, value in {**spec.to_parameters(), **stated(manifest), PRODUCER: manifest.producer}.items():
        config.parameters[key].string_value = value
    if warm_up is not None:
        _warm(config, name, manifest)
    return config


def stated(manifest: Manifest) -> dict[str, str]:
    """Parameters for callers: possible image sizes, and the defaults of optional inputs."""
    model, profile, sampling = manifest.model, manifest.profiles[0], manifest.sampling
    return {
        "size_multiple_px": str(model.size_multiple_px),
        "size_max_px": str(longest_px(model)),
        "default_height": str(profile.height_px.opt),
        "default_width": str(profile.width_px.opt),
        "default_steps": str(sampling.steps),
        "default_guidance": str(sampling.guidance),
        "trained": str(manifest.checkpoint.trained).lower(),
    }


def warm_up_files(warm_up: WarmUp) -> dict[str, bytes]:
    """File name to raw little-endian bytes of the inputs of a warm-up request."""
    import numpy as np

    numbers = {"height": warm_up.height, "width": warm_up.width, "steps": WARM_UP_STEPS}
    files = {name: np.array([value], "<i4").tobytes() for name, value in numbers.items()}
    return files | {"guidance": np.array([1.0], "<f4").tobytes()}


def network_config(network: NetworkSpec, records: Sequence[EngineRecord], placement: Placement) -> Any:
    """The configuration of one network as TensorRT engines, one for each compute capability.

    Args:
        network: inputs and outputs of the network.
        records: its engines, all of one plan and library version, with equal profiles.
        placement: instances and queue; it runs only on GPUs.

    Raises:
        HostError: tritonclient is not installed.
    """
    config = _new(f"{NETWORK_PREFIX}{network.name}")
    config.platform = "tensorrt_plan"
    config.backend = "tensorrt"
    for tensors, added in ((network.inputs, config.input), (network.outputs, config.output)):
        for tensor in tensors:
            dims = [factor if not symbol else -1 for factor, symbol in map(split_dim, tensor.shape)]
            added.add(name=tensor.name, data_type=_type(TENSOR_TYPES[tensor.dtype]), dims=dims)
    for record in records:
        config.cc_model_filenames[compute_capability(record)] = plan_file(record)
    config.default_model_filename = plan_file(records[0])
    profiles = [str(index) for index in range(len(records[0].profiles))]
    group = config.instance_group.add(count=placement.instances, profile=profiles)
    group.kind = group.KIND_GPU
    # If profiles of 1K and 8K images share an engine, a context takes only the memory of the profile in use.
    strategy = "ON_PROFILE_CHANGE" if len(profiles) > 1 else "STATIC"
    config.parameters["execution_context_allocation_strategy"].string_value = strategy
    config.version_policy.latest.num_versions = 1
    return config


def plan_file(record: EngineRecord) -> str:
    """The name of an engine's file in a version folder."""
    return f"model_{target_from_spelling(record.target).compute_capability}.plan"


def compute_capability(record: EngineRecord) -> str:
    """The compute capability as Triton spells it: `8.9`, `12.0`."""
    digits = target_from_spelling(record.target).compute_capability.removeprefix("sm")
    return f"{digits[:-1]}.{digits[-1]}"


def config_text(config: Any) -> str:
    """A configuration as `config.pbtxt` holds it."""
    from google.protobuf import text_format

    return str(text_format.MessageToString(config))


def require_client() -> Any:
    """The module of Triton's configuration messages.

    Raises:
        HostError: tritonclient is not installed.
    """
    try:
        from tritonclient.grpc import model_config_pb2
    except ImportError as error:
        raise HostError(
            f"model repositories need `tritonclient`, which cannot be imported: {error}",
            hint="pip install 'l2p-export[triton]'",
        ) from error
    return model_config_pb2


def _new(name: str) -> Any:
    config = require_client().ModelConfig()
    config.name = name
    # Images of different sizes cannot share a batch, and a call of the runtime draws one.
    config.max_batch_size = 0
    return config


def _type(name: str) -> int:
    return int(require_client().DataType.Value(name))


def _inputs(name: str, manifest: Manifest) -> list[_Input]:
    width = manifest.model.caption_width
    text: list[_Input] = [("prompt", "TYPE_STRING", (1,), False), ("negative_prompt", "TYPE_STRING", (1,), True)]
    embeds: list[_Input] = [
        ("prompt_embeds", "TYPE_FP32", (-1, width), False),
        ("negative_embeds", "TYPE_FP32", (-1, width), True),
    ]
    if name == "l2p":
        first = text
    elif name == "l2p_embeddings":
        first = embeds
    else:
        either = (*text, *embeds) if manifest.text is not None else embeds
        first = [(tensor, kind, dims, True) for tensor, kind, dims, _ in either]
    return [*first, *((tensor, kind, dims, True) for tensor, (kind, dims) in _SETTINGS.items())]


def _place(config: Any, placement: Placement) -> None:
    group = config.instance_group.add(count=placement.instances)
    group.kind = {"auto": group.KIND_AUTO, "cpu": group.KIND_CPU, "gpu": group.KIND_GPU}[placement.kind]


def _warm(config: Any, name: str, manifest: Manifest) -> None:
    # A batch size of 0, the default, makes the server skip the warm-up silently.
    request = config.model_warmup.add(name="least_image", batch_size=1)
    reads_text = name != "l2p_embeddings" and manifest.text is not None
    caption = request.inputs["prompt" if reads_text else "prompt_embeds"]
    caption.data_type = _type("TYPE_STRING" if reads_text else "TYPE_FP32")
    caption.dims.extend([1] if reads_text else [1, manifest.model.caption_width])
    caption.zero_data = True
    for file, kind in (("height", "INT32"), ("width", "INT32"), ("steps", "INT32"), ("guidance", "FP32")):
        tensor = request.inputs[file]
        tensor.data_type = _type(f"TYPE_{kind}")
        tensor.dims.append(1)
        tensor.input_data_file = file
