"""Graphs against the reference: the same small denoising calls, network by network and end to end. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from l2p_calib.ledger import END_TO_END, compare
from l2p_export.proof.stored import pixel_step
from l2p_runtime.backends import Device, Engine
from l2p_runtime.contract import NETWORKS, LedgerEntry, ModelSpec, NetworkSpec, Profile
from l2p_runtime.positions import caption_tables, rope_tables
from l2p_runtime.stripes import Stripe

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Tensors = Mapping[str, NDArray[Any]]

CORNER_PIXELS_MAX = 1_500_000
"""Corners of a profile up to this many pixels are run while building; larger ones are listed as not run."""

LEAST_PIXELS_MAX = 7_000_000
"""The same for the least corner of a profile, which engines can run too: 2560x2560 of the 10k profile are within."""

LEAST_FLOPS_MAX = 5_000_000_000_000
"""And the most operations of one call there. At the published size 16x16 tokens take 3.4 to 3.7 TFLOP, which is about a
tenth of a build on two cores; the 64x64 tokens that 8k-zeroshot begins at take 57."""


@dataclass(frozen=True, slots=True)
class Case:
    """One denoising call: token grid and unpadded caption length; `stored` ones travel in the bundle."""

    name: str
    rows: int
    columns: int
    caption_tokens: int
    stored: bool


def small_cases(model: ModelSpec) -> tuple[Case, ...]:
    """The stored cases: a grid with pad tokens and a short caption, and one without pads and a caption over 32."""
    step = model.head.row_multiple
    return Case("padded", 2 * step, 3 * step, 7, stored=True), Case("full", 8, 4, 33, stored=True)


def least_case(model: ModelSpec, profile: Profile) -> Case:
    """The least corner of a profile, stored: the smallest call that engines of the profile take."""
    return _corner(model, profile.height_px.min, profile.width_px.min, profile.caption_tokens.min, stored=True)


def corner_cases(model: ModelSpec, profile: Profile) -> tuple[Case, ...]:
    """The other corners of a profile, non-square ones included."""
    height, width = profile.height_px, profile.width_px
    sizes = ((height.min, width.max), (height.max, width.min), (height.max, width.max))
    return tuple(_corner(model, h, w, profile.caption_tokens.opt, stored=False) for h, w in sizes)


def case_inputs(model: ModelSpec, case: Case, seed: int) -> dict[str, NDArray[Any]]:
    """The inputs of one case from seeded noise: image, time, padded embeddings and mask, rotary tables, token grid."""
    import numpy as np

    from l2p_runtime.noise import normal_noise

    padded = model.padded(case.caption_tokens)
    rows, columns = (0, case.rows * model.patch_px), (0, case.columns * model.patch_px)
    embeds = np.zeros((1, padded, model.caption_width), np.float32)
    embeds[:, : case.caption_tokens] = normal_noise(
        seed, image_index=1, channels=1, rows=(0, case.caption_tokens), cols=(0, model.caption_width)
    )
    cosine, sine = rope_tables(model, case.rows, case.columns, padded)
    return {
        "image": normal_noise(seed, rows=rows, cols=columns)[np.newaxis],
        "time": np.asarray([0.3 + 0.4 * (seed % 2)], np.float32),
        "prompt_embeds": embeds,
        "caption_mask": np.arange(padded)[np.newaxis] < case.caption_tokens,
        "rope_cos": cosine,
        "rope_sin": sine,
        "grid": np.asarray([case.rows, case.columns], np.int64),
    }


def network_inputs(network: str, case: Tensors, made: Tensors) -> dict[str, NDArray[Any]]:
    """The inputs of one network, from a case's inputs and what the networks before it made (`network.output`)."""
    import numpy as np

    rope = {"rope_cos": case["rope_cos"], "rope_sin": case["rope_sin"]}
    if network == "caption":
        cosine, sine = caption_tables((rope["rope_cos"], rope["rope_sin"]), case["caption_mask"].shape[1])
        prompt = {"prompt_embeds": case["prompt_embeds"], "caption_mask": case["caption_mask"]}
        return {**prompt, "rope_cos": np.ascontiguousarray(cosine), "rope_sin": np.ascontiguousarray(sine)}
    if network == "stem":
        return {"image": case["image"], "time": case["time"], "caption": made["caption.caption"], **rope}
    if network == "head":
        rows, columns = (int(size) for size in case["grid"])
        tokens = made["tail.tokens_out"][:, : rows * columns]
        return {"image": case["image"], "tokens": tokens.reshape(len(tokens), rows, columns, -1)}
    before = "stem.tokens" if network == "trunk" else "trunk.tokens_out"
    return {"tokens": made[before], "modulation": made["stem.modulation"], **rope}


