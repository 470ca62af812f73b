"""The ledger of a bundle: comparisons of ONNX graphs, engines and pictures with their baselines."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from l2p_runtime.errors import ArtifactError

Baseline = Literal["torch float32", "float32 ranges", "graph", "pictures"]
Subject = Literal["graph", "fused graph", "engine", "pictures"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """A subject and the baseline that it is compared with.

    Attributes:
        baseline: outputs of torch float32; the ranges that were measured in float32; the ONNX graph that an engine
            was built from; or pictures drawn under another plan.
        subject: what is judged: ONNX graphs, those fused for ONNX Runtime on the CPU, engines, or pictures.
        plan: name of the subject's precision plan.
        target: target of an engine, as `rtx1.7-sm89`; None for ONNX graphs and pictures.
        baseline_plan: precision plan of the baseline's pictures; None for every other baseline.
    """

    baseline: Baseline
    subject: Subject
    plan: str
    target: str | None = None
    baseline_plan: str | None = None

    def __post_init__(self) -> None:
        if (self.target is not None) != (self.subject == "engine"):
            raise ArtifactError(f"a comparison of `{self.subject}` has the target {self.target}")
        if (self.baseline_plan is not None) != (self.baseline == "pictures"):
            raise ArtifactError(f"a comparison with `{self.baseline}` has the plan {self.baseline_plan}")

    def __str__(self) -> str:
        """As tables show it: `torch float32 -> fp16 graph`, `fp16 graph -> rtx1.7-sm89 engine`."""
        if self.baseline == "graph":
            return f"{self.plan} graph -> {self.target} {self.subject}"
        before = f"{self.baseline_plan} pictures" if self.baseline == "pictures" else self.baseline
        return f"{before} -> {' '.join(filter(None, (self.plan, self.target, self.subject)))}"


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """The result of one comparison for one network on one case.

    Attributes:
        network: one of `NETWORKS`, `text_encoder`, or `end-to-end`.
        relative: L2 norm of the difference over that of the expected values.
        psnr_db: peak signal-to-noise ratio; the peak is the maximum expected magnitude, 255 for pictures; 999 if equal.
        threshold: the largest `relative` that passes.
        reason: the reason for the threshold; the finding where there is none; or why nothing was run.
    """

    comparison: Comparison
    network: str
    case: str
    status: Literal["passed", "failed", "not run"]
    reason: str
    threshold: float | None = None
    max_abs: float | None = None
    relative: float | None = None
    cosine: float | None = None
    psnr_db: float | None = None


def graph_comparison(plan: str) -> Comparison:
    """A plan's ONNX graphs with torch float32."""
    return Comparison("torch float32", "graph", plan)


def fused_comparison(plan: str) -> Comparison:
    """A plan's ONNX graphs as fused for ONNX Runtime on the CPU with torch float32."""
    return Comparison("torch float32", "fused graph", plan)


def engine_comparison(plan: str, target: str) -> Comparison:
    """A plan's engines with torch float32."""
    return Comparison("torch float32", "engine", plan, target)


def build_comparison(plan: str, target: str) -> Comparison:
    """A plan's engines with the ONNX graphs they were built from, without running either."""
    return Comparison("graph", "engine", plan, target)


def ranges_comparison(plan: str) -> Comparison:
    """Ranges measured in float32 with what a plan's ONNX graphs can hold."""
    return Comparison("float32 ranges", "graph", plan)


def pictures_comparison(baseline_plan: str, plan: str) -> Comparison:
    """Pictures of one plan with those of another."""
    return Comparison("pictures", "pictures", plan, baseline_plan=baseline_plan)


_SCHEMA_1 = (
    (re.compile(r"torch float32 -> (?P<plan>\S+) graph"), graph_comparison),
    (re.compile(r"torch float32 -> (?P<plan>\S+) (?P<target>\S+) engine"), engine_comparison),
    (re.compile(r"(?P<plan>\S+) graph -> (?P<target>\S+) engine"), build_comparison),
    (re.compile(r"float32 ranges -> (?P<plan>\S+) graph"), ranges_comparison),
    (re.compile(r"(?P<baseline_plan>\S+) pictures -> (?P<plan>\S+) pictures"), pictures_comparison),
)


def comparison_of_text(text: str) -> Comparison:
    """Parse a comparison of schema 1, which is a text.

    Raises:
        ArtifactError: no comparison of that version.
    """
    for pattern, made in _SCHEMA_1:
        if match := pattern.fullmatch(text):
            return made(**match.groupdict())
    raise ArtifactError(f"the ledger names an unknown comparison `{text[:80]}`", hint="build the bundle again")
