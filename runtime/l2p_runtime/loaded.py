"""The networks of an opened plan in memory: all of them stay loaded, or each is loaded for its turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from l2p_runtime.backends import Engine
from l2p_runtime.contract import NETWORKS, TEXT_ENCODER
from l2p_runtime.errors import L2PError
from l2p_runtime.memory import return_freed_memory
from l2p_runtime.networks import OpenedPlan, held_bytes, load_network
from l2p_runtime.room import Room, fit_call, require_encoder, require_largest
from l2p_runtime.stripes import Stripe
from l2p_runtime.text import Tokenizer, encode_prompts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class LoadedNetworks:
    """Engines of one plan that are open, and the budget that they keep to.

    Attributes:
        opened: the plan on its backend.
        budget_bytes: for weights, buffers and activations; None for the free memory of the device.
        held_bytes: network to what it takes while it is loaded, without the text encoder.
        text_bytes: what the text encoder takes while it is loaded; 0 without one.
        engines: those that stay loaded: all networks of a denoising call, or none.
    """

    def __init__(self, opened: OpenedPlan, budget_bytes: int | None) -> None:
        self.opened = opened
        self.budget_bytes = budget_bytes
        self.held_bytes = held_bytes(opened)
        self.text_bytes = self.held_bytes.pop(TEXT_ENCODER, 0)
        self.engines: dict[str, Engine] = {}

    @property
    def room(self) -> Room:
        """The memory that there is now."""
        opened, is_budget = self.opened, self.budget_bytes is not None
        if self.budget_bytes is not None:
            limit = self.budget_bytes - opened.backend.library_bytes
            free = limit - (sum(self.held_bytes.values()) if self.engines else 0)
        else:
            free = opened.backend.device.available_bytes()
            limit = free + sum(engine.memory_bytes() for engine in self.engines.values())
        return Room(opened, self.held_bytes, self.text_bytes, limit, free, is_budget, bool(self.engines))

    def load_what_fits(self) -> None:
        """Load all networks, or none if they must take turns.

        Raises:
            HostError: the largest of them exceeds the budget.
        """
        room = self.room
        require_largest(room)
        if sum(room.network_bytes.values()) <= room.limit_bytes:
            self.keep()

    def plan_call(
        self, batch: int, grid: tuple[int, int], tokens: int, prompts: int, further_bytes: int = 0
    ) -> tuple[Stripe, ...]:
        """Cut the head for a call, as `fit_call`. If the networks and the call do not fit together, they are closed.

        Raises:
            HostError: the call does not fit even then.
            UsageError: engines were not built for this size.
        """
        stripes, stay = fit_call(self.room, batch, grid, tokens, prompts, further_bytes)
        if not stay:
            self.release()
        return stripes

    @contextmanager
    def use(self, network: str) -> Iterator[Engine]:
        """A network's engine: one that is kept, or one that is loaded only for this use."""
        kept = self.engines.get(network)
        if kept is not None:
            yield kept
            return
        engine = load_network(self.opened, network)
        try:
            yield engine
        finally:
            engine.close()
            return_freed_memory()

    @contextmanager
    def giving_back(self) -> Iterator[None]:
        """Give back at the block's end what the backend keeps of activations between its runs."""
        try:
            yield
        finally:
            self.opened.backend.release_memory()

    @contextmanager
    def reserving(self, bytes_: int) -> Iterator[None]:
        """Take bytes out of the budget while the block lasts."""
        whole = self.opened
        backend = replace(whole.backend, library_bytes=whole.backend.library_bytes + bytes_)
        self.opened = replace(whole, backend=backend)
        try:
            yield
        finally:
            self.opened = whole

    def encode(
        self, tokenizer: Tokenizer, groups: Sequence[Sequence[str]], *, truncate: bool
    ) -> list[list[NDArray[np.float32]]]:
        """Load the text encoder, run it and close it; networks are closed first if it does not fit beside them.

        Args:
            tokenizer: of the bundle.
            groups: texts that are padded to one length each.
            truncate: cut texts that are too long.

        Returns:
            Embeddings [L,C] of each text, group by group.

        Raises:
            HostError: the text encoder does not fit by itself.
        """
        room = self.room
        require_encoder(room)
        makes_room = room.keeps_networks and room.text_bytes > room.free_bytes
        if makes_room:
            self.release()
        encoder = load_network(self.opened, TEXT_ENCODER)
        try:
            device = self.opened.backend.device
            embeds = [encode_prompts(encoder, tokenizer, texts, device, truncate=truncate) for texts in groups]
        finally:
            encoder.close()
        if makes_room:
            self.keep()
        return embeds

    def keep(self) -> None:
        """Load all networks, to stay; all or none."""
        try:
            for network in NETWORKS:
                self.engines[network] = load_network(self.opened, network)
        except L2PError:
            self.release()
            raise

    def release(self) -> None:
        """Close all networks that are loaded."""
        for engine in self.engines.values():
            engine.close()
        self.engines = {}
