"""Turns profiles into engine shapes: the minimum, preferred and maximum shape of every input of a network.

    Profile -> symbol_ranges -> engine_profiles

Every symbol of a network's shapes grows with the sizes of a profile. So its minimum belongs to the minimum sizes, its
maximum to the maximum sizes, and every size between them is covered.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from l2p_engines.forecast.calls import CallSize, engine_memory
from l2p_runtime.contract import TEXT_ENCODER, EngineProfile, InputShapes, ModelSpec, NetworkSpec, Profile, Range
from l2p_runtime.errors import InternalError, UsageError
from l2p_runtime.stripes import plan_stripes
from l2p_runtime.text import PROMPTS_AT_ONCE


@dataclass(frozen=True, slots=True)
class HeadBudget:
    """Memory that one stripe of the pixel head may take, in bytes, and the precision that it computes in."""

    size_bytes: int
    precision: str


def engine_profiles(
    network: NetworkSpec, model: ModelSpec, profiles: Iterable[Profile], head_budget: HeadBudget | None = None
) -> tuple[EngineProfile, ...]:
    """The optimization profiles of one network's engine, in the order of the profiles.

    Profiles that are the same for this network become one: kernels are compiled for each
    (docs/design.md, "TensorRT facts").

    Args:
        network: the network with these inputs.
        model: decides how sizes become tokens.
        profiles: at least one.
        head_budget: memory of one stripe of the head; None if the head runs whole.

    Raises:
        UsageError: a profile does not fit the model.
        HostError: the head cannot be cut to fit its budget.
    """
    of_prompts = {"B": Range(1, 2, PROMPTS_AT_ONCE)} if network.name == TEXT_ENCODER else {}
    inputs = [_input_shapes(network, symbol_ranges(model, profile, head_budget) | of_prompts) for profile in profiles]
    if not inputs:
        raise UsageError(f"an engine of `{network.name}` needs a profile")
    return tuple(EngineProfile(shapes) for shapes in dict.fromkeys(inputs))


def symbol_ranges(model: ModelSpec, profile: Profile, head_budget: HeadBudget | None = None) -> dict[str, Range]:
    """The range of every symbol of the networks' shapes.

    B batch, h and w rows and columns of whole tokens that the head can take, t captions in multiples of the sequence
    multiple, s padded image tokens and caption tokens together, r rows of a stripe of the head, L tokens of a prompt
    before it is padded.

    Raises:
        UsageError: the profile does not fit the model.
        HostError: the head cannot be cut to fit its budget.
    """
    profile.check_model(model)
    caption = profile.caption_tokens
    if caption.max > model.caption_tokens_max:
        raise UsageError(
            f"profile `{profile.name}`: caption_tokens max is {caption.max}, the model takes {model.caption_tokens_max}"
        )
    spans = (profile.height_px, profile.width_px, caption, profile.batch, _head_rows(model, profile, head_budget))
    calls = [[getattr(span, at) for span in spans] for at in ("min", "opt", "max")]
    corners = [
        model.symbols(batch, (height // model.patch_px, width // model.patch_px), model.padded(tokens), rows)
        for height, width, tokens, batch, rows in calls
    ]
    ranges = {symbol: Range(*(values[symbol] for values in corners)) for symbol in corners[0]}
    return ranges | {"L": Range(1, caption.opt, caption.max)}


def stripe_rows(model: ModelSpec, profile: Profile, head_budget: HeadBudget | None = None) -> int:
    """The maximum of token rows that a head engine takes at once, halo included.

    `plan_stripes(model.head, rows, 1, stripe_rows)` cuts any image of the profile for that engine. It cuts the
    largest image exactly as the budget does.

    Raises:
        HostError: the head cannot be cut to fit its budget.
    """
    rows = profile.height_px.max // model.patch_px
    if head_budget is None:
        return rows
    call = CallSize(profile.height_px.max, profile.width_px.max, profile.caption_tokens.max, profile.batch.max)
    row_bytes = engine_memory(model, call, head_budget.precision).head_row_bytes
    plan_stripes(model.head, rows, row_bytes, head_budget.size_bytes)
    return min(rows, head_budget.size_bytes // row_bytes)


def _head_rows(model: ModelSpec, profile: Profile, head_budget: HeadBudget | None) -> Range:
    """Token rows of a stripe.

    The minimum is one unit, `head.row_multiple`, since the last stripe may be short and a small image has few rows. The
    preferred value is the longest stripe of an image of the preferred height.
    """
    most = stripe_rows(model, profile, head_budget)
    stripes = plan_stripes(model.head, profile.height_px.opt // model.patch_px, 1, most)
    longest = max(stripe.read_stop - stripe.read_first for stripe in stripes)
    return Range(model.head.row_multiple, longest, most)


def _input_shapes(network: NetworkSpec, ranges: Mapping[str, Range]) -> tuple[InputShapes, ...]:
    unknown = [symbol for symbol in network.symbols() if symbol not in ranges]
    if unknown:
        raise InternalError(f"network `{network.name}` has shapes in `{unknown[0]}`, which no profile ranges over")
    low, mid, high = ({symbol: getattr(span, at) for symbol, span in ranges.items()} for at in ("min", "opt", "max"))
    return tuple(InputShapes(spec.name, *map(spec.resolve, (low, mid, high))) for spec in network.inputs)
