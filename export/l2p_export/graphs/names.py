"""What graphs call weights that they store otherwise than published: transposed, or several as one."""

from __future__ import annotations

SUFFIX = ".T"
"""Ends the name of a weight that is stored transposed; what stands before is its published name."""

JOINT = "+"
"""Between the names of weights that are stored as one, [in, out] of each behind the other along `out`."""

SCALE = "/scale"
"""Ends the name of a scale; before it stands a weight as it is stored, or the point that inputs are measured at."""


def published_names(name: str) -> list[str]:
    """The published names of what a graph stores as one weight."""
    return name.removesuffix(SUFFIX).split(JOINT)
