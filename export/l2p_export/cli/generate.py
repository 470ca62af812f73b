"""`l2p-export generate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from l2p_export.cli.console import (
    Console,
    dry_run_option,
    json_option,
    parse_size,
    print_json,
    quiet_option,
    store_option,
)
from l2p_runtime import UsageError, __version__
from l2p_runtime.guidance import CONVENTIONS

if TYPE_CHECKING:
    from l2p_runtime.bundle import Bundle
    from l2p_runtime.contract import Sampling
    from l2p_runtime.requests import ImageRequest


@click.command("generate")
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@click.option("--server", metavar="URL", help="Draw on this Triton server: grpc://host:8001 or http://host:8000.")
@click.option("--prompt", help="Prompt; needs a bundle with a text encoder. With --embeddings, only a description.")
@click.option("--negative", help="Negative prompt; needs a bundle with a text encoder.")
@click.option("--embeddings", type=click.Path(path_type=Path), help="Prompt embeddings [L, C], .npy or .safetensors.")
@click.option(
    "--negative-embeddings",
    type=click.Path(path_type=Path),
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
@click.option("--rng", type=click.Choice(["philox", "torch-cpu"]), default="philox", show_default=True)
@click.option("--positions", type=click.Choice(["native", "ntk", "yarn"]), help="RoPE scaling; default: the profile's.")
@click.option("--plan", help="Precision plan; default: the bundle's first.")
@click.option("--backend", default="auto", show_default=True)
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
        draw_remote(bundle, out, options, Console(quiet=quiet), as_json=as_json, dry_run=dry_run)
        return
    if bundle is None:
        raise UsageError("there is neither a BUNDLE nor a --server", hint="l2p-export generate BUNDLE --out FILE.png")
    from l2p_export.cli.embeddings import read_embeddings
    from l2p_runtime.bundle import open_bundle
    from l2p_runtime.requests import image_request

    _check_out(out)
    opened = open_bundle(bundle, options["store"])
    height, width = _size(options["size"], opened)
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
        **inputs,
    )
    if dry_run:
        text = _text(opened, options, request.sampling, _check_machine(opened, options))
        _check_prompts(opened, request, truncate=options["truncate_prompt"])
    else:
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
    from l2p_runtime.png import write_png

    height, width = size
    budget, plan = options["memory_budget"], options["plan"]
    places = {"backend": options["backend"], "store": options["store"]}
    with Pipeline.open(bundle, plan=plan, memory_budget=budget, **places) as pipe:
        if not pipe.bundle.manifest.checkpoint.trained:
            console.note("the bundle's weights are untrained: its pictures are noise, whatever the prompt")
        text = _text(pipe.bundle, options, request.sampling, pipe.plan)
        with console.task(f"drawing {width}x{height}", request.sampling.steps, "steps") as advance:
            pixels = pipe.generate(
                options["prompt"],
                height=height,
                width=width,
                seed=options["seed"],
                truncate_prompt=options["truncate_prompt"],
                positions=options["positions"],
                progress=lambda done, total: advance(1),
                **inputs,
            )
    write_png(out, pixels, text)
    return text


def _text(bundle: Bundle, options: dict[str, Any], sampling: Sampling, plan: str) -> dict[str, str]:
    """Text chunks of the PNG file."""
    parameters = {
        "seed": options["seed"],
        "steps": sampling.steps,
        "guidance": sampling.guidance,
        "shift": sampling.shift,
        "rng": options["rng"],
        "positions": options["positions"] or bundle.manifest.profiles[0].positions,
        "plan": plan,
        "bundle": bundle.digest,
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


def _check_machine(bundle: Bundle, options: dict[str, Any]) -> str:
    """The plan that would run; raises what drawing would raise before it loads anything."""
    from l2p_runtime.memory import parse_bytes
    from l2p_runtime.networks import open_plan

    if options["memory_budget"] is not None:
        parse_bytes(options["memory_budget"])
    return open_plan(bundle, options["backend"], 0, options["plan"]).plan


def _check_prompts(bundle: Bundle, request: ImageRequest, *, truncate: bool) -> None:
    """Tokenize the prompts; refuses ones that are too long."""
    from l2p_runtime.text import bundle_tokenizer

    texts = [caption for caption in request.captions if isinstance(caption, str)]
    if texts:
        tokenizer = bundle_tokenizer(bundle)
        for text in texts:
            tokenizer.tokens(text, truncate=truncate)


def _check_out(out: Path) -> None:
    if out.suffix.lower() != ".png":
        raise UsageError(f"--out is `{out}`, expected a name ending in .png")
    if out.is_dir():
        raise UsageError(f"--out `{out}` is a folder, expected a file name")
    if not out.parent.is_dir():
        raise UsageError(f"the folder `{out.parent}` does not exist", hint=f"mkdir -p {out.parent}")
