"""Finds whether a call fits a card or a machine, settings that make it fit, and the minimum time of a step.

Weights stay in memory together, or one network's at a time. The pixel head is cut into as many stripes as necessary.
Settings are tried in order of cost, cheapest first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from l2p_engines.forecast.calls import CallSize, Flops
from l2p_engines.forecast.cards import Card
from l2p_runtime.contract import TEXT_ENCODER, ModelSpec
from l2p_runtime.memory import CallMemory
from l2p_runtime.stripes import plan_stripes

Residence = Literal["all", "one"]
"""Networks whose weights are in memory: all, or one at a time."""

CARD_RESERVE_BYTES = 768 << 20
"""Part of a card's memory that CUDA context, kernels and a desktop take. An assumption, not a measurement."""

STEP_NETWORKS = ("stem", "trunk", "tail", "head")
"""The networks that every denoising step runs."""


@dataclass(frozen=True, slots=True)
class Fit:
    """One call under one budget.

    Attributes:
        fits: whether the call fits.
        needed_bytes: what it takes with the head cut to fit; where it does not fit, the minimum that it would take.
        stripes: pieces that the head is cut into; 0 when the call does not fit.
    """

    fits: bool
    needed_bytes: int
    stripes: int


@dataclass(frozen=True, slots=True)
class Setting:
    """One combination of the settings that can be changed to make a call fit."""

    call: CallSize
    precision: str
    residence: Residence


@dataclass(frozen=True, slots=True)
class Bound:
    """The minimum time of one network, a lower bound: a real run is slower.

    Attributes:
        seconds: the larger of the two below.
        compute_seconds: operations over peak arithmetic; None where the card's peak is unknown.
        memory_seconds: weights, inputs and outputs, each moved once, over bandwidth.
    """

    seconds: float
    compute_seconds: float | None
    memory_seconds: float


def fit_call(
    model: ModelSpec,
    call: CallSize,
    memory: CallMemory,
    weights: Mapping[str, int],
    residence: Residence,
    budget_bytes: int,
) -> Fit:
    """Try one call.

    Args:
        model: its halo decides how the head may be cut.
        call: size of the image.
        memory: what the call takes besides weights.
        weights: bytes of each network's weights. A text encoder is in memory before the others, and only then.
        residence: which weights are in memory at once.
        budget_bytes: for weights, buffers and activations.
    """
    rows = call.height_px // model.patch_px
    least_rows = rows if model.head.halo_rows is None else min(1 + 2 * model.head.halo_rows, rows)
    encoder = weights.get(TEXT_ENCODER, 0)
    head = weights.get("head", 0)
    others = [size for network, size in weights.items() if network not in ("head", TEXT_ENCODER)]
    # Weights in memory while a transformer network or the head runs: those of all networks, or only its own.
    beside_tokens, beside_head = (sum(others) + head,) * 2 if residence == "all" else (max(others, default=0), head)

    def needed(rows_at_once: int) -> int:
        tokens_bytes, head_bytes = memory.tokens_bytes, rows_at_once * memory.head_row_bytes
        return max(encoder, memory.buffers_bytes + max(beside_tokens + tokens_bytes, beside_head + head_bytes))

    if needed(least_rows) > budget_bytes:
        return Fit(fits=False, needed_bytes=needed(least_rows), stripes=0)
    stripes = plan_stripes(model.head, rows, memory.head_row_bytes, budget_bytes - memory.buffers_bytes - beside_head)
    longest = max(stripe.read_stop - stripe.read_first for stripe in stripes)
    return Fit(fits=True, needed_bytes=needed(longest), stripes=len(stripes))


def find_settings(
    wanted: Setting, precisions: Iterable[str], smaller: Iterable[CallSize], fits: Callable[[Setting], bool]
) -> tuple[Setting, ...]:
    """The nearest settings under which a call would fit. Tries weights in memory, then precision, then size.

    Args:
        wanted: what does not fit.
        precisions: lower precisions to try, nearest first.
        smaller: smaller images to try, largest first.
        fits: tries one setting.

    Returns:
        Up to one of each kind; empty when nothing that was tried fits.
    """
    lower = tuple(precisions)

    def first(settings: Iterator[Setting]) -> tuple[Setting, ...]:
        return tuple(next(((setting,) for setting in settings if fits(setting)), ()))

    one = replace(wanted, residence="one")
    together = first(replace(wanted, precision=precision) for precision in lower)
    apart = first(replace(one, precision=precision) for precision in (wanted.precision, *lower))
    # With all networks in memory nothing is loaded twice, so one at a time pays only if it keeps a higher precision.
    found = apart if [setting.precision for setting in apart] != [setting.precision for setting in together] else ()
    found += together
    if not found:
        sizes = tuple(smaller)
        found = first(replace(one, call=call) for call in sizes)
        lowered = first(replace(one, call=call, precision=precision) for call in sizes for precision in lower)
        found += tuple(setting for setting in lowered if not found or setting.call != found[0].call)
    return found


def smaller_calls(model: ModelSpec, call: CallSize) -> Iterator[CallSize]:
    """Smaller images of about the same proportions, largest first: by eighths of the side, then by halves."""
    multiple = model.size_multiple_px
    seen = {(call.height_px, call.width_px)}
    for share in (7 / 8, 3 / 4, 5 / 8, 1 / 2, 3 / 8, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64):
        height, width = (
            max(int(side * share) // multiple * multiple, multiple) for side in (call.height_px, call.width_px)
        )
        if (height, width) not in seen:
            seen.add((height, width))
            yield replace(call, height_px=height, width_px=width)


def step_bounds(
    card: Card, precision: str, flops: Mapping[str, Flops], weights: Mapping[str, int], borders: Mapping[str, int]
) -> dict[str, Bound]:
    """The minimum time of each network of one forward on a card.

    Peaks are those of dense tensor cores with float32 accumulation. Activations inside a network are assumed to cost
    nothing, which is most optimistic for the pixel head.

    Args:
        card: where it would run.
        precision: one that the card runs.
        flops: operations of each network.
        weights: bytes of each network's weights.
        borders: bytes of the inputs and outputs of each network.
    """
    return {
        network: _bound(card, precision, flops[network], weights[network] + borders[network])
        for network in STEP_NETWORKS
    }


def _bound(card: Card, precision: str, flops: Flops, moved_bytes: int) -> Bound:
    memory = moved_bytes / (card.bandwidth_gb_s * 1e9)
    in_fp8 = flops.linear_fp8 if precision == "fp8" else 0
    # An FP8 plan runs attention, embedders and the head in 16 bits.
    others = card.peak_tflops("fp16" if precision == "fp8" else precision)
    eighths = card.peak_tflops("fp8")
    if others is None or (in_fp8 and eighths is None):
        return Bound(memory, None, memory)
    compute = (flops.total - in_fp8) / (others * 1e12) + (in_fp8 / (eighths * 1e12) if eighths else 0.0)
    return Bound(max(compute, memory), compute, memory)
