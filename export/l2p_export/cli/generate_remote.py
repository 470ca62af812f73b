"""`l2p-export generate --server URL`: draws on a Triton server."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from l2p_export.cli.console import Console, parse_grid, parse_size, print_json
from l2p_export.cli.grid_options import read_coarse
from l2p_export.cli.outputs import clear_leftovers, require_file_name, require_writable
from l2p_runtime import UsageError
from l2p_runtime.guidance import own_guidance

_LIVE_SECONDS = 30.0
"""How long a dry run waits for a server to say that it is there."""

_SERVERS_OWN: Mapping[str, object] = {
    "shift": None,
    "rng": "philox",
    "plan": None,
    "backend": "auto",
    "memory_budget": None,
    "store": None,
    "truncate_prompt": False,
}
"""Options that the server's model repository decides, with their defaults."""

_LOCAL: Mapping[str, object] = {
    "worker": None,
    "bits": None,
    "compression": None,
    "color": None,
    "tiled": False,
    "frames": None,
    "make_folder": False,
    "frame_dialect": None,
    "prompts": None,
    "seed_per_frame": False,
    "skip_existing": False,
    "retries": 0,
}
"""Options of what only a BUNDLE draws, with their defaults: a server sends one image of 8 bits."""


def draw_remote(
    bundle: Path | None, out: Path, options: Mapping[str, Any], console: Console, *, as_json: bool, dry_run: bool
) -> None:
    """Draw on a server and write a PNG file.

    Raises:
        UsageError: an option that the server decides, or a request that it refuses.
        HostError: no server answers, or it cannot draw.
    """
    from l2p_export.cli.embeddings import read_embeddings
    from l2p_runtime.client import Client
    from l2p_runtime.client.transport import parse_address
    from l2p_runtime.coarse import check_coarse
    from l2p_runtime.images.png import write_png
    from l2p_runtime.serving import picture_text

    if bundle is not None:
        raise UsageError(f"there is a bundle `{bundle}` and a --server; give one of them")
    own = [f"--{name.replace('_', '-')}" for name, default in _SERVERS_OWN.items() if options[name] != default]
    if own:
        raise UsageError(
            f"{', '.join(own)} cannot be set with --server: the model repository decides it",
            hint="leave it out with --server",
        )
    local = [f"--{name.replace('_', '-')}" for name, default in _LOCAL.items() if options[name] != default]
    if local:
        raise UsageError(
            f"{', '.join(local)} cannot be set with --server, which draws one image of 8 bits",
            hint="draw with a BUNDLE here",
        )
    _check_out(out)
    parse_address(options["server"])
    height, width = parse_size(options["size"]) if options["size"] is not None else (None, None)
    grid, coarse = parse_grid(options["base_grid"]), read_coarse(dict(options))
    if coarse is not None and height is not None and width is not None:
        check_coarse(coarse, height, width)
    guidance = own_guidance(options["guidance"], options["guidance_convention"])
    embeds = read_embeddings(options["embeddings"])
    negative_embeds = read_embeddings(options["negative_embeddings"])
    if dry_run:
        require_writable({"--out": out})
        Client.open(options["server"], shared_memory=False, timeout_s=_LIVE_SECONDS).close()
        if as_json:
            print_json({"out": str(out), "server": options["server"], "width": width, "height": height})
        else:
            click.echo(f"would draw {options['size'] or 'the preferred size'} on {options['server']} into {out}")
        return
    clear_leftovers(out)
    with Client.open(options["server"]) as client, console.task(f"drawing on {options['server']}"):
        reply = client.generate(
            options["prompt"] if embeds is None else None,
            height=height,
            width=width,
            seed=options["seed"],
            steps=options["steps"],
            guidance=guidance,
            negative_prompt=options["negative"],
            prompt_embeds=embeds,
            negative_embeds=negative_embeds,
            positions=options["positions"],
            base_grid=grid,
            coarse=coarse,
        )
    if str(reply.pixels.dtype) != "uint8":
        raise UsageError(
            f"the server sends {reply.pixels.dtype} images, PNG takes uint8",
            hint="use l2p_runtime.client in Python, or a repository written with --dtype uint8",
        )
    if not reply.report["trained"]:
        console.note("the bundle's weights are untrained: its pictures are noise, whatever the prompt")
    text = picture_text(reply.report, options["prompt"], options["negative"])
    write_png(out, reply.pixels, text)
    if as_json:
        sizes = {"width": reply.report["width"], "height": reply.report["height"]}
        print_json({"out": str(out), **sizes, **json.loads(text["parameters"]), "seconds": reply.report["seconds"]})
    else:
        click.echo(out)


def _check_out(out: Path) -> None:
    if out.suffix.lower() != ".png":
        raise UsageError(f"--out is `{out}`, expected a name ending in .png: a server's image is written as PNG")
    require_file_name(out)
