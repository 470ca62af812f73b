"""Compares ONNX graphs or engines with the reference, network by network and end to end; needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from l2p_calib.ledger import END_TO_END, compare
from l2p_export.proof.cases import network_inputs
from l2p_export.proof.stored import pixel_step
from l2p_runtime.backends import Device, Engine
from l2p_runtime.contract import NETWORKS, BasePrecision, Comparison, LedgerEntry, NetworkSpec
from l2p_runtime.stripes import Stripe

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Tensors = Mapping[str, NDArray[Any]]


def compare_networks(
    comparison: Comparison,
    base: BasePrecision,
    networks: Mapping[str, NetworkSpec],
    references: Mapping[str, Tensors],
    load: Callable[[str], Engine],
    device: Device,
    advance: Callable[[int], None],
    stripes: Mapping[str, Sequence[Stripe]] | None = None,
) -> list[LedgerEntry]:
    """Run every case through a plan's ONNX graphs or engines: each network on its own, and all in sequence.

    A network on its own gets the reference's tensors. In sequence it gets the outputs of the plan's earlier networks.
    Without cases nothing is loaded.

    Args:
        comparison: the comparison that the ledger entries belong to.
        base: base precision of the plan, which decides the threshold.
        networks: inputs and outputs of each network.
        references: case name to its inputs and torch float32 outputs.
        load: opens the plan's ONNX graph or engine of a network; one is open at a time.
        device: where they run.
        advance: called with 1 after each network and case.
        stripes: case name to the stripes of the pixel head; it runs whole in cases that are not listed.

    Returns:
        One entry for each case and network output, and one for each case end to end.
    """
    if not references:
        return []
    made: dict[str, dict[str, NDArray[Any]]] = {name: {} for name in references}
    entries = []
    for network in NETWORKS:
        engine = load(network)
        try:
            for name, reference in references.items():
                cut = (stripes or {}).get(name, ()) if network == "head" else ()
                alone = _run(engine, device, network_inputs(network, reference, reference), cut)
                chained = _run(engine, device, network_inputs(network, reference, made[name]), cut)
                made[name] |= {f"{network}.{output}": value for output, value in chained.items()}
                entries += _judge_outputs(comparison, base, networks[network], name, reference, alone)
                advance(1)
        finally:
            engine.close()
    end = "head.prediction"
    return entries + [
        _judge(comparison, base, END_TO_END, end, name, reference, made[name][end])
        for name, reference in references.items()
    ]


def compare_each(
    comparison: Comparison,
    base: BasePrecision,
    networks: Mapping[str, NetworkSpec],
    references: Mapping[str, Tensors],
    load: Callable[[str], Engine],
    device: Device,
    advance: Callable[[int], None],
) -> list[LedgerEntry]:
    """Run every case through some networks, each on its own with the reference's tensors; see `compare_networks`.

    Returns:
        One entry for each case and network output.
    """
    entries = []
    for network, spec in networks.items():
        engine = load(network)
        try:
            for name, reference in references.items():
                found = _run(engine, device, network_inputs(network, reference, reference), ())
                entries += _judge_outputs(comparison, base, spec, name, reference, found)
                advance(1)
        finally:
            engine.close()
    return entries


def run_engine(engine: Engine, device: Device, inputs: Tensors) -> dict[str, NDArray[Any]]:
    """Run one engine on host arrays; returns its outputs by name, as host arrays."""
    import numpy as np

    sizes = engine.spec.sizes({name: value.shape for name, value in inputs.items()})
    outputs = {spec.name: device.alloc(spec.resolve(sizes), spec.dtype) for spec in engine.spec.outputs}
    engine.run({name: device.upload(np.ascontiguousarray(value)) for name, value in inputs.items()}, outputs)
    device.synchronize()
    return {name: device.download(value) for name, value in outputs.items()}


def _judge_outputs(
    comparison: Comparison, base: BasePrecision, spec: NetworkSpec, case: str, reference: Tensors, found: Tensors
) -> list[LedgerEntry]:
    """Every output of a network; the first is called as the network is."""
    names = [output.name for output in spec.outputs]
    labels = [spec.name, *(f"{spec.name}.{name}" for name in names[1:])]
    return [
        _judge(comparison, base, label, f"{spec.name}.{name}", case, reference, found[name])
        for label, name in zip(labels, names, strict=True)
    ]


def _judge(
    comparison: Comparison,
    base: BasePrecision,
    label: str,
    output: str,
    case: str,
    reference: Tensors,
    found: NDArray[Any],
) -> LedgerEntry:
    step = pixel_step(reference) if output == "head.prediction" else 1
    return compare(reference[output], found, comparison, network=label, case=case, base=base, pixel_step=step)


def _run(engine: Engine, device: Device, inputs: Tensors, stripes: Sequence[Stripe]) -> dict[str, NDArray[Any]]:
    """Run one engine on host arrays; the head in stripes, if there are several, as the runtime does."""
    import numpy as np

    if len(stripes) < 2:
        return run_engine(engine, device, inputs)
    patch_px = inputs["image"].shape[2] // inputs["tokens"].shape[1]
    kept = []
    for stripe in stripes:
        image = inputs["image"][:, :, stripe.read_first * patch_px : stripe.read_stop * patch_px]
        tokens = inputs["tokens"][:, stripe.read_first : stripe.read_stop]
        made = run_engine(engine, device, {"image": image, "tokens": tokens})["prediction"]
        first = (stripe.first - stripe.read_first) * patch_px
        kept.append(made[:, :, first : first + (stripe.stop - stripe.first) * patch_px])
    return {"prediction": np.concatenate(kept, axis=2)}
