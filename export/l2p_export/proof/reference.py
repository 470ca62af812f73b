"""Reference outputs: denoising calls in torch float32, network by network.

One transformer block is in memory at a time, so this needs memory for the largest block and not for the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from l2p_engines.forecast.calls import CallSize, forward_flops, total_flops
from l2p_export.families.costs import network_costs
from l2p_export.proof.cases import (
    CORNER_PIXELS_MAX,
    MINIMUM_CASE_FLOPS_MAX,
    MINIMUM_CASE_PIXELS_MAX,
    Case,
    case_inputs,
    corner_cases,
    minimum_case,
    network_inputs,
    small_cases,
)
from l2p_export.tensors.sources import read_tensor
from l2p_runtime.contract import NETWORKS, Profile
from l2p_runtime.memory import available_host_bytes, call_memory

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from l2p_export.checkpoint.loading import LoadedModel
    from l2p_export.families import Model
    from l2p_export.tensors.sources import TensorSource
    from l2p_runtime.progress import Reporter

    Tensors = Mapping[str, NDArray[Any]]

_WEIGHT_COPIES = 2
_ACTIVATION_BYTES = 256 << 20


def run_reference(
    loaded: LoadedModel,
    cases: Mapping[str, Tensors],
    advance: Callable[[int], None],
    observe: Callable[[str, nn.Module], AbstractContextManager[object]] = lambda network, module: nullcontext(),
) -> dict[str, dict[str, NDArray[Any]]]:
    """Run every case through the torch networks in float32.

    Args:
        loaded: the checkpoint.
        cases: case name to inputs, from `cases.case_inputs`.
        advance: called with 1 after each network and case.
        observe: takes a network's name and module, and returns the context that all its cases run in.

    Returns:
        Case name to its inputs and, as `network.output`, the outputs of each network.
    """
    import torch

    results = {name: dict(inputs) for name, inputs in cases.items()}
    for spec in loaded.model.networks:
        module = torch_network(loaded, spec.name)
        with observe(spec.name, module), torch.no_grad():
            for case in results.values():
                given = network_inputs(spec.name, case, case)
                made = module(**{name: torch.from_numpy(value.copy()) for name, value in given.items()})
                values = made if isinstance(made, tuple) else (made,)
                case |= {f"{spec.name}.{out.name}": v.numpy() for out, v in zip(spec.outputs, values, strict=True)}
                advance(1)
    return results


def torch_network(loaded: LoadedModel, network: str) -> nn.Module:
    """One network in torch float32; a transformer block has its weights only while it runs."""
    import torch

    with torch.device("meta"):
        module = loaded.model.module(network, lambda layer: torch.float32)
    blocks = loaded.model.blocks(network)
    for name in blocks:
        _fill_while_running(module.get_submodule(name), name, loaded.checkpoint.tensors)
    inside = tuple(f"{name}." for name in blocks)
    outer = [name for name in module.state_dict() if not name.startswith(inside)]
    module.load_state_dict(_weights(loaded.checkpoint.tensors, outer), assign=True, strict=False)
    return module


def reference_bytes(model: Model) -> int:
    """Bytes of host memory that the reference takes for small images, from only the shapes.

    The sum of a block's weights as read and as float32, the weights outside of blocks, and activations.
    """
    most = 0
    for network in NETWORKS:
        blocks = model.blocks(network)
        sizes = dict.fromkeys((*blocks, ""), 0)
        for name, shape in model.network_shapes(network).items():
            block = next((block for block in blocks if name.startswith(f"{block}.")), "")
            sizes[block] += 4 * math.prod(shape)
        most = max(most, sizes[""] + max((sizes[block] for block in blocks), default=0))
    return _WEIGHT_COPIES * most + _ACTIVATION_BYTES


def _fill_while_running(block: nn.Module, prefix: str, tensors: Mapping[str, TensorSource]) -> None:
    names = list(block.state_dict())

    def fill(module: nn.Module, inputs: object) -> None:
        del inputs
        weights = _weights(tensors, [f"{prefix}.{name}" for name in names])
        module.load_state_dict({name: weights[f"{prefix}.{name}"] for name in names}, assign=True)

    def empty(module: nn.Module, inputs: object, output: object) -> None:
        del inputs, output
        module.to_empty(device="meta")

    block.register_forward_pre_hook(fill)
    block.register_forward_hook(empty)


def _weights(tensors: Mapping[str, TensorSource], names: Sequence[str]) -> dict[str, Tensor]:
    import torch

    return {name: torch.from_numpy(read_tensor(tensors[name])) for name in names}


_ACTIVATION_COPIES = 2
"""Factor of a large case's memory over the runtime's forecast: torch took 1.3 to 1.5 times it in the pixel head."""


class References:
    """The cases of a build and their torch float32 outputs; run once, for measurements and comparisons."""

    def __init__(self, loaded: LoadedModel, profiles: Sequence[Profile], reporter: Reporter) -> None:
        self.loaded, self._reporter = loaded, reporter
        self.cases, self.too_large = _choose(loaded, profiles)
        self._results: dict[str, dict[str, NDArray[Any]]] | None = None

    def results(self) -> dict[str, dict[str, NDArray[Any]]]:
        """Case name to inputs and, as `network.output`, outputs; they are computed by the first call."""
        if self._results is None:
            self._results = self._run({})
        return self._results

    def observed(
        self,
        more: Mapping[str, Mapping[str, NDArray[Any]]],
        observe: Callable[[str, nn.Module], AbstractContextManager[object]],
    ) -> None:
        """Run all cases, and those in `more` by their inputs, each network in the context that `observe` returns."""
        results = self._run(more, observe)
        self._results = {name: case for name, case in results.items() if name not in more}

    def _run(
        self,
        more: Mapping[str, Mapping[str, NDArray[Any]]],
        observe: Callable[[str, nn.Module], AbstractContextManager[object]] = lambda network, module: nullcontext(),
    ) -> dict[str, dict[str, NDArray[Any]]]:
        model = self.loaded.model
        inputs = {case.name: case_inputs(model.spec, case, seed) for seed, case in enumerate(self.cases)} | dict(more)
        calls = len(inputs) * len(model.networks)
        with self._reporter.task("reference in torch float32", calls, "calls") as advance:
            return run_reference(self.loaded, inputs, advance, observe)


def _choose(loaded: LoadedModel, profiles: Sequence[Profile]) -> tuple[list[Case], list[tuple[str, list[str]]]]:
    """Cases that this machine runs; and reasons with the names of the cases that it does not run."""
    spec, available = loaded.model.spec, available_host_bytes()
    minimum = [minimum_case(spec, profile) for profile in profiles]
    corners = [case for profile in profiles for case in corner_cases(spec, profile)]
    # The ledger identifies cases by name. Of two cases of one size, the stored one comes first and is kept.
    cases: dict[str, Case] = {}
    for case in (*small_cases(spec), *minimum, *corners):
        cases.setdefault(case.name, case)
    needed = reference_bytes(loaded.model)
    if needed > available:
        # The reason does not state the free memory, which would make the result of each build different.
        reason = f"a block in float32 takes about {needed:,} bytes here, more than are free"
        return [], [(reason, list(cases))]
    chosen: list[Case] = []
    left: dict[str, list[str]] = {}
    for case in cases.values():
        reason = _too_large(loaded, case, available)
        if reason:
            left.setdefault(reason, []).append(case.name)
        else:
            chosen.append(case)
    return chosen, list(left.items())


def _too_large(loaded: LoadedModel, case: Case, available_bytes: int) -> str:
    """The reason why a build does not run a case; empty if it runs it."""
    spec = loaded.model.spec
    pixels = case.rows * case.columns * spec.patch_px**2
    if pixels <= CORNER_PIXELS_MAX:
        return ""
    most = MINIMUM_CASE_PIXELS_MAX if case.stored else CORNER_PIXELS_MAX
    if pixels > most:
        return f"larger than the {most:,} pixels that a build runs in torch"
    call = CallSize(case.rows * spec.patch_px, case.columns * spec.patch_px, case.caption_tokens)
    flops = total_flops(forward_flops(spec, network_costs(loaded.model), call).values()).total
    if flops > MINIMUM_CASE_FLOPS_MAX:
        limit = MINIMUM_CASE_FLOPS_MAX / 1e12
        return f"takes {flops / 1e12:.1f} TFLOP, a build spends {limit:.0f} on a large case in torch"
    need = call_memory(spec, 1, case.rows, case.columns, spec.padded(case.caption_tokens))
    needed = need.buffers_bytes + _ACTIVATION_COPIES * max(need.tokens_bytes, case.rows * need.head_row_bytes)
    if needed > available_bytes:
        return f"takes about {needed:,} bytes in float32 here, more than are free"
    return ""
