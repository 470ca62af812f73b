"""`l2p-export bench`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from l2p_export.cli.console import (
    Console,
    backend_option,
    dry_run_option,
    example,
    format_bytes,
    json_option,
    parse_size,
    print_json,
    quiet_option,
    store_option,
)
from l2p_export.cli.inputs import InputPath

if TYPE_CHECKING:
    from l2p_export.performance.bench import Bench


@click.command("bench", epilog=example("bench demo-4k.bundle --size 1024x1024 --runs 3"))
@click.argument("bundle", type=InputPath("bundle"))
@click.option("--size", help="WIDTHxHEIGHT in pixels; default: the profile's preferred size.")
@click.option(
    "--caption-tokens", type=click.IntRange(min=1), help="Caption length; default: the profile's preferred length."
)
@click.option(
    "--runs", type=click.IntRange(min=1), default=5, show_default=True, help="Timed calls, after one warm-up call."
)
@click.option("--plan", help="Precision plan; default: the first that the backend runs.")
@backend_option
@click.option("--memory-budget", help="Limit for weights, buffers and activations together, e.g. 6GiB.")
@click.option(
    "--device",
    help="GPU whose peak rates bound the times, a name in `plan --help`; default: that of this machine.",
)
@store_option
@json_option
@dry_run_option
@quiet_option
def command(bundle: Path, *, as_json: bool, dry_run: bool, quiet: bool, **options: Any) -> None:
    """Time BUNDLE's networks and a whole denoising call on this machine, on seeded noise.

    Reports the median, minimum and maximum time of each network, peak memory, and a lower bound of the time on the GPU.
    """
    from l2p_engines.forecast.cards import find_card
    from l2p_export.performance.bench import bench, check_bench
    from l2p_runtime.bundle import open_bundle
    from l2p_runtime.contract.codec import to_json
    from l2p_runtime.memory import parse_bytes

    opened = open_bundle(bundle, options["store"])
    profile = opened.manifest.profiles[0]
    size = options["size"]
    size_px = parse_size(size) if size is not None else (profile.height_px.opt, profile.width_px.opt)
    tokens = options["caption_tokens"] or profile.caption_tokens.opt
    budget = parse_bytes(options["memory_budget"]) if options["memory_budget"] is not None else None
    card = find_card(options["device"]) if options["device"] is not None else None
    call = (opened, options["backend"], options["plan"], size_px, tokens)
    if dry_run:
        plan = check_bench(*call, memory_budget_bytes=budget)
        if as_json:
            sizes = {"width": size_px[1], "height": size_px[0], "caption_tokens": tokens}
            print_json({"bundle": str(bundle), "plan": plan, "runs": options["runs"], **sizes})
        else:
            click.echo(f"would time {options['runs']} calls of {size_px[1]}x{size_px[0]} in {plan}")
        return
    found = bench(*call, options["runs"], Console(quiet=quiet), memory_budget_bytes=budget, card=card)
    if as_json:
        print_json(to_json(found))
        return
    for line in _lines(found):
        click.echo(line)


def _lines(found: Bench) -> Iterator[str]:
    from l2p_export.cli.plan_text import table

    call = found.call
    yield f"{call.width_px}x{call.height_px}, {call.caption_tokens} caption tokens, {found.plan} on {found.device}"
    yield f"{found.backend}; networks ready after {found.load_seconds:.1f} s; peak {format_bytes(found.peak_bytes)}"
    rows: list[tuple[str, ...]] = [("", "median", "minimum", "maximum", "bound", "of the bound")]
    for timing in found.timings:
        bound, share = "", ""
        if timing.bound is not None:
            bound, share = _seconds(timing.bound.seconds), f"{timing.bound.seconds / timing.median:.0%}"
        figures = (timing.median, min(timing.seconds), max(timing.seconds))
        rows.append((timing.network, *map(_seconds, figures), bound, share))
    yield from table(rows, left=1)
    if not found.networks_stay:
        yield "Networks took turns in memory: the time of a step includes loading each of them."
    if found.timings[0].bound is None and found.timings[-1].bound is None:
        yield "No bound: the peak rates of this device are unknown. --device NAME compares with a known GPU."


def _seconds(value: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value * 1e6:.2f} us"
