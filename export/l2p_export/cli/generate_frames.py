"""`l2p-export generate --frames RANGE`: draws the frames of a shot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from l2p_export.cli.console import Console, print_json, session
from l2p_export.cli.drawing import (
    check_machine,
    farm_progress,
    picture_text,
    pipeline_opened,
    plan_opened,
    read_call,
    read_embeddings_options,
    read_format,
)
from l2p_export.cli.outputs import clear_leftovers, open_bundle_apart, require_writable
from l2p_runtime import FramesError, UsageError
from l2p_runtime.errors import counted
from l2p_runtime.frames.names import parse_pattern
from l2p_runtime.frames.progress import shares
from l2p_runtime.frames.prompts import read_prompts
from l2p_runtime.frames.ranges import frames_of, parse_frames

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from l2p_runtime.frames.drawing import FrameEvent, FrameReport
    from l2p_runtime.frames.shot import FrameRequest, Shot, ShotNeeds
    from l2p_runtime.images import ImageFormat
    from l2p_runtime.networks import OpenedPlan


def draw_shot(
    bundle: Path, out: Path, options: Mapping[str, Any], console: Console, *, as_json: bool, dry_run: bool
) -> None:
    """Draw the frames that options name.

    Raises:
        UsageError: a range, a name, a prompts file or a frame that cannot be drawn; nothing was drawn then.
        HostError: a frame does not fit this machine, or the folder cannot be written; likewise.
        FramesError: some frames failed; the others are written.
    """
    from l2p_runtime.frames.shot import check_shot

    image = read_format(out, options)
    inputs = {**read_embeddings_options(options), "--prompts": options["prompts"]}
    opened_bundle = open_bundle_apart(bundle, options["store"], {"--out": out}, inputs)
    shot = read_shot(out, options, read_call(options, opened_bundle, image))
    needs = check_shot(shot, opened_bundle)
    with plan_opened(opened_bundle, options) as found:
        opened = _with_room(found, needs, image)
        check_machine(opened, needs, options)
        if dry_run:
            require_writable({"--out": out})
            _tell_plan(shot, out, as_json=as_json)
            return
        clear_leftovers(out)
        failures: list[FrameEvent] = []
        report = _draw(shot, image, opened, options, console, failures)
    _tell_report(shot, out, report, failures, as_json=as_json)


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
    console: Console,
    failures: list[FrameEvent],
) -> FrameReport:
    from l2p_runtime.frames.drawing import draw_frames
    from l2p_runtime.frames.shot import checked_call
    from l2p_runtime.images import reads, write_image

    stops, is_writable = session().stops, False

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

    def cancelled() -> bool:
        stops.again()
        return False

    with (
        pipeline_opened(opened, options, console) as pipe,
        console.phases(f"drawing {counted(len(shot), 'frame')}") as advance,
    ):
        tell_farm, current = farm_progress(options["progress_format"]), ""

        def show(share: float) -> None:
            advance(share, current)
            tell_farm(share)

        tell_share = shares(len(shot), show)

        def tell(event: FrameEvent) -> None:
            nonlocal current
            current = f"frame {event.frame}"
            if event.error is not None:
                failures.append(event)
                console.note(f"frame {event.frame} failed: {event.error}")
            tell_share(event)

        return draw_frames(
            pipe, shot, write, is_there=is_there, retries=options["retries"], tell=tell, cancelled=cancelled
        )


def _with_room(opened: OpenedPlan, needs: ShotNeeds, image: ImageFormat) -> OpenedPlan:
    """The plan with room in its memory budget for the frame that is written while another is drawn, and for embeddings.

    Pixels count twice, because some formats store others than those that are drawn.
    """
    import numpy as np

    from l2p_runtime.frames.embeddings import GROUPS_MAX

    model = opened.manifest.model
    pixels = max(rows * columns for (rows, columns), _ in needs.calls) * model.patch_px**2
    # A group is of two texts, and those of the last frames are kept while others are encoded.
    tokens = sum(needs.texts[: 2 * 2 * GROUPS_MAX])
    held_bytes = 2 * 3 * np.dtype(image.dtype).itemsize * pixels + 4 * model.caption_width * tokens
    return replace(opened, backend=replace(opened.backend, library_bytes=opened.backend.library_bytes + held_bytes))


def _tell_plan(shot: Shot, out: Path, *, as_json: bool) -> None:
    """Print what would be drawn."""
    there, last, first = 0, None, None
    names = {path.name for path in shot.pattern.folder.iterdir()}
    for frame in shot.frames:
        last = shot.path(frame)
        first = first or last
        there += last.name in names
    if as_json:
        print_json({**_facts(shot, out), "first": str(first), "last": str(last), "existing": there})
        return
    files = f"into {first}" if first == last else f"into {first} to {last}"
    click.echo(f"would draw {counted(len(shot), 'frame')} {files}; {there:,} of these files exist")


def _tell_report(shot: Shot, out: Path, report: FrameReport, failures: list[FrameEvent], *, as_json: bool) -> None:
    """Print what came of the frames.

    Raises:
        FramesError: some failed.
    """
    if as_json:
        failed = [{"frame": event.frame, "out": str(event.path), "reason": str(event.error)} for event in failures]
        counts = {"written": report.written, "skipped": report.skipped, "failed": failed}
        print_json({**_facts(shot, out), **counts})
    if report.failed:
        raise FramesError(
            f"{len(report.failed):,} of {counted(len(shot), 'frame')} failed: {frames_of(report.failed)}",
            hint="run it again with --skip-existing, which draws only these",
        )
    if not as_json:
        there = f", {report.skipped:,} were there" if report.skipped else ""
        click.echo(f"{counted(report.written, 'frame')} written into {out}{there}")


def _facts(shot: Shot, out: Path) -> dict[str, Any]:
    return {"out": str(out), "frames": str(shot.frames), "count": len(shot)}
