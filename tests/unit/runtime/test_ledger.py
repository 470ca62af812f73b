"""What a ledger compares with what, as fields and as text."""

from __future__ import annotations

import pytest

from l2p_runtime.contract import (
    Comparison,
    build_comparison,
    engine_comparison,
    graph_comparison,
    pictures_comparison,
    ranges_comparison,
)
from l2p_runtime.contract.codec import from_json, to_json
from l2p_runtime.contract.ledger import comparison_of_text
from l2p_runtime.errors import ArtifactError

COMPARISONS = {
    "torch float32 -> fp16 graph": graph_comparison("fp16"),
    "torch float32 -> fp8-mine rtx1.7-sm89 engine": engine_comparison("fp8-mine", "rtx1.7-sm89"),
    "fp16 graph -> rtx1.7-portable engine": build_comparison("fp16", "rtx1.7-portable"),
    "float32 ranges -> fp16-plain graph": ranges_comparison("fp16-plain"),
    "fp32 pictures -> fp8 pictures": pictures_comparison("fp32", "fp8"),
}


@pytest.mark.parametrize(("text", "comparison"), COMPARISONS.items())
def test_texts_of_comparisons(text: str, comparison: Comparison) -> None:
    assert str(comparison) == text
    assert comparison_of_text(text) == comparison
    assert from_json(Comparison, to_json(comparison)) == comparison


@pytest.mark.parametrize("text", ["", "a -> b", "torch float32 -> graph", "fp16 graph -> engine", "fp32 -> x pictures"])
def test_other_texts(text: str) -> None:
    with pytest.raises(ArtifactError, match="unknown comparison"):
        comparison_of_text(text)


@pytest.mark.parametrize(
    "fields",
    [
        {"baseline": "torch float32", "subject": "engine", "plan": "fp16"},
        {"baseline": "torch float32", "subject": "graph", "plan": "fp16", "target": "rtx1.7-sm89"},
        {"baseline": "pictures", "subject": "pictures", "plan": "fp16"},
        {"baseline": "graph", "subject": "engine", "plan": "fp16", "target": "x", "baseline_plan": "fp32"},
        {"baseline": "torch", "subject": "graph", "plan": "fp16"},
    ],
)
def test_fields_that_do_not_belong_together(fields: dict[str, str]) -> None:
    with pytest.raises(ArtifactError):
        from_json(Comparison, fields)
