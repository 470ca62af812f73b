"""Compares a checkpoint's shapes with the expected ones; shared by all families."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from l2p_export.families.company import grouped

if TYPE_CHECKING:
    from l2p_export.families.base import Shapes


def shape_faults(shapes: Shapes, expected: Shapes, blocks: Iterable[str] = ()) -> list[str]:
    """Missing, unknown and misshapen tensors, one line each; a block that is missing whole takes one line.

    Unknown tensors of a group that the model does not have take one line too.

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
    unknown, groups = shapes.keys() - expected.keys(), {name.partition(".")[0] for name in expected}
    strangers = {name for name in unknown if name.partition(".")[0] not in groups}
    faults += [f"unknown `{name}`" for name in sorted(unknown - strangers)]
    faults += [f"unknown {names}" for names in grouped(strangers)]
    faults += [
        f"`{name}` has shape {list(shapes[name])}, expected {list(expected[name])}"
        for name in sorted(expected.keys() & shapes.keys())
        if tuple(shapes[name]) != tuple(expected[name])
    ]
    return faults
