"""Options of what `generate` writes: file formats, and the frames of a shot."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from l2p_export.cli.inputs import InputPath
from l2p_runtime import UsageError
from l2p_runtime.frames.progress import FORMATS
from l2p_runtime.frames.ranges import DIALECTS

Command = Callable[..., Any]

_OUTPUT_OPTIONS = (
    click.option(
        "--out",
        type=click.Path(path_type=Path),
        required=True,
        help="File to write: .png, .tif, .tiff or .exr. With --frames, a name with the frame in it: shot.####.exr, "
        "shot.%04d.exr or shot.$F4.exr; each # or @ is one digit, as in Houdini and Nuke.",
    ),
    click.option("--make-folder", is_flag=True, help="Make the folder of --out if it is not there."),
    click.option(
        "--bits",
        type=click.Choice(["8", "16", "half", "float"]),
        help="Bits per channel; default: half in EXR, else 8.",
    ),
    click.option(
        "--compression", metavar="NAME", help="Compression: zip, piz, dwaa, none and more in EXR; zlib or none in TIFF."
    ),
    click.option("--color", type=click.Choice(["sRGB", "linear"]), help="Encoding; default: linear in EXR, else sRGB."),
    click.option("--tiled", is_flag=True, help="Tiles of 64 x 64 pixels instead of scanlines, in EXR."),
)

_FRAME_OPTIONS = (
    click.option("--frames", metavar="RANGE", help="Frames to draw, as 1-100, 5,7 or 1-100x2."),
    click.option(
        "--frame-dialect",
        type=click.Choice(DIALECTS),
        help="How --frames is read: openjd has 1-100:2; fileseq has 1-100x2, 1-100y2 and overlaps, and its 1-100:2 is "
        "all frames, coarse before fine. Default: what has one meaning.",
    ),
    click.option(
        "--prompts",
        type=InputPath("prompts file"),
        help='Prompts by frame, a JSON object a line: {"frame": 1, "prompt": "a red circle"}; without --frames, all.',
    ),
    click.option("--seed-per-frame", is_flag=True, help="Noise of its own for each frame, by its number."),
    click.option("--skip-existing", is_flag=True, help="Leave frames whose file is whole and of the right size."),
    click.option(
        "--retries", type=click.IntRange(0, 100), default=0, show_default=True, help="Further tries of a failed frame."
    ),
    click.option(
        "--progress-format",
        type=click.Choice(FORMATS),
        help="Progress as lines on stdout that a render farm reads; none: no progress at all. Default: on stderr.",
    ),
)

_OF_FRAMES = ("frame_dialect", "seed_per_frame", "skip_existing", "retries")
"""Options that say nothing of a single image."""


def output_options(command: Command) -> Command:
    """`--out` and the options of file formats."""
    return _with(command, _OUTPUT_OPTIONS)


def frame_options(command: Command) -> Command:
    """`--frames` and what belongs to it."""
    return _with(command, _FRAME_OPTIONS)


def draws_frames(options: Mapping[str, Any]) -> bool:
    """Whether a shot is drawn rather than an image.

    Raises:
        UsageError: options of a shot without frames.
    """
    if options["frames"] is not None or options["prompts"] is not None:
        return True
    if given := [name for name in _OF_FRAMES if options[name]]:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UsageError(f"{names}: there are no --frames", hint="--frames 1-100 --out shot.####.png")
    return False


def _with(command: Command, options: tuple[Command, ...]) -> Command:
    for option in reversed(options):
        command = option(command)
    return command
