"""`l2p-export generate`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from l2p_export.cli.console import (
    Console,
    backend_option,
    dry_run_option,
    example,
    json_option,
    print_json,
    quiet_option,
    store_option,
)
from l2p_export.cli.drawing import (
    Place,
    failures_told,
    own_process,
    picture_text,
    read_call,
    read_embeddings_options,
    read_format,
)
from l2p_export.cli.generate_frames import draw_shot, tell_shot
from l2p_export.cli.grid_options import grid_options
from l2p_export.cli.inputs import InputPath
from l2p_export.cli.output_options import draws_frames, frame_options, output_options
from l2p_export.cli.outputs import clear_leftovers, require_apart, require_writable
from l2p_runtime import UsageError
from l2p_runtime.guidance import CONVENTIONS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from l2p_runtime import Pipeline
    from l2p_runtime.requests import ImageRequest


@click.command(
    "generate",
    epilog=example("generate demo-4k.bundle --prompt 'a red circle' --out picture.png"),
)
@click.argument("bundle", required=False, type=InputPath("bundle"))
@click.option("--server", metavar="URL", help="Draw on this Triton server: grpc://host:8001 or http://host:8000.")
@click.option(
    "--worker",
    metavar="SOCKET",
    type=click.Path(path_type=Path),
    help="Draw in the worker at this socket, which has BUNDLE loaded: l2p-export worker start.",
)
@click.option("--prompt", help="Prompt; needs a bundle with a text encoder. With --embeddings, only a description.")
@click.option("--negative", help="Negative prompt; needs a bundle with a text encoder.")
@click.option("--embeddings", type=InputPath("embeddings file"), help="Prompt embeddings [L, C], .npy or .safetensors.")
@click.option(
    "--negative-embeddings",
    type=InputPath("embeddings file"),
    help="Embeddings of the negative prompt, in the same formats.",
)
@click.option("--truncate-prompt", is_flag=True, help="Truncate prompts that are too long, instead of refusing them.")
@click.option("--size", help="WIDTHxHEIGHT in pixels; default: the profile's preferred size.")
@click.option("--steps", type=int, help="Denoising steps; default: the bundle's.")
@click.option("--guidance", type=float, help="Guidance scale, 1 for none; default: the bundle's.")
@click.option(
    "--guidance-convention",
    type=click.Choice(CONVENTIONS),
    default="l2p",
    show_default=True,
    help="Whose scale --guidance is: with that of diffusers' Z-Image pipeline 0 is none, and 1 is added.",
)
@click.option("--shift", type=float, help="Shift of the sigma schedule; default: the bundle's.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the noise, 0 to 2^64 - 1.")
@click.option(
    "--rng",
    type=click.Choice(["philox", "torch-cpu"]),
    default="philox",
    show_default=True,
    help="Noise of a seed; philox: the same bits on every machine; torch-cpu: that of torch.randn on the CPU.",
)
@grid_options
@click.option("--plan", help="Precision plan; default: the bundle's first.")
@backend_option
@click.option("--memory-budget", help="Limit for weights, buffers and activations together, e.g. 6GiB.")
@output_options
@frame_options
@store_option
@json_option
@dry_run_option
@quiet_option
@click.pass_context
def command(
    ctx: click.Context, /, bundle: Path | None, out: Path, *, as_json: bool, dry_run: bool, quiet: bool, **options: Any
) -> None:
    """Draw one image with BUNDLE, or the frames of a shot, or one image on a Triton server.

    Files store prompt, seed, sampling settings and the bundle's digest as text.
    """
    form = options["progress_format"]
    if as_json and form not in (None, "none"):
        raise UsageError(f"--json and --progress-format {form} both write to stdout; give one of them")
    console = Console(quiet=quiet or form is not None)
    draws_frames(options)
    with failures_told(form):
        if options["server"] is not None:
            from l2p_export.cli.generate_remote import draw_remote

            require_apart({"--out": out}, read_embeddings_options(options))
            draw_remote(bundle, out, options, console, as_json=as_json, dry_run=dry_run)
            return
        if bundle is None:
            raise UsageError(
                "there is neither a BUNDLE nor a --server", hint="l2p-export generate BUNDLE --out FILE.png"
            )
        if options["worker"] is not None:
            from l2p_export.cli.worker_draw import draw_by_worker

            facts = draw_by_worker(ctx, bundle, console)
        else:
            facts = draw(bundle, out, options, own_process(console, form), dry_run=dry_run)
        if draws_frames(options):
            tell_shot(facts, as_json=as_json)
            return
    if as_json:
        print_json(facts)
    else:
        click.echo(f"would draw {facts['width']}x{facts['height']} into {out}" if dry_run else out)


def draw(bundle: Path, out: Path, options: Mapping[str, Any], place: Place, *, dry_run: bool) -> dict[str, Any]:
    """Draw an image, or the frames of a shot.

    Args:
        bundle: the bundle.
        out: file name, of a shot with the frame in it.
        options: of the command line.
        place: where it is drawn.
        dry_run: check everything, and draw nothing.

    Returns:
        What `--json` prints of it.

    Raises:
        UsageError: options of an image that cannot be drawn; nothing was drawn then.
        HostError: it does not fit the machine, or the file cannot be written.
    """
    if draws_frames(options):
        return draw_shot(bundle, out, options, place, dry_run=dry_run)
    return _draw_image(bundle, out, options, place, dry_run=dry_run)


def _draw_image(bundle: Path, out: Path, options: Mapping[str, Any], place: Place, *, dry_run: bool) -> dict[str, Any]:
    """Draw one image: a shot of one frame, whose file is named as it is."""
    from l2p_runtime.frames.names import FramePattern
    from l2p_runtime.frames.ranges import frames_of
    from l2p_runtime.frames.shot import Shot, check_shot, checked_call
    from l2p_runtime.images import write_image

    image = read_format(out, options)
    opened_bundle = place.bundle(bundle, options["store"], {"--out": out}, read_embeddings_options(options))
    call = read_call(options, opened_bundle, image)
    needs = check_shot(Shot(frames_of([0]), FramePattern(out.parent, out.name), call), opened_bundle)
    request = checked_call(opened_bundle.manifest, call)
    height, width = request.size_px
    with place.plan(opened_bundle, options) as opened:
        place.check(opened, needs, options)
        text = picture_text(opened, call, request)
        if dry_run:
            require_writable({"--out": out})
        else:
            out.parent.mkdir(parents=True, exist_ok=True)
            clear_leftovers(out)
            with place.pipeline(opened, options, place.console) as pipe:
                pixels = _draw(pipe, call, request, place)
            write_image(out, pixels, text, image)
    return {"out": str(out), "width": width, "height": height, **json.loads(text["parameters"])}


def _draw(pipe: Pipeline, call: Mapping[str, Any], request: ImageRequest, place: Place) -> NDArray[Any]:
    height, width = request.size_px
    steps = request.sampling.steps + (call["coarse"].steps if call["coarse"] else 0)
    with place.console.task(f"drawing {width}x{height}", steps, "steps") as advance:

        def progress(done: int, total: int) -> None:
            advance(1)
            place.progress(done / total)

        return pipe.generate(**call, progress=progress, cancelled=place.cancelled)
