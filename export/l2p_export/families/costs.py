"""What a model's networks cost, put together from what its family says of shapes, operations and layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from l2p_calib.plans.plan import FLOAT8, PLANS
from l2p_engines.forecast.calls import NetworkCost

if TYPE_CHECKING:
    from l2p_export.families import Networks


def network_costs(model: Networks) -> dict[str, NetworkCost]:
    """Network to its tensors, what is computed with them, and what plain plans store them in."""
    costs = {}
    for spec in model.networks:
        shapes = model.network_shapes(spec.name)
        plan = PLANS["fp8"].of([model.layout(spec.name)])
        dtypes = {name: plan.dtype(name) for name in shapes}
        float8 = frozenset(name for name, dtype in dtypes.items() if dtype == FLOAT8)
        float32 = frozenset(name for name, dtype in dtypes.items() if dtype == "float32")
        costs[spec.name] = NetworkCost(shapes, model.operations(spec.name), float8, float32)
    return costs
