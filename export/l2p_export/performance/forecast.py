"""Forecast of a build and its images for `plan`, from headers and profiles; nothing is built or run."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from l2p_engines.forecast.calls import (
    PRECISIONS,
    CallSize,
    Flops,
    HostNeeds,
    NetworkCosts,
    Tokens,
    border_bytes,
    count_tokens,
    engine_memory,
    forward_flops,
    host_needs,
    largest_tensor_bytes,
    total_flops,
    weight_bytes,
)
from l2p_engines.forecast.cards import Card
from l2p_engines.forecast.fitting import (
    CARD_RESERVE_BYTES,
    STEP_NETWORKS,
    Bound,
    Fit,
    Setting,
    find_settings,
    fit_call,
    smaller_calls,
    step_bounds,
)
from l2p_engines.profiles import load_profile
from l2p_export.checkpoint.loading import load_model
from l2p_export.families import Model, known_as, published_model
from l2p_export.families.costs import network_costs
from l2p_export.families.qwen3 import open_text_encoder
from l2p_export.proof.reference import reference_bytes
from l2p_export.tensors.checkpoint import fingerprint
from l2p_export.tensors.metadata import sampling_defaults
from l2p_runtime.contract import TEXT_ENCODER, ModelSpec, Profile, Sampling
from l2p_runtime.errors import UsageError
from l2p_runtime.memory import CallMemory, cpu_call_memory
from l2p_runtime.requests import check_size

CPU_PRECISIONS = ("fp32", "fp16")
"""Precisions that ONNX Runtime runs on the CPU, where it has no BF16 or FP8 matrix products."""


@dataclass(frozen=True, slots=True)
class Subject:
    """The model of a forecast: a checkpoint's, or a published one from its known shapes.

    Attributes:
        checkpoint: the file; empty if none was given.
        known_as: the published checkpoint with the same shapes; empty if there is none.
        costs: network to its tensors and operations, the text encoder included.
        reference_bytes: host memory for running the model in torch, one block at a time.
    """

    checkpoint: str
    known_as: str
    spec: ModelSpec
    sampling: Sampling
    profiles: tuple[Profile, ...]
    costs: NetworkCosts
    reference_bytes: int


@dataclass(frozen=True, slots=True)
class NetworkWeights:
    """One network's tensors, values, and bytes by precision."""

    tensors: int
    parameters: int
    bytes: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class CallForecast:
    """One denoising call.

    Attributes:
        in_profile: whether an engine of one of the profiles takes the image size.
        flops: operations of one forward, by network.
        total_flops: operations of one forward and one run of the caption network, which runs once per prompt; without
            the text encoder.
        memory: memory in addition to weights, by precision.
    """

    call: CallSize
    in_profile: bool
    tokens: Tokens
    flops: Mapping[str, Flops]
    total: Flops
    total_flops: int
    memory: Mapping[str, CallMemory]


@dataclass(frozen=True, slots=True)
class BuildForecast:
    """The needs of a build, and the free memory and disk of this machine.

    Attributes:
        each: needs of a build with only one precision, by precision.
        together: needs of one build with all precisions.
        reference_bytes: host memory beyond the exporter's own, to compare ONNX graphs with torch. A build without it
            leaves the comparison out and says so.
        memory_bytes: free host memory.
        disk_bytes: free disk space in the current folder.
    """

    each: Mapping[str, HostNeeds]
    together: HostNeeds
    reference_bytes: int
    memory_bytes: int
    disk_bytes: int


@dataclass(frozen=True, slots=True)
class Placement:
    """One call in one precision under a budget.

    Attributes:
        runs: whether the device runs the precision at all.
        all_networks: fit with the weights of all networks in memory.
        one_network: fit with one network's weights at a time.
        instead: the nearest settings that fit, if all networks together do not.
    """

    call: CallSize
    precision: str
    runs: bool
    all_networks: Fit
    one_network: Fit
    instead: tuple[Setting, ...]


@dataclass(frozen=True, slots=True)
class StepBound:
    """Minimum time of a denoising step: a bound from the card's peak figures, not a measurement."""

    call: CallSize
    precision: str
    networks: Mapping[str, Bound]
    forward_seconds: float
    step_seconds: float
    image_seconds: float


@dataclass(frozen=True, slots=True)
class DeviceForecast:
    """A card, or this machine's processor.

    Attributes:
        card: figures of the card; None if only its memory was given, and for the processor.
        memory_bytes: all memory of the device.
        budget_bytes: memory that is left for weights, buffers and activations.
        bounds: empty for a device of unknown speed.
    """

    card: Card | None
    memory_bytes: int
    budget_bytes: int
    placements: tuple[Placement, ...]
    bounds: tuple[StepBound, ...]