def graph_stage_name(plan: str) -> str:
    """What the ledger calls the comparison of a plan's graphs."""
    return f"torch float32 -> {plan} graph"


def engine_stage_name(plan: str, target: str) -> str:
    """What the ledger calls the comparison of a plan's engines."""
    return f"torch float32 -> {plan} {target} engine"


def compare_networks(
    stage: str,
    plan: str,
    networks: Mapping[str, NetworkSpec],
    references: Mapping[str, Tensors],
    load: Callable[[str], Engine],
    device: Device,
    advance: Callable[[int], None],
    stripes: Mapping[str, Sequence[Stripe]] | None = None,
) -> list[LedgerEntry]:
    """Run every case through a plan's graphs or engines, each network alone and all of them in a row.

    A network alone gets the reference's tensors; in a row, it gets what the plan's own networks made. Without a case
    nothing is loaded.

    Args:
        stage: what the ledger calls the comparison.
        plan: name of the plan, which names the threshold too.
        networks: inputs and outputs of each network.
        references: case name to its inputs and torch float32 outputs.
        load: opens the plan's graph or engine of a network; one is open at a time.
        device: where they run.
        advance: told 1 after each network and case.
        stripes: case name to how the pixel head is cut; it runs whole where a case is not in it.
    """
    if not references:
        return []
    made: dict[str, dict[str, NDArray[Any]]] = {name: {} for name in references}
    entries = []

    def judge(label: str, output: str, name: str, found: NDArray[Any]) -> LedgerEntry:
        reference = references[name]
        step = pixel_step(reference) if output == "head.prediction" else 1
        return compare(reference[output], found, stage=stage, network=label, case=name, plan=plan, pixel_step=step)

    for network in NETWORKS:
        engine = load(network)
        try:
            for name, reference in references.items():
                cut = (stripes or {}).get(name, ()) if network == "head" else ()
                alone = _run(engine, device, network_inputs(network, reference, reference), cut)
                chained = _run(engine, device, network_inputs(network, reference, made[name]), cut)
                made[name] |= {f"{network}.{output}": value for output, value in chained.items()}
                for output in (spec.name for spec in networks[network].outputs):
                    label = network if output == networks[network].outputs[0].name else f"{network}.{output}"
                    entries.append(judge(label, f"{network}.{output}", name, alone[output]))
                advance(1)
        finally:
            engine.close()
    return entries + [judge(END_TO_END, "head.prediction", name, made[name]["head.prediction"]) for name in references]


def not_run(stage: str, cases: Sequence[str], reason: str) -> list[LedgerEntry]:
    """Ledger entries for cases, by name, that this machine did not run; never counted as passed."""
    return [LedgerEntry(stage, END_TO_END, case, "not run", reason) for case in cases]


def run_engine(engine: Engine, device: Device, inputs: Tensors) -> dict[str, NDArray[Any]]:
    """Run one engine on host arrays."""
    import numpy as np

    sizes = engine.spec.sizes({name: value.shape for name, value in inputs.items()})
    outputs = {spec.name: device.alloc(spec.resolve(sizes), spec.dtype) for spec in engine.spec.outputs}
    engine.run({name: device.upload(np.ascontiguousarray(value)) for name, value in inputs.items()}, outputs)
    device.synchronize()
    return {name: device.download(value) for name, value in outputs.items()}


def _run(engine: Engine, device: Device, inputs: Tensors, stripes: Sequence[Stripe]) -> dict[str, NDArray[Any]]:
    """Run one engine on host arrays; the head's by stripes where it is cut, as the runtime does."""
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


def _corner(model: ModelSpec, height_px: int, width_px: int, caption_tokens: int, *, stored: bool) -> Case:
    rows, columns = height_px // model.patch_px, width_px // model.patch_px
    return Case(f"{width_px}x{height_px}", rows, columns, caption_tokens, stored=stored)
