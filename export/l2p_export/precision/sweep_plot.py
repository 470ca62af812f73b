"""Plots a sweep: the error of each group on its own, and the error that remains when the worst are kept."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from l2p_runtime.files import atomic_file

if TYPE_CHECKING:
    from l2p_calib.sensitivity import Sensitivity

_INCHES_A_GROUP = 0.16
_KEPT, _ROUNDED = "tab:orange", "tab:blue"


def has_matplotlib() -> bool:
    """Whether a plot can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


def write_plot(path: Path, found: Sensitivity) -> None:
    """Write the plot of a sweep as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = found.groups[::-1]
    figure = Figure(figsize=(10, max(4.0, _INCHES_A_GROUP * len(groups))), layout="constrained")
    left, right = figure.subplots(1, 2)
    colours = [_KEPT if item.is_kept else _ROUNDED for item in groups]
    left.barh([item.group for item in groups], [item.deviation.error for item in groups], color=colours)
    left.tick_params(axis="y", labelsize=6)
    left.set(xlabel="relative error, only this group in FP8", title="orange: kept in float16")
    steps = [(step.kept, step.deviation.error) for step in found.steps]
    right.plot(*zip(*steps, strict=True), marker="o")
    right.axhline(found.gate, color="grey", linestyle="--")
    right.set(xlabel="groups kept in float16, the worst first", ylabel="relative error", title=f"gate {found.gate:g}")
    with atomic_file(path) as file:
        FigureCanvasAgg(figure).print_png(file)
