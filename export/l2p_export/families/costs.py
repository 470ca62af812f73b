"""Costs of a model's networks for forecasts: their tensors, their operations and the dtypes of plans."""

from __future__ import annotations

from typing import TYPE_CHECKING

from l2p_calib.plans.plan import FLOAT8, PLANS
from l2p_engines.forecast.calls import NetworkCost

if TYPE_CHECKING:
    from l2p_export.families import Networks


def network_costs(model: Networks) -> dict[str, NetworkCost]:
    """Network to its tensors, the operations on them, and the tensors that the `fp8` plan has in FP8 and float32."""
    costs = {}
    for spec in model.networks:
        shapes = model.network_shapes(spec.name)
        plan = PLANS["fp8"].of([model.layout(spec.name)])
        dtypes = {name: plan.dtype(name) for name in shapes}
        float8 = frozenset(name for name, dtype in dtypes.items() if dtype == FLOAT8)
        float32 = frozenset(name for name, dtype in dtypes.items() if dtype == "float32")
        costs[spec.name] = NetworkCost(shapes, model.operations(spec.name), float8, float32)
    return costs
