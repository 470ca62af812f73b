"""`l2p-export plan`."""

from __future__ import annotations

from pathlib import Path

import click

from l2p_engines.forecast.calls import PRECISIONS
from l2p_engines.forecast.cards import CARDS
from l2p_engines.profiles import profile_names
from l2p_export.cli.console import example, json_option, parse_size, print_json
from l2p_export.cli.inputs import InputPath
from l2p_runtime import UsageError


@click.command("plan", epilog=example("plan --profile 4k --device 'RTX 4090'"))
@click.argument("checkpoint", required=False, type=InputPath("checkpoint"))
@click.option(
    "--profile",
    "profiles",
    multiple=True,
    help=f"Optimization profile: {', '.join(profile_names())}, or a .toml path; repeatable. Default: the variant's.",
)
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    type=click.Choice(PRECISIONS),
    default=PRECISIONS,
    help="Precision to forecast; repeatable. Default: all.",
)
@click.option(
    "--size",
    "sizes",
    multiple=True,
    help="WIDTHxHEIGHT in pixels; repeatable. Default: the profile's preferred and maximum sizes.",
)
@click.option("--device", help=f"GPU by name: {', '.join(card.name for card in CARDS)}.")
@click.option("--vram", help="Memory of a GPU, e.g. 12GiB, instead of its name.")
@click.option("--memory", help="Host memory to assume, e.g. 24GiB; default: what is free on this machine.")
@click.option(
    "--source",
    type=InputPath("source"),
    help="Latent checkpoint or pipeline folder that supplies missing tensors.",
)
@click.option("--text-encoder", type=InputPath("text encoder"), help="Qwen3 folder, or a pipeline folder with one.")
@json_option
def command(
    checkpoint: Path | None,
    profiles: tuple[str, ...],
    precisions: tuple[str, ...],
    sizes: tuple[str, ...],
    device: str | None,
    vram: str | None,
    memory: str | None,
    source: Path | None,
    text_encoder: Path | None,
    *,
    as_json: bool,
) -> None:
    """Forecast what it takes to build CHECKPOINT and to draw with it, from its header.

    Without CHECKPOINT, the forecast is for the published model of the profile's variant; nothing is downloaded. Reports
    tokens, FLOPs, weights, activations, memory and disk of a build, and what fits a GPU.
    """
    from l2p_engines.forecast.cards import find_card
    from l2p_export.cli.plan_text import forecast_lines
    from l2p_export.performance.forecast import forecast, read_subject
    from l2p_runtime.contract.codec import to_json
    from l2p_runtime.memory import available_host_bytes, parse_bytes

    if device is not None and vram is not None:
        raise UsageError("both --device and --vram were given", hint="give the GPU's name, or only its memory")
    card = find_card(device) if device is not None else None
    vram_bytes = parse_bytes(vram) if vram is not None else card.vram_bytes if card is not None else None
    memory_bytes = parse_bytes(memory) if memory is not None else available_host_bytes()
    sizes_px = tuple(parse_size(text) for text in sizes)
    subject = read_subject(checkpoint, profiles, source, text_encoder)
    found = forecast(subject, precisions, sizes_px, card=card, vram_bytes=vram_bytes, memory_bytes=memory_bytes)
    if as_json:
        facts = to_json(found)
        # Names and shapes of 545 tensors; `inspect` shows them.
        del facts["subject"]["costs"]
        print_json(facts)
        return
    for line in forecast_lines(found):
        click.echo(line)
