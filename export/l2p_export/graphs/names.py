"""Names of weights in ONNX graphs that are not stored as published: transposed, or several as one."""

from __future__ import annotations

SUFFIX = ".T"
"""Suffix of a weight that is stored transposed; its published name comes before."""

JOINT = "+"
"""Separates the names of weights that are stored as one: their [in, out] matrices, concatenated along `out`."""

SCALE = "/scale"
"""Suffix of a scale; before it comes the stored name of a weight, or the point at which inputs are measured."""


def published_names(name: str) -> list[str]:
    """The published names of a weight, from its name in an ONNX graph."""
    return name.removesuffix(SUFFIX).split(JOINT)