@dataclass(frozen=True, slots=True)
class Forecast:
    """Everything that `plan` reports."""

    subject: Subject
    precisions: tuple[str, ...]
    weights: Mapping[str, NetworkWeights]
    calls: tuple[CallForecast, ...]
    forwards_per_step: int
    build: BuildForecast
    cpu: DeviceForecast
    card: DeviceForecast | None


def read_subject(
    checkpoint: Path | None, profiles: Sequence[str], source: Path | None, text_encoder: Path | None
) -> Subject:
    """Read the model to forecast: headers, and values only of layers that are compared with a source's.

    Args:
        checkpoint: file or folder; None for the published model of the profile's variant.
        profiles: names or paths; the variant's own if empty.
        source: latent checkpoint to complete the checkpoint from.
        text_encoder: Hugging Face folder of the text encoder; None to leave it out.

    Raises:
        UsageError: neither checkpoint nor profile, or profiles for another patch size.
        ArtifactError: the checkpoint is damaged, incomplete or of no known family.
    """
    read = tuple(load_profile(name) for name in dict.fromkeys(profiles))
    metadata: Mapping[str, str] = {}
    if checkpoint is not None:
        loaded = load_model(checkpoint, source)
        model, metadata = loaded.model, loaded.checkpoint.metadata
    else:
        if source is not None:
            raise UsageError("--source completes a checkpoint, and none was given", hint="give a CHECKPOINT")
        model = _published_model(read)
    spec = model.spec
    read = read or (load_profile(spec.variant),)
    for profile in read:
        profile.check_model(spec)
    costs = network_costs(model)
    if text_encoder is not None:
        costs = {**network_costs(open_text_encoder(text_encoder, spec.caption_width).model), **costs}
    return Subject(
        checkpoint=str(checkpoint) if checkpoint is not None else "",
        known_as=known_as(fingerprint(model.shapes)),
        spec=spec,
        sampling=sampling_defaults(metadata, read[0].sampling),
        profiles=read,
        costs=costs,
        reference_bytes=reference_bytes(model),
    )


def forecast(
    subject: Subject,
    precisions: Sequence[str],
    sizes_px: Sequence[tuple[int, int]],
    *,
    card: Card | None,
    vram_bytes: int | None,
    memory_bytes: int,
) -> Forecast:
    """Forecast weights, calls, the build, and the fit on CPU and card.

    Args:
        subject: the model and its profiles.
        precisions: names from `PRECISIONS`.
        sizes_px: (height, width) of images; if empty, the profiles' preferred and maximum sizes.
        card: the card that engines would run on, if it is known.
        vram_bytes: memory of the card; None without any card.
        memory_bytes: free host memory.

    Raises:
        UsageError: a size that the model does not take.
    """
    ordered = tuple(precision for precision in PRECISIONS if precision in precisions)
    calls = tuple(_call_forecast(subject, call, ordered) for call in _calls(subject, sizes_px))
    forwards = 1 if subject.sampling.guidance == 1.0 else 2
    on_card = None
    if vram_bytes is not None:
        budget = max(vram_bytes - CARD_RESERVE_BYTES, 0)
        runs = tuple(precision for precision in PRECISIONS if card is None or card.runs(precision))
        placements = _placements(subject, calls, ordered, runs, budget, on_cpu=False)
        bounds = _bounds(subject, card, calls, [p for p in ordered if p in runs], forwards) if card else ()
        on_card = DeviceForecast(card, vram_bytes, budget, placements, bounds)
    wanted = [precision for precision in ordered if precision in CPU_PRECISIONS]
    on_cpu = _placements(subject, calls, wanted, CPU_PRECISIONS, memory_bytes, on_cpu=True)
    return Forecast(
        subject=subject,
        precisions=ordered,
        weights=_weights(subject.costs, ordered),
        calls=calls,
        forwards_per_step=forwards,
        build=_build_forecast(subject, ordered, memory_bytes),
        cpu=DeviceForecast(None, memory_bytes, memory_bytes, on_cpu, ()),
        card=on_card,
    )


def _published_model(profiles: Sequence[Profile]) -> Model:
    if not profiles:
        raise UsageError(
            "there is nothing to plan: neither a checkpoint nor a profile was given",
            hint="l2p-export plan CHECKPOINT, or l2p-export plan --profile 4k for the published 4k model",
        )
    return published_model(profiles[0].patch_px, profiles[0].name)


