"""Raises the layers of a text encoder that exceed float16, measured in torch float32 on prompts.

The residual, norms and softmax are float32 in every plan. Inputs and outputs of linear layers, query, key and their
product are not. If they are too large for float16, the whole layer is raised to float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from l2p_calib.plans.float16 import FLOAT16_MAX, HEADROOM
from l2p_calib.plans.plan import LayerRule
from l2p_calib.prompts import read_prompts
from l2p_engines.store.stages import StageOutput
from l2p_export.families.qwen3.peaks import PROMPTS, LayerPeak, measure_peaks
from l2p_export.precision.plans import CASE
from l2p_export.toolchain import toolchain
from l2p_runtime.bundle import file_digest
from l2p_runtime.contract import TEXT_ENCODER, LedgerEntry, ranges_comparison
from l2p_runtime.contract.codec import from_json
from l2p_runtime.errors import HostError, ParityError
from l2p_runtime.text import CHAT_TEMPLATE

if TYPE_CHECKING:
    from pathlib import Path

    from l2p_calib.plans.plan import PrecisionPlan
    from l2p_engines.store.stages import StageRunner
    from l2p_export.families.qwen3.folder import TextEncoder
    from l2p_runtime.progress import Reporter

PLAIN = ("fp16-plain", "fp8-plain")
"""Plans in which nothing is raised."""


@dataclass(frozen=True, slots=True)
class _Facts:
    peaks: tuple[LayerPeak, ...]


def plans_by_ranges(
    run: StageRunner, encoder: TextEncoder, plans: Sequence[PrecisionPlan], weights_sha256: str, reporter: Reporter
) -> tuple[list[PrecisionPlan], tuple[LedgerEntry, ...]]:
    """Raise the layers that exceed float16, and compare the others with its range.

    Args:
        run: runs the measurement, or finds it.
        encoder: the text encoder.
        plans: plans before anything is measured; those without float16 are not changed.
        weights_sha256: digest of the encoder's weights.
        reporter: shows the layers measured.

    Returns:
        The plans in the same order, and one ledger entry for each plan with float16.

    Raises:
        ArtifactError: a layer makes NaN or Inf in float32.
        ParityError: measured values exceed a plan in which nothing is raised.
    """
    narrow = [plan for plan in plans if plan.default == "float16"]
    if not narrow:
        return list(plans), ()
    inputs = {
        "weights": weights_sha256,
        "settings": encoder.model.settings,
        "tokenizer": file_digest(encoder.tokenizer),
        "template": CHAT_TEMPLATE,
        "prompts": read_prompts()[:PROMPTS],
        "tools": toolchain(),
    }

    def make(work: Path) -> StageOutput:
        del work
        return StageOutput(facts=_Facts(measure_peaks(encoder, reporter)))

    try:
        stage = run("ranges", TEXT_ENCODER, inputs, make)
    except HostError as error:
        told = str(error)
        return list(plans), tuple(
            LedgerEntry(ranges_comparison(plan.name), TEXT_ENCODER, CASE, "not run", told) for plan in narrow
        )
    peaks = from_json(_Facts, stage.facts).peaks
    raised = [_raised(plan, peaks) for plan in plans]
    return raised, tuple(_entry(plan, peaks) for plan in raised if plan.default == "float16")


def _raised(plan: PrecisionPlan, peaks: Sequence[LayerPeak]) -> PrecisionPlan:
    """The plan with a float32 rule for each layer whose peak exceeds `FLOAT16_MAX / HEADROOM`."""
    if plan.default != "float16":
        return plan
    if plan.base in PLAIN:
        over = [item for item in peaks if item.peak > FLOAT16_MAX and not item.is_bound]
        beyond = [f"{item.layer}.{item.place} ({item.peak:.3g})" for item in over]
        if beyond:
            raise ParityError(
                f"plan `{plan.name}` overflows in the text encoder: float16 holds {FLOAT16_MAX:.0f}, and in float32 "
                f"{', '.join(beyond[:4])} are more",
                hint="--precision fp16 raises what needs it; bf16 and fp32 hold it as it is",
            )
        return plan
    limit = FLOAT16_MAX / HEADROOM
    rules: dict[str, LayerRule] = {}
    for item in peaks:
        if item.peak > limit:
            verb = "may reach" if item.is_bound else "reaches"
            told = f"{item.place} {verb} {item.peak:.3g}, float16 is given {limit:.0f}"
            rules.setdefault(item.layer, LayerRule(item.layer, "float32", told))
    return replace(plan, rules=(*plan.rules, *rules.values()))


def _entry(plan: PrecisionPlan, peaks: Sequence[LayerPeak]) -> LedgerEntry:
    narrow = [item for item in peaks if plan.dtype(item.layer) == "float16" and not item.is_bound]
    held = max(narrow, key=lambda item: item.peak, default=None)
    told = "nothing in float16" if held is None else f"{held.peak:.3g} at {held.layer}.{held.place} is the most"
    wide = dict.fromkeys(item.layer for item in peaks if plan.dtype(item.layer) == "float32")
    more = f"; in float32: {', '.join(wide)}" if wide else ""
    detail = f"{told} of {PROMPTS} prompts; float16 holds {FLOAT16_MAX:.0f}{more}"
    return LedgerEntry(ranges_comparison(plan.name), TEXT_ENCODER, CASE, "passed", detail)
