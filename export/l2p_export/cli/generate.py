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
    check_machine,
    failures_told,
    farm_progress,
    picture_text,
    pipeline_opened,
    plan_opened,
    read_call,
    read_embeddings_options,
    read_format,
)
from l2p_export.cli.grid_options import grid_options
from l2p_export.cli.inputs import InputPath
from l2p_export.cli.output_options import draws_frames, frame_options, output_options
from l2p_export.cli.outputs import clear_leftovers, open_bundle_apart, require_apart, require_writable
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
def command(bundle: Path | None, out: Path, *, as_json: bool, dry_run: bool, quiet: bool, **options: Any) -> None:
    """Draw one image with BUNDLE, or the frames of a shot, or one image on a Triton server.

    Files store prompt, seed, sampling settings and the bundle's digest as text.
    """
    form = options["progress_format"]
    if as_json and form not in (None, "none"):
        raise UsageError(f"--json and --progress-format {form} both write to stdout; give one of them")
    console = Console(quiet=quiet or form is not None)
    is_shot = draws_frames(options)
    with failures_told(form):
        if options["server"] is not None:
            from l2p_export.cli.generate_remote import draw_remote

            require_apart({"--out": out}, read_embeddings_options(options))
            draw_remote(bundle, out, options, console, as_json=as_json, dry_run=dry_run)
        elif bundle is None:
            raise UsageError(
                "there is neither a BUNDLE nor a --server", hint="l2p-export generate BUNDLE --out FILE.png"
            )
        elif is_shot:
            from l2p_export.cli.generate_frames import draw_shot

            draw_shot(bundle, out, options, console, as_json=as_json, dry_run=dry_run)
        else:
            _draw_image(bundle, out, options, console, as_json=as_json, dry_run=dry_run)


def _draw_image(
    bundle: Path, out: Path, options: Mapping[str, Any], console: Console, *, as_json: bool, dry_run: bool
) -> None:
    """Draw one image: a shot of one frame, whose file is named as it is."""
    from l2p_runtime.frames.names import FramePattern
    from l2p_runtime.frames.ranges import frames_of
    from l2p_runtime.frames.shot import Shot, check_shot, checked_call
    from l2p_runtime.images import write_image

    image = read_format(out, options)
    opened_bundle = open_bundle_apart(bundle, options["store"], {"--out": out}, read_embeddings_options(options))
    call = read_call(options, opened_bundle, image)
    needs = check_shot(Shot(frames_of([0]), FramePattern(out.parent, out.name), call), opened_bundle)
    request = checked_call(opened_bundle.manifest, call)
    height, width = request.size_px
    with plan_opened(opened_bundle, options) as opened:
        check_machine(opened, needs, options)
        text = picture_text(opened, call, request)
        if dry_run:
            require_writable({"--out": out})
        else:
            clear_leftovers(out)
            with pipeline_opened(opened, options, console) as pipe:
                pixels = _draw(pipe, call, request, console, options["progress_format"])
            write_image(out, pixels, text, image)
    if as_json:
        print_json({"out": str(out), "width": width, "height": height, **json.loads(text["parameters"])})
    else:
        click.echo(f"would draw {width}x{height} into {out}" if dry_run else out)


def _draw(
    pipe: Pipeline, call: Mapping[str, Any], request: ImageRequest, console: Console, form: str | None
) -> NDArray[Any]:
    height, width = request.size_px
    steps = request.sampling.steps + (call["coarse"].steps if call["coarse"] else 0)
    tell_farm = farm_progress(form)
    with console.task(f"drawing {width}x{height}", steps, "steps") as advance:

        def progress(done: int, total: int) -> None:
            advance(1)
            tell_farm(done / total)

        return pipe.generate(**call, progress=progress)