def _calls(subject: Subject, sizes_px: Sequence[tuple[int, int]]) -> tuple[CallSize, ...]:
    """The calls to forecast: the given sizes with the longest caption, or each profile's preferred and maximum call."""
    calls = []
    for height, width in sizes_px:
        check_size(subject.spec, height, width)
        longest = max(profile.caption_tokens.max for profile in subject.profiles)
        calls.append(CallSize(height, width, longest, max(profile.batch.max for profile in subject.profiles)))
    for profile in subject.profiles if not calls else ():
        for which in ("opt", "max"):
            spans = (profile.height_px, profile.width_px, profile.caption_tokens, profile.batch)
            calls.append(CallSize(*(getattr(span, which) for span in spans)))
    return tuple(dict.fromkeys(calls))


def _call_forecast(subject: Subject, call: CallSize, precisions: Sequence[str]) -> CallForecast:
    flops = forward_flops(subject.spec, subject.costs, call)
    total = total_flops(part for network, part in flops.items() if network != TEXT_ENCODER)
    memory = {precision: engine_memory(subject.spec, call, precision) for precision in precisions}
    tokens = count_tokens(subject.spec, call)
    return CallForecast(call, _in_profile(subject, call), tokens, flops, total, total.total, memory)


def _in_profile(subject: Subject, call: CallSize) -> bool:
    """Whether an engine of one of the profiles takes an image of this size."""
    return any(
        profile.height_px.min <= call.height_px <= profile.height_px.max
        and profile.width_px.min <= call.width_px <= profile.width_px.max
        for profile in subject.profiles
    )


def _weights(costs: NetworkCosts, precisions: Sequence[str]) -> dict[str, NetworkWeights]:
    sizes = {precision: weight_bytes(costs, precision) for precision in precisions}
    return {
        network: NetworkWeights(
            tensors=len(cost.shapes),
            parameters=sum(math.prod(shape) for shape in cost.shapes.values()),
            bytes={precision: sizes[precision][network] for precision in precisions},
        )
        for network, cost in costs.items()
    }


def _build_forecast(subject: Subject, precisions: Sequence[str], memory_bytes: int) -> BuildForecast:
    costs = subject.costs
    sizes = {
        precision: {(network, precision): size for network, size in weight_bytes(costs, precision).items()}
        for precision in precisions
    }
    largest = {precision: largest_tensor_bytes(costs, precision) for precision in precisions}
    return BuildForecast(
        each={precision: host_needs(sizes[precision], largest[precision], 1) for precision in precisions},
        together=host_needs(
            {key: size for part in sizes.values() for key, size in part.items()}, max(largest.values()), 1
        ),
        reference_bytes=subject.reference_bytes,
        memory_bytes=memory_bytes,
        disk_bytes=shutil.disk_usage(Path.cwd()).free,
    )


def _placements(
    subject: Subject,
    calls: Sequence[CallForecast],
    precisions: Sequence[str],
    runs: Sequence[str],
    budget_bytes: int,
    *,
    on_cpu: bool,
) -> tuple[Placement, ...]:
    model = subject.spec
    weights = {precision: weight_bytes(subject.costs, precision) for precision in PRECISIONS}

    def try_setting(setting: Setting) -> Fit:
        call = setting.call
        # ONNX Runtime on the CPU computes in float32, whatever the weights are stored in, and fuses a head in float32.
        tokens = count_tokens(model, call)
        sizes = (call.batch, tokens.rows, tokens.columns, tokens.caption)
        memory = (
            cpu_call_memory(model, *sizes, fused_head=setting.precision == "fp32")
            if on_cpu
            else engine_memory(model, call, setting.precision)
        )
        return fit_call(model, call, memory, weights[setting.precision], setting.residence, budget_bytes)

    placements = []
    for call in (forecast.call for forecast in calls):
        for precision in precisions:
            everything = Setting(call, precision, "all")
            whole = try_setting(everything)
            lower = [other for other in runs if PRECISIONS.index(other) > PRECISIONS.index(precision)]
            instead: tuple[Setting, ...] = ()
            if precision in runs and not whole.fits:
                smaller = (other for other in smaller_calls(model, call) if _in_profile(subject, other))
                instead = find_settings(everything, lower, smaller, lambda setting: try_setting(setting).fits)
            one = try_setting(Setting(call, precision, "one"))
            placements.append(Placement(call, precision, precision in runs, whole, one, instead))
    return tuple(placements)


def _bounds(
    subject: Subject, card: Card, calls: Sequence[CallForecast], precisions: Sequence[str], forwards: int
) -> tuple[StepBound, ...]:
    bounds = []
    for item in calls:
        borders = border_bytes(subject.spec, item.call)
        for precision in precisions:
            networks = step_bounds(card, precision, item.flops, weight_bytes(subject.costs, precision), borders)
            forward = sum(networks[network].seconds for network in STEP_NETWORKS)
            step = forwards * forward
            bounds.append(StepBound(item.call, precision, networks, forward, step, step * subject.sampling.steps))
    return tuple(bounds)
