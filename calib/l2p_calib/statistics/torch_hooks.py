"""Activation statistics of a torch module, by hooks on its layers; this module does not import torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from l2p_calib.statistics.ranges import RangeCounter

if TYPE_CHECKING:
    from torch import nn

RESIDUAL = "residual."


@contextmanager
def counting(module: nn.Module, points: Iterable[str]) -> Iterator[Mapping[str, RangeCounter]]:
    """Count the values of points of a module while it runs.

    Args:
        module: a network; its submodules carry published names.
        points: names as `layers.3.feed_forward.w2:in`; `residual.NETWORK:out` is the module's own (first) output.

    Yields:
        Point to its counter.
    """
    counters = {point: RangeCounter() for point in points}
    handles = [_observe(module, point, counter) for point, counter in counters.items()]
    try:
        yield counters
    finally:
        for handle in handles:
            handle.remove()


def _observe(module: nn.Module, point: str, counter: RangeCounter) -> Any:
    layer, _, side = point.rpartition(":")
    observed = module if layer.startswith(RESIDUAL) else module.get_submodule(layer)
    hook: Callable[..., None]
    if side == "in":

        def hook(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            del layer, output
            counter.add(_values(inputs[0]))

    else:

        def hook(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            del layer, inputs
            counter.add(_values(output[0] if isinstance(output, tuple) else output))

    return observed.register_forward_hook(hook)


def _values(tensor: Any) -> Any:
    return tensor.detach().float().cpu().numpy()
