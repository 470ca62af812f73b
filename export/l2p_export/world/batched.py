"""Renders batches of small-world scenes on the training device: images, and per-cell label shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from l2p_export.world.render import LABELS, SQUARE_HALF_SIDE
from l2p_export.world.scenes import BACKGROUNDS, COLOURS, REACH, SHAPES, Scene

THINGS_MAX = 2
_CELL_PX = 8
_NOWHERE = (0, 0, -100.0, -100.0, 0.1)
"""Placeholder outside of every image, for the second thing of a scene that has only one."""


@dataclass(frozen=True, slots=True)
class SceneTensors:
    """N scenes: background [N], shape and colour of each thing [N,2], its centre and radius in short sides [N,2]."""

    background: Tensor
    shape: Tensor
    colour: Tensor
    x: Tensor
    y: Tensor
    radius: Tensor


def scene_tensors(scenes: Sequence[Scene], device: torch.device) -> SceneTensors:
    """Convert scenes to tensors on a device: indices int64, positions float32."""
    backgrounds, colours = list(BACKGROUNDS), list(COLOURS)
    rows = []
    for scene in scenes:
        things = [
            (SHAPES.index(part.thing.shape), colours.index(part.thing.colour), part.x, part.y, part.radius)
            for part in scene.placed
        ]
        rows.append(things + [_NOWHERE] * (THINGS_MAX - len(things)))
    shape, colour, x, y, radius = torch.tensor(rows, dtype=torch.float64).to(device, torch.float32).unbind(-1)
    background = torch.tensor([backgrounds.index(scene.background) for scene in scenes], device=device)
    return SceneTensors(background, shape.long(), colour.long(), x, y, radius)


def render_batch(scenes: Sequence[Scene], height_px: int, width_px: int, device: torch.device) -> Tensor:
    """As `render`, for N scenes of one size.

    Returns:
        uint8 pixels [N,3,H,W] on the device.
    """
    numbers = scene_tensors(scenes, device)
    backgrounds, colours = (
        torch.tensor(list(table.values()), dtype=torch.float32, device=device) for table in (BACKGROUNDS, COLOURS)
    )
    image = backgrounds[numbers.background][:, :, None, None].expand(-1, -1, height_px, width_px)
    for which in range(THINGS_MAX):
        covered = (0.5 + _inside_px(numbers, which, height_px, width_px)).clamp_(0, 1)
        image = torch.lerp(image, colours[numbers.colour[:, which]][:, :, None, None], covered[:, None])
    return image.round().to(torch.uint8)


def what_lies_where(scenes: Sequence[Scene], rows: int, columns: int, device: torch.device) -> Tensor:
    """Share of each grid cell that each background and each thing covers.

    Args:
        scenes: with the aspect ratio of the grid.
        rows: cells from top to bottom.
        columns: cells from left to right.
        device: where the result is.

    Returns:
        [N, rows, columns, len(LABELS)] float32, multiples of 1 / `_CELL_PX`^2 that sum to 1 over the last axis.
    """
    numbers = scene_tensors(scenes, device)
    height, width = rows * _CELL_PX, columns * _CELL_PX
    # Labels are the backgrounds, then the things by colour and shape.
    label = numbers.background[:, None, None].expand(-1, height, width)
    for which in range(THINGS_MAX):
        own = len(BACKGROUNDS) + numbers.colour[:, which] * len(SHAPES) + numbers.shape[:, which]
        label = torch.where(_inside_px(numbers, which, height, width) > 0, own[:, None, None], label)
    cells = torch.unflatten(torch.unflatten(label, 1, (rows, _CELL_PX)), 3, (columns, _CELL_PX))
    shares = [(cells == index).to(torch.float32).mean((2, 4)) for index in range(len(LABELS))]
    return torch.stack(shares, -1)


def _inside_px(numbers: SceneTensors, which: int, height_px: int, width_px: int) -> Tensor:
    """Depth [N,H,W] of each pixel inside one thing of each scene: a batched `render.inside_px`."""
    device, short_px = numbers.x.device, min(height_px, width_px)
    y, x = (torch.arange(size, dtype=torch.float32, device=device) + 0.5 for size in (height_px, width_px))
    centre_x, centre_y, radius = (
        (values[:, which] * short_px)[:, None, None] for values in (numbers.x, numbers.y, numbers.radius)
    )
    x, y = x[None, None, :] - centre_x, y[None, :, None] - centre_y
    shape = numbers.shape[:, which][:, None, None]
    circle = radius - torch.hypot(x, y)
    square = SQUARE_HALF_SIDE * radius - torch.maximum(x.abs(), y.abs())
    triangle = REACH * radius / 2 - torch.maximum(math.sqrt(3) / 2 * x.abs() - y / 2, y)
    by_shape = {"circle": circle, "square": square, "triangle": triangle}
    depth = by_shape[SHAPES[0]]
    for index, name in enumerate(SHAPES[1:], 1):
        depth = torch.where(shape == index, by_shape[name], depth)
    return depth
