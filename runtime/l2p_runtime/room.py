"""Whether networks and calls fit the memory that there is."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

from l2p_runtime.errors import HostError
from l2p_runtime.networks import OpenedPlan, engine_record, forecast_call, head_rows_max, require_sizes
from l2p_runtime.requests import least_memory, plan_call
from l2p_runtime.stripes import Stripe


@dataclass(frozen=True, slots=True)
class Room:
    """The memory for a plan's networks and their calls, at one moment.

    Attributes:
        opened: the plan on its backend.
        network_bytes: network to what it takes while it is loaded, without the text encoder.
        text_bytes: what the text encoder takes while it is loaded; 0 without one.
        limit_bytes: what would be free with no network loaded.
        free_bytes: what is free beside the loaded networks.
        is_budget: the limit is a budget, less what the library takes; otherwise it is the device's memory.
        keeps_networks: all networks are loaded.
    """

    opened: OpenedPlan
    network_bytes: Mapping[str, int]
    text_bytes: int
    limit_bytes: int
    free_bytes: int
    is_budget: bool
    keeps_networks: bool


def require_largest(room: Room) -> None:
    """Refuse a plan whose largest network does not fit by itself.

    Raises:
        HostError: it does not.
    """
    sizes, limit, opened = room.network_bytes, room.limit_bytes, room.opened
    largest = max(sizes, key=lambda network: sizes[network])
    if sizes[largest] > limit:
        library = opened.backend.library_bytes if room.is_budget else 0
        raise HostError(
            f"the weights of `{largest}` in plan `{opened.plan}` take {sizes[largest] + library:,} bytes with the "
            f"library that runs them, {limit + library:,} bytes are there",
            hint="raise the memory budget, or use a plan of lower precision",
        )


def require_encoder(room: Room) -> None:
    """Refuse a text encoder that does not fit by itself.

    Raises:
        HostError: it does not.
    """
    if room.text_bytes > room.limit_bytes:
        raise HostError(
            f"the text encoder's weights take {room.text_bytes:,} bytes, {max(room.limit_bytes, 0):,} bytes are there",
            hint="raise the memory budget, or pass embeddings made elsewhere",
        )


def fit_call(
    room: Room, batch: int, grid: tuple[int, int], tokens: int, prompts: int, further_bytes: int = 0
) -> tuple[tuple[Stripe, ...], bool]:
    """Cut the head for a call.

    Args:
        room: the memory.
        batch: images.
        grid: token rows and columns.
        tokens: of the caption, padded.
        prompts: 2 with guidance, 1 without.
        further_bytes: buffers beside those of a denoising call.

    Returns:
        The stripes, and whether the networks that are loaded may stay; otherwise networks must take turns.

    Raises:
        HostError: the call does not fit even if networks take turns.
        UsageError: engines were not built for this size.
    """
    opened, model = room.opened, room.opened.manifest.model
    need = forecast_call(opened, batch, grid, tokens, prompts)
    need = replace(need, buffers_bytes=need.buffers_bytes + further_bytes)
    head_rows = head_rows_max(engine_record(opened, "head"), batch, grid[1]) if opened.runs_engines else None
    stripes, stay = None, False
    if room.keeps_networks:
        with suppress(HostError):
            stripes, stay = plan_call(model, grid, need, room.free_bytes, room.free_bytes, head_rows), True
    if stripes is None:
        head = room.network_bytes["head"]
        others = max(size for network, size in room.network_bytes.items() if network != "head")
        try:
            stripes = plan_call(model, grid, need, room.limit_bytes - others, room.limit_bytes - head, head_rows)
        except HostError as error:
            if room.is_budget:
                least = least_memory(model, grid, need, others, head) + opened.backend.library_bytes
                error.hint = f"raise the memory budget to {least:,} bytes or more, or draw a smaller image"
            raise
    require_sizes(opened, batch, grid, tokens, stripes)
    return stripes, stay
