"""Helper processes that trace networks in parallel to a build; each stage is made once, by whichever is first."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from l2p_engines.children import end_with
from l2p_engines.store.stages import Home, StageRunner, find_stage
from l2p_export.graphs.export import trace_key, trace_stage
from l2p_runtime.errors import L2PError
from l2p_runtime.progress import Silent

if TYPE_CHECKING:
    from l2p_calib.plans.plan import PrecisionPlan
    from l2p_export.families import Networks
    from l2p_runtime.contract import NetworkSpec


@dataclass(frozen=True, slots=True)
class ToTrace:
    """One network under one plan."""

    model: Networks
    network: NetworkSpec
    plan: PrecisionPlan


@contextmanager
def tracing_ahead(home: Home, wanted: Sequence[ToTrace], processes: int) -> Iterator[None]:
    """Within this context, helper processes trace the wanted networks from the last to the first.

    If the caller needs a trace that a helper is making, it waits, as it does for another build. If a helper fails, the
    caller traces the network itself.

    Args:
        home: where stages are kept.
        wanted: networks and plans, in the order in which the caller traces them.
        processes: number of processes that trace, including the caller.
    """
    left = {trace_key(item.model, item.network, item.plan): item for item in wanted}
    left = {key: item for key, item in left.items() if find_stage(home, key) is None}
    # The caller is always one of them.
    count = min(processes, len(left)) - 1
    # A fork would copy torch's locks in their current state.
    context = multiprocessing.get_context("spawn")
    backwards = list(left.values())[::-1]
    helpers = [
        context.Process(target=_trace, args=(home, backwards[index::count], os.getpid()), daemon=True)
        for index in range(count)
    ]
    for helper in helpers:
        helper.start()
    try:
        yield
    finally:
        for helper in helpers:
            helper.terminate()
            helper.join()


def _trace(home: Home, wanted: Sequence[ToTrace], parent: int) -> None:
    end_with(parent)
    run = StageRunner(home)
    for item in wanted:
        try:
            trace_stage(run, item.model, item.network, item.plan, Silent())
        except L2PError:
            return
