"""`l2p-export generate`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from l2p_export.cli.console import (
    Console,
    backend_option,
    dry_run_option,
    example,
    json_option,
    parse_grid,
    parse_size,
    print_json,
    quiet_option,
    store_option,
)
from l2p_export.cli.grid_options import grid_options, read_coarse
from l2p_export.cli.inputs import InputPath
from l2p_export.cli.outputs import clear_leftovers, open_bundle_apart, require_apart, require_writable
from l2p_runtime import UsageError, __version__
from l2p_runtime.guidance import CONVENTIONS, prompts_of

if TYPE_CHECKING:
    from l2p_runtime.bundle import Bundle
    from l2p_runtime.contract import Sampling
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
@click.option("--bits", type=click.Choice(["8", "16"]), default="8", show_default=True, help="Bits per channel.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="PNG file to write.")
@store_option
@json_option
@dry_run_option
@quiet_option
def command(bundle: Path | None, out: Path, *, as_json: bool, dry_run: bool, quiet: bool, **options: Any) -> None:
    """Draw one image with BUNDLE, or on a Triton server, and write it as PNG.

    The file stores prompt, seed, sampling settings and the bundle's digest as text.
    """
    if options["server"] is not None:
        from l2p_export.cli.generate_remote import draw_remote

        _check_out(out)
        require_apart({"--out": out}, _embeddings(options))
        draw_remote(bundle, out, options, Console(quiet=quiet), as_json=as_json, dry_run=dry_run)
        return
    if bundle is None:
        raise UsageError("there is neither a BUNDLE nor a --server", hint="l2p-export generate BUNDLE --out FILE.png")
    from l2p_export.cli.embeddings import read_embeddings
    from l2p_runtime.coarse import check_coarse
    from l2p_runtime.requests import check_size, image_request

    _check_out(out)
    opened = open_bundle_apart(bundle, options["store"], {"--out": out}, _embeddings(options))
    height, width = _size(options["size"], opened)
    grid, coarse = parse_grid(options["base_grid"]), read_coarse(options)
    model = opened.manifest.model_on(grid)
    if coarse is not None:
        check_size(model, coarse.height, coarse.width)
        check_coarse(coarse, height, width)
    inputs = {
        "negative_prompt": options["negative"],
        "prompt_embeds": read_embeddings(options["embeddings"]),
        "negative_embeds": read_embeddings(options["negative_embeddings"]),
        "rng": options["rng"],
        "dtype": f"uint{options['bits']}",
        "guidance_convention": options["guidance_convention"],
    }
    sampling = {name: options[name] for name in ("steps", "guidance", "shift")}
    request = image_request(
        opened.manifest,
        prompt=options["prompt"],
        height=height,
        width=width,
        seed=options["seed"],
        sampling=sampling,
        fine_guidance=1.0 if coarse is None else coarse.guidance,
        **inputs,
    )
    if dry_run:
        require_writable({"--out": out})
        text = _text(opened, options, request.sampling, _check_machine(opened, request, options))
    else:
        clear_leftovers(out)
        text = _draw(bundle, out, request, (height, width), inputs | sampling, options, Console(quiet=quiet))
    if as_json:
        print_json({"out": str(out), "width": width, "height": height, **json.loads(text["parameters"])})
    else:
        click.echo(f"would draw {width}x{height} into {out}" if dry_run else out)


def _draw(
    bundle: Path,
    out: Path,
    request: ImageRequest,
    size: tuple[int, int],
    inputs: dict[str, Any],
    options: dict[str, Any],
    console: Console,
) -> dict[str, str]:
    """Draw the image and write the PNG file; returns its text chunks."""
    from l2p_runtime import Pipeline
    from l2p_runtime.images.png import write_png

    height, width = size
    budget, plan = options["memory_budget"], options["plan"]
    places = {"backend": options["backend"], "store": options["store"]}
    with Pipeline.open(bundle, plan=plan, memory_budget=budget, **places) as pipe:
        if not pipe.bundle.manifest.checkpoint.trained:
            console.note("the bundle's weights are untrained: its pictures are noise, whatever the prompt")
        text = _text(pipe.bundle, options, request.sampling, pipe.plan)
        coarse = read_coarse(options)
        steps = request.sampling.steps + (coarse.steps if coarse else 0)
        with console.task(f"drawing {width}x{height}", steps, "steps") as advance:
            pixels = pipe.generate(
                options["prompt"],
                height=height,
                width=width,
                seed=options["seed"],
                truncate_prompt=options["truncate_prompt"],
                positions=options["positions"],
                base_grid=parse_grid(options["base_grid"]),
                coarse=coarse,
                progress=lambda done, total: advance(1),
                **inputs,
            )
    write_png(out, pixels, text)
    return text


def _text(bundle: Bundle, options: dict[str, Any], sampling: Sampling, plan: str) -> dict[str, str]:
    """Text chunks of the PNG file."""
    coarse = read_coarse(options)
    parameters = {
        "seed": options["seed"],
        "steps": sampling.steps,
        "guidance": sampling.guidance,
        "shift": sampling.shift,
        "rng": options["rng"],
        "positions": options["positions"] or bundle.manifest.profiles[0].positions,
        "plan": plan,
        "bundle": bundle.digest,
        "base_grid": list(bundle.manifest.model_on(parse_grid(options["base_grid"])).rotary.base_grid),
        **({} if coarse is None else {"coarse": asdict(coarse)}),
        "trained": bundle.manifest.checkpoint.trained,
    }
    return {
        "Software": f"l2p-export {__version__}",
        "prompt": options["prompt"] or "",
        "negative_prompt": options["negative"] or "",
        "seed": str(options["seed"]),
        "bundle": bundle.digest,
        "parameters": json.dumps(parameters),
    }


def _size(text: str | None, bundle: Bundle) -> tuple[int, int]:
    """Height and width in pixels."""
    if text is None:
        profile = bundle.manifest.profiles[0]
        return profile.height_px.opt, profile.width_px.opt
    return parse_size(text)


def _check_machine(bundle: Bundle, request: ImageRequest, options: dict[str, Any]) -> str:
    """The plan that would run; raises what drawing would raise before it loads anything."""
    from l2p_runtime import Pipeline
    from l2p_runtime.memory import parse_bytes
    from l2p_runtime.networks import open_plan
    from l2p_runtime.requests import check_size
    from l2p_runtime.text import bundle_tokenizer

    budget = parse_bytes(options["memory_budget"]) if options["memory_budget"] is not None else None
    texts = [caption for caption in request.captions if isinstance(caption, str)]
    lengths = [len(caption) for caption in request.captions if not isinstance(caption, str)]
    if texts:
        tokenizer = bundle_tokenizer(bundle)
        lengths += [len(tokenizer.tokens(text, truncate=options["truncate_prompt"])) for text in texts]
    opened = open_plan(bundle, options["backend"], 0, options["plan"])
    try:
        tokens = bundle.manifest.model.padded(max(lengths))
        coarse, guidance = read_coarse(options), request.sampling.guidance
        calls = [(request.grid, guidance)]
        if coarse is not None:
            coarse_grid = check_size(bundle.manifest.model, coarse.height, coarse.width)
            calls = [(coarse_grid, guidance), (request.grid, coarse.guidance)]
        for grid, scale in calls:
            prompts = prompts_of(scale)
            Pipeline.check_call(opened, grid, tokens, budget, encodes=bool(texts), prompts=prompts)
    finally:
        opened.backend.device.close()
    return opened.plan


def _embeddings(options: dict[str, Any]) -> dict[str, Path | None]:
    return {"--embeddings": options["embeddings"], "--negative-embeddings": options["negative_embeddings"]}


def _check_out(out: Path) -> None:
    if out.suffix.lower() != ".png":
        raise UsageError(f"--out is `{out}`, expected a name ending in .png")
    if out.is_dir():
        raise UsageError(f"--out `{out}` is a folder, expected a file name")
    if not out.parent.is_dir():
        raise UsageError(f"the folder `{out.parent}` does not exist", hint=f"mkdir -p {out.parent}")
