"""Compares a checkpoint's shapes with the expected ones; shared by all families."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from l2p_export.families.base import Shapes


def shape_faults(shapes: Shapes, expected: Shapes, blocks: Iterable[str] = ()) -> list[str]:
    """Missing, unknown and misshapen tensors, one line each; a block that is missing whole takes one line.

    Args:
        shapes: published name to shape, as found.
        expected: published name to the required shape.
        blocks: names of transformer blocks.
    """
    missing = sorted(expected.keys() - shapes.keys())
    faults = []
    for block in blocks:
        whole = [name for name in expected if name.startswith(f"{block}.")]
        if whole and shapes.keys().isdisjoint(whole):
            faults.append(f"missing `{block}`, all {len(whole)} tensors")
            missing = [name for name in missing if not name.startswith(f"{block}.")]
    faults = sorted([*faults, *(f"missing `{name}`" for name in missing)])
    faults += [f"unknown `{name}`" for name in sorted(shapes.keys() - expected.keys())]
    faults += [
        f"`{name}` has shape {list(shapes[name])}, expected {list(expected[name])}"
        for name in sorted(expected.keys() & shapes.keys())
        if tuple(shapes[name]) != tuple(expected[name])
    ]
    return faults
