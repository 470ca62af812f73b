"""`l2p-export generate --frames RANGE`: draws the frames of a shot."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from l2p_export.cli.console import print_json
from l2p_export.cli.drawing import Place, picture_text, read_call, read_embeddings_options, read_format
from l2p_export.cli.outputs import clear_leftovers, require_writable
from l2p_runtime import FramesError, UsageError
from l2p_runtime.errors import counted
from l2p_runtime.frames.names import parse_pattern
from l2p_runtime.frames.progress import shares
from l2p_runtime.frames.prompts import read_prompts
from l2p_runtime.frames.ranges import frames_of, parse_frames

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from l2p_runtime.contract import ModelSpec
    from l2p_runtime.frames.drawing import FrameEvent, FrameReport
    from l2p_runtime.frames.shot import FrameRequest, Shot, ShotNeeds
    from l2p_runtime.images import ImageFormat
    from l2p_runtime.networks import OpenedPlan

_STORED_BYTES = {"8": 1, "16": 2, "half": 2, "float": 4}
"""Bits per channel to the bytes of a value in a file."""


def draw_shot(bundle: Path, out: Path, options: Mapping[str, Any], place: Place, *, dry_run: bool) -> dict[str, Any]:
    """Draw the frames that options name.

    Returns:
        What `--json` prints of it.

    Raises:
        UsageError: a range, a name, a prompts file or a frame that cannot be drawn; nothing was drawn then.
        HostError: a frame does not fit this machine, or the folder cannot be written; likewise.
    """
    from l2p_runtime.frames.shot import check_shot

    image = read_format(out, options)
    inputs = {**read_embeddings_options(options), "--prompts": options["prompts"]}
    opened_bundle = place.bundle(bundle, options["store"], {"--out": out}, inputs)
    shot = read_shot(out, options, read_call(options, opened_bundle, image))
    needs = check_shot(shot, opened_bundle)
    facts = {"out": str(out), "frames": str(shot.frames), "count": len(shot)}
    with place.plan(opened_bundle, options) as found:
        opened = _with_room(found, needs, image)
        place.check(opened, needs, options)
        if dry_run:
            require_writable({"--out": out})
            return facts | _plan_facts(shot)
        out.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(out)
        failures: list[FrameEvent] = []
        report = _draw(shot, image, opened, options, place, failures)
    failed = [{"frame": event.frame, "out": str(event.path), "reason": str(event.error)} for event in failures]
    return facts | {"written": report.written, "skipped": report.skipped, "failed": failed}


def tell_shot(facts: Mapping[str, Any], *, as_json: bool) -> None:
    """Print what came of a shot.

    Raises:
        FramesError: some frames failed.
    """
    if as_json:
        print_json(facts)
    if "first" in facts:
        if not as_json:
            _tell_plan(facts)
        return
    if facts["failed"]:
        failed = [frame["frame"] for frame in facts["failed"]]
        raise FramesError(
            f"{len(failed):,} of {counted(facts['count'], 'frame')} failed: {frames_of(failed)}",
            hint="run it again with --skip-existing, which draws only these",
        )
    if not as_json:
        there = f", {facts['skipped']:,} were there" if facts["skipped"] else ""
        click.echo(f"{counted(facts['written'], 'frame')} written into {facts['out']}{there}")


def read_shot(out: Path, options: Mapping[str, Any], call: Mapping[str, Any]) -> Shot:
    """The shot that options name.

    Args:
        out: file name with the frame in it.
        options: of the command line.
        call: keyword arguments of `Pipeline.generate`.

    Raises:
        UsageError: a range, a name or a prompts file that is none.
    """
    from l2p_runtime.frames.shot import Shot

    prompts = options["prompts"]
    lines = {} if prompts is None else read_prompts(prompts)
    if options["frames"] is None:
        if options["frame_dialect"] is not None:
            raise UsageError("--frame-dialect is how --frames is read, and there is none")
        frames = frames_of(lines)
    else:
        frames = parse_frames(options["frames"], options["frame_dialect"])
    return Shot(frames, parse_pattern(out), call, lines, prompts, seed_per_frame=options["seed_per_frame"])


def _draw(
    shot: Shot,
    image: ImageFormat,
    opened: OpenedPlan,
    options: Mapping[str, Any],
    place: Place,
    failures: list[FrameEvent],
) -> FrameReport:
    from l2p_runtime.frames.drawing import draw_frames
    from l2p_runtime.frames.shot import checked_call
    from l2p_runtime.images import reads, write_image

    console, is_writable = place.console, False

    def write(request: FrameRequest, pixels: NDArray[Any]) -> None:
        size = checked_call(opened.manifest, request.call)
        write_image(request.path, pixels, picture_text(opened, request.call, size, request.frame), image)

    def is_there(request: FrameRequest) -> bool:
        nonlocal is_writable
        size = request.call["height"], request.call["width"]
        if options["skip_existing"] and reads(request.path, image, size):
            return True
        if not is_writable:
            # Before the first frame is drawn rather than after it.
            require_writable({"--out": request.path})
            is_writable = True
        return False

    with (
        place.pipeline(opened, options, console) as pipe,
        console.phases(f"drawing {counted(len(shot), 'frame')}") as advance,
    ):
        current = ""

        def show(share: float) -> None:
            advance(share, current)
            place.progress(share)

        tell_share = shares(len(shot), show)

        def tell(event: FrameEvent) -> None:
            nonlocal current
            current = f"frame {event.frame}"
            if event.error is not None:
                failures.append(event)
                console.note(f"frame {event.frame} failed: {event.error}")
            tell_share(event)

        return draw_frames(
            pipe, shot, write, is_there=is_there, retries=options["retries"], tell=tell, cancelled=place.cancelled
        )


def _with_room(opened: OpenedPlan, needs: ShotNeeds, image: ImageFormat) -> OpenedPlan:
    """The plan with that room in its memory budget."""
    held_bytes = room_bytes(opened.manifest.model, needs, image)
    return replace(opened, backend=replace(opened.backend, library_bytes=opened.backend.library_bytes + held_bytes))


def room_bytes(model: ModelSpec, needs: ShotNeeds, image: ImageFormat) -> int:
    """Room in a memory budget for the frame that is written while another is drawn, and for embeddings.

    Pixels count as they are drawn and as they are stored.
    """
    import numpy as np

    from l2p_runtime.frames.embeddings import GROUPS_MAX

    pixels = max(rows * columns for (rows, columns), _ in needs.calls) * model.patch_px**2
    # A group is of two texts, and those of the last frames are kept while others are encoded.
    tokens = sum(needs.texts[: 2 * 2 * GROUPS_MAX])
    value_bytes = np.dtype(image.dtype).itemsize + _STORED_BYTES[image.bits]
    return 3 * value_bytes * pixels + 4 * model.caption_width * tokens


def _plan_facts(shot: Shot) -> dict[str, Any]:
    """What would be drawn."""
    pattern, first = shot.pattern, next(iter(shot.frames))
    (last,) = deque(shot.frames, maxlen=1)
    names = {path.name for path in pattern.folder.iterdir()} if pattern.folder.is_dir() else set()
    # A folder holds fewer files than a range may hold frames.
    named = {frame for name in names if (frame := pattern.frame(name)) is not None and frame in shot.frames}
    asked = set(shot.frames) if pattern.digits is None else named
    asked |= {frame for frame in shot.lines if frame in shot.frames}
    there = sum(shot.path(frame).name in names for frame in asked)
    return {"first": str(shot.path(first)), "last": str(shot.path(last)), "existing": there}


def _tell_plan(facts: Mapping[str, Any]) -> None:
    first, last, there = facts["first"], facts["last"], facts["existing"]
    files = f"into {first}" if first == last else f"into {first} to {last}"
    click.echo(f"would draw {counted(facts['count'], 'frame')} {files}; {there:,} of these files exist")
