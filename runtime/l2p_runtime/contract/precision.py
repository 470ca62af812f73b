"""Base precisions: the built-in plan that a precision plan was made from, independent of its name."""

from __future__ import annotations

from typing import Literal, get_args

BasePrecision = Literal["fp32", "fp16", "fp16-plain", "bf16", "fp8", "fp8-attention", "fp8-plain"]
"""The plan that another was made from. It decides thresholds, forecasts and requirements; a plan's name is free."""

Arithmetic = Literal["fp32", "fp16", "bf16", "fp8"]
"""The narrowest floating-point type of a plan's matrix products: what a GPU must have."""

BASE_PRECISIONS: tuple[BasePrecision, ...] = get_args(BasePrecision)

_ARITHMETIC: dict[BasePrecision, Arithmetic] = {
    "fp32": "fp32",
    "fp16": "fp16",
    "fp16-plain": "fp16",
    "bf16": "bf16",
    "fp8": "fp8",
    "fp8-attention": "fp8",
    "fp8-plain": "fp8",
}


def arithmetic(base: BasePrecision) -> Arithmetic:
    """The narrowest type that plans of this base multiply in."""
    return _ARITHMETIC[base]


def base_of_name(name: str) -> BasePrecision | None:
    """The base of a plan file that does not state it: the plan's name, or its part before the first dash.

    Returns:
        None for a name that follows no base.
    """
    for candidate in (name, name.partition("-")[0]):
        if candidate in BASE_PRECISIONS:
            return candidate
    return None
