"""Error measures of an output against the expected one, and the thresholds that gate a bundle."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from l2p_runtime.contract import BasePrecision, Comparison, LedgerEntry, arithmetic
from l2p_runtime.errors import ParityError

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np
    from numpy.typing import NDArray


EQUAL_PSNR_DB = 999.0


@dataclass(frozen=True, slots=True)
class Threshold:
    """The largest relative L2 error that passes, and the reason for the figure."""

    relative: float
    reason: str


_FP16 = Threshold(2e-2, "float16 rounds at 5e-4 a step; 3e-3 measured on the tiny checkpoints")
_FP8 = Threshold(2e-1, "FP8 rounds values by 2.6 %, and two blocks of random weights add up to 9.8 % of what they make")

THRESHOLDS: dict[BasePrecision, Threshold] = {
    "fp32": Threshold(1e-5, "float32 sums in another order; 6e-7 measured on the tiny checkpoints, 2e-6 at width 3840"),
    "fp16": _FP16,
    "fp16-plain": _FP16,
    "bf16": Threshold(1e-1, "bfloat16 rounds at 4e-3 a step; 1.2e-2 measured in torch on the demo checkpoints"),
    "fp8": _FP8,
    "fp8-attention": _FP8,
    "fp8-plain": Threshold(5e-1, "nothing is chosen: for comparison, not for use"),
}
"""Base of a plan to its gate, against torch float32 on the same inputs."""

WITHOUT_FP8 = ("head", "text_encoder", "stem.modulation")
"""Outputs that no FP8 plan rounds; they are judged by the threshold of an FP16 plan."""

_FP8_PREDICTION = Threshold(
    1e-1, "tokens off by 4.5 % made 6.1e-2 of a prediction of half-trained adapters; of the demo's 8e-3 at most"
)
_PREDICTIONS: dict[BasePrecision, Threshold] = {"fp8": _FP8_PREDICTION, "fp8-attention": _FP8_PREDICTION}
"""Base of a plan to the gate of predictions, where it differs. Most of a prediction is the noise that the pixel head
reads from the image itself, but on grids that a model was not trained on it depends on tokens."""

END_TO_END = "end-to-end"
"""The name of the whole prediction in a ledger, in place of a network."""


def threshold_of(base: BasePrecision, network: str = "") -> Threshold:
    """The gate of a plan, by its base.

    Args:
        base: of the plan.
        network: what is compared, as the ledger calls it.
    """
    if network == END_TO_END and base in _PREDICTIONS:
        return _PREDICTIONS[base]
    return THRESHOLDS["fp16" if arithmetic(base) == "fp8" and network in WITHOUT_FP8 else base]


def compare(
    expected: NDArray[np.float32],
    found: NDArray[np.float32],
    comparison: Comparison,
    *,
    network: str,
    case: str,
    base: BasePrecision,
    pixel_step: int = 1,
) -> LedgerEntry:
    """Measure one output against the expected one and judge it by the plan's threshold.

    Values that are not finite fail whatever the threshold.

    Args:
        expected: every `pixel_step`-th row and column of the expected output.
        found: the whole output that was computed.
        comparison: what is compared, for the ledger.
        network: as the ledger calls it.
        case: as the ledger calls it.
        base: of the plan, which decides the threshold.
        pixel_step: 1 where the whole expected output is known.
    """
    import numpy as np

    threshold = threshold_of(base, network)
    strange = int((~np.isfinite(found)).sum())
    found = found[..., ::pixel_step, ::pixel_step] if pixel_step > 1 else found
    if strange or found.shape != expected.shape:
        bad = "another shape" if found.shape != expected.shape else f"{strange} NaN or Inf"
        return LedgerEntry(comparison, network, case, "failed", f"the output has {bad}", threshold.relative)
    wanted, got = expected.astype(np.float64), found.astype(np.float64)
    difference = got - wanted
    norm = float(np.linalg.norm(wanted))
    relative = float(np.linalg.norm(difference)) / norm if norm else float(np.linalg.norm(difference))
    scale = norm * float(np.linalg.norm(got))
    return LedgerEntry(
        comparison=comparison,
        network=network,
        case=case,
        status="passed" if relative <= threshold.relative else "failed",
        reason=threshold.reason,
        threshold=threshold.relative,
        max_abs=float(np.abs(difference).max(initial=0.0)),
        relative=relative,
        cosine=float((wanted * got).sum()) / scale if scale else 1.0,
        psnr_db=psnr_db(difference, float(np.abs(wanted).max(initial=0.0))),
    )


def require_passed(entries: Iterable[LedgerEntry], bases: Mapping[str, BasePrecision]) -> None:
    """Require that every comparison that was run has passed.

    Args:
        entries: of a ledger.
        bases: name of each plan to its base, which decides the advice.

    Raises:
        ParityError: names each comparison that failed, with its figure.
    """
    failed = [entry for entry in entries if entry.status == "failed"]
    if not failed:
        return
    lines = [
        f"{entry.network} in {entry.comparison} on {entry.case}: "
        + (
            f"relative error {entry.relative:.2e} over {entry.threshold:.0e}"
            if entry.relative is not None
            else entry.reason
        )
        for entry in failed
    ]
    advice = "try --precision fp32, and report the figures above"
    if all(arithmetic(bases[entry.comparison.plan]) == "fp8" for entry in failed):
        advice = "`calibrate --sensitivity` makes a plan for --plan that keeps the layers which FP8 hurts most"
    raise ParityError(
        f"{len(failed)} comparisons failed: {'; '.join(lines[:6])}",
        hint=f"no bundle was written over what was there; {advice}",
    )


def psnr_db(difference: NDArray[np.float64], peak: float) -> float:
    """Peak signal-to-noise ratio in dB; `EQUAL_PSNR_DB` where nothing differs."""
    import numpy as np

    mean_square = float(np.square(difference).mean())
    if mean_square == 0.0 or peak == 0.0:
        return EQUAL_PSNR_DB
    return 10.0 * math.log10(peak * peak / mean_square)


def not_run(comparison: Comparison, cases: Sequence[str], reason: str) -> list[LedgerEntry]:
    """Ledger entries for cases, by name, that this machine did not run; never counted as passed."""
    return [LedgerEntry(comparison, END_TO_END, case, "not run", reason) for case in cases]
