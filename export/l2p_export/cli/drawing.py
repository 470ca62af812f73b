"""What `generate` does for one image and for the frames of a shot alike."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from l2p_export.cli.console import Console, parse_grid, parse_size, session
from l2p_export.cli.grid_options import read_coarse
from l2p_export.cli.outputs import open_bundle_apart, require_file_name
from l2p_runtime import L2PError, __version__
from l2p_runtime.frames.progress import failure_line, progress_lines

if TYPE_CHECKING:
    from l2p_runtime import Pipeline
    from l2p_runtime.bundle import Bundle
    from l2p_runtime.frames.shot import ShotNeeds
    from l2p_runtime.images import ImageFormat
    from l2p_runtime.networks import OpenedPlan
    from l2p_runtime.progress import Reporter
    from l2p_runtime.requests import ImageRequest


def read_call(options: Mapping[str, Any], bundle: Bundle, image: ImageFormat) -> dict[str, Any]:
    """Keyword arguments of `Pipeline.generate`, from options of the command line.

    Raises:
        UsageError: an option that cannot be read.
        ArtifactError: a damaged embeddings file.
    """
    from l2p_export.cli.embeddings import read_embeddings

    profile = bundle.manifest.profiles[0]
    height, width = profile.height_px.opt, profile.width_px.opt
    if options["size"] is not None:
        height, width = parse_size(options["size"])
    names = ("prompt", "seed", "steps", "guidance", "shift", "rng", "positions", "truncate_prompt")
    return {
        **{name: options[name] for name in (*names, "guidance_convention")},
        "height": height,
        "width": width,
        "negative_prompt": options["negative"],
        "prompt_embeds": read_embeddings(options["embeddings"]),
        "negative_embeds": read_embeddings(options["negative_embeddings"]),
        "base_grid": parse_grid(options["base_grid"]),
        "coarse": read_coarse(dict(options)),
        "dtype": image.dtype,
    }


def read_format(out: Path, options: Mapping[str, Any]) -> ImageFormat:
    """The file format of an output, in a folder that is there or will be made.

    Raises:
        UsageError: another suffix, a setting that the format does not have, or no folder.
    """
    from l2p_runtime.images import image_format

    found = image_format(out, **{name: options[name] for name in ("bits", "compression", "color", "tiled")})
    require_file_name(out, makes_folder=options["make_folder"])
    return found


def read_embeddings_options(options: Mapping[str, Any]) -> dict[str, Path | None]:
    """The embeddings files that are read, by option."""
    return {"--embeddings": options["embeddings"], "--negative-embeddings": options["negative_embeddings"]}


def picture_text(
    opened: OpenedPlan, call: Mapping[str, Any], image: ImageRequest, frame: int | None = None
) -> dict[str, str]:
    """What a picture's file says of how it was made."""
    bundle, coarse = opened.bundle, call["coarse"]
    parameters = {
        "seed": image.seed,
        "steps": image.sampling.steps,
        "guidance": image.sampling.guidance,
        "shift": image.sampling.shift,
        "rng": call["rng"],
        "positions": call["positions"] or bundle.manifest.profiles[0].positions,
        "plan": opened.plan,
        "backend": opened.backend.name,
        "bundle": bundle.digest,
        "base_grid": list(bundle.manifest.model_on(call["base_grid"]).rotary.base_grid),
        **({} if coarse is None else {"coarse": asdict(coarse)}),
        **({} if frame is None else {"frame": frame, "image_index": image.image_index}),
        "trained": bundle.manifest.checkpoint.trained,
    }
    return {
        "Software": f"l2p-export {__version__}",
        "prompt": call["prompt"] or "",
        "negative_prompt": call["negative_prompt"] or "",
        "seed": str(image.seed),
        "bundle": bundle.digest,
        "parameters": json.dumps(parameters),
    }


@dataclass(frozen=True, slots=True)
class Place:
    """Where a command draws: in its own process, or in a worker that has the bundle loaded.

    Attributes:
        bundle: opens a bundle apart from outputs, as `open_bundle_apart`.
        plan: opens the bundle's plan on its backend, for a block.
        pipeline: a pipeline of that plan, for a block.
        check: refuses what does not fit the memory.
        console: receives progress and notes.
        progress: receives the share that is done.
        cancelled: true stops the drawing.
    """

    bundle: Callable[..., Bundle]
    plan: Callable[[Bundle, Mapping[str, Any]], AbstractContextManager[OpenedPlan]]
    pipeline: Callable[[OpenedPlan, Mapping[str, Any], Reporter], AbstractContextManager[Pipeline]]
    check: Callable[[OpenedPlan, ShotNeeds, Mapping[str, Any]], None]
    console: Reporter
    progress: Callable[[float], None]
    cancelled: Callable[[], bool]


def own_process(console: Console, form: str | None) -> Place:
    """This process, which loads the bundle for one command.

    Args:
        console: shows progress.
        form: how a render farm reads it, as `--progress-format`.
    """
    stops = session().stops

    def cancelled() -> bool:
        stops.again()
        return False

    return Place(
        open_bundle_apart, plan_opened, pipeline_opened, check_machine, console, farm_progress(form), cancelled
    )


@contextmanager
def plan_opened(bundle: Bundle, options: Mapping[str, Any]) -> Iterator[OpenedPlan]:
    """The bundle's plan on its backend, as options say."""
    from l2p_runtime.networks import open_plan

    opened = open_plan(bundle, options["backend"], 0, options["plan"])
    try:
        yield opened
    finally:
        opened.backend.device.close()


@contextmanager
def pipeline_opened(opened: OpenedPlan, options: Mapping[str, Any], console: Reporter) -> Iterator[Pipeline]:
    """A pipeline within the memory budget; says so if its pictures will be noise."""
    from l2p_runtime import Pipeline
    from l2p_runtime.memory import budget_bytes

    with Pipeline.on_backend(opened, budget_bytes(options["memory_budget"])) as pipe:
        if not opened.manifest.checkpoint.trained:
            console.note("the bundle's weights are untrained: its pictures are noise, whatever the prompt")
        yield pipe


def check_machine(opened: OpenedPlan, needs: ShotNeeds, options: Mapping[str, Any]) -> None:
    """Refuse what does not fit this machine, before anything is loaded.

    Raises:
        HostError: an image, the largest network or the text encoder exceeds the budget or the free memory.
        UsageError: engines were not built for a size, or a budget that is no size.
    """
    from l2p_runtime import Pipeline
    from l2p_runtime.memory import budget_bytes

    budget = budget_bytes(options["memory_budget"])
    for (grid, prompts), tokens in needs.calls.items():
        padded = opened.manifest.model.padded(tokens)
        Pipeline.check_call(opened, grid, padded, budget, encodes=bool(needs.texts), prompts=prompts)


def farm_progress(form: str | None) -> Callable[[float], None]:
    """A function that takes the share that is done, and tells it a render farm if one listens."""
    return (lambda fraction: None) if form is None else progress_lines(form, _tell_farm)


@contextmanager
def failures_told(form: str | None) -> Iterator[None]:
    """Tell a render farm why a command failed, where it reads that."""
    try:
        yield
    except L2PError as error:
        if form is not None and (line := failure_line(form, str(error))):
            _tell_farm(line)
        raise


def _tell_farm(line: str) -> None:
    click.echo(line)  # which flushes: a farm reads a pipe
