"""Options for images beyond the trained grid: positions, the grid itself, and coarse to fine."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from l2p_export.cli.console import parse_size
from l2p_runtime import UsageError
from l2p_runtime.policies import POSITIONS

if TYPE_CHECKING:
    from l2p_runtime.coarse import Coarse

Command = Callable[..., Any]

POSITIONS_TOLD = (
    f"Rotary positions beyond the trained grid: {', '.join(POSITIONS[:6])}; all but auto also with +temperature. "
    "native: as trained; linear: stretched evenly; ntk, yarn, vision-yarn: slow frequencies more than fast ones; "
    "auto: native up to the trained grid, then linear."
)

_OPTIONS = (
    click.option(
        "--positions",
        type=click.Choice(POSITIONS),
        metavar="POLICY",
        help=f"{POSITIONS_TOLD} Default: the profile's.",
    ),
    click.option("--base-grid", metavar="ROWSxCOLUMNS", help="Trained grid in tokens; default: the bundle's."),
    click.option("--coarse", metavar="WIDTHxHEIGHT", help="Draw at this smaller size first and finish at --size."),
    click.option(
        "--renoise", type=float, help="Sigma to which the enlarged coarse image is mixed with noise; default: 0.7."
    ),
    click.option("--fine-steps", type=int, help="Steps at --size after a coarse image; default: 4."),
    click.option("--fine-guidance", type=float, help="Guidance scale of those steps; default: 1, none."),
)


def grid_options(command: Command) -> Command:
    """`--positions`, `--base-grid`, `--coarse` and what belongs to it."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def read_coarse(options: dict[str, Any]) -> Coarse | None:
    """How to draw coarse to fine; None to draw at the full size from the start.

    Raises:
        UsageError: a value out of range, or settings of a coarse image without its size.
    """
    from l2p_runtime.coarse import Coarse

    names = {"renoise": "renoise", "fine_steps": "steps", "fine_guidance": "guidance"}
    given = {name: options[option] for option, name in names.items() if options[option] is not None}
    if options["coarse"] is None:
        if given:
            raise UsageError(
                "--renoise, --fine-steps and --fine-guidance belong to --coarse, which was not given",
                hint="--coarse 1024x1024",
            )
        return None
    height, width = parse_size(options["coarse"], "--coarse")
    return Coarse(height, width, **given)
