"""`l2p-export calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from l2p_calib.statistics import Statistics


@click.command("calibrate")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompts", type=click.Path(path_type=Path), help="One a line; those of the package by default.")
@click.option("--samples", type=int, default=16, show_default=True, help="Denoising calls to measure.")
@click.option("--size", "sizes", multiple=True, metavar="WxH", help="Of the pictures; repeatable.")
@click.option("--seed", type=click.IntRange(0, 2**63), default=0, show_default=True, help="Of the first picture.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="File to write, for `build --statistics`.")
@store_option
@json_option
@dry_run_option
@quiet_option
def command(
    bundle: Path,
    prompts: Path | None,
    samples: int,
    sizes: tuple[str, ...],
    seed: int,
    out: Path,
    store: Path | None,
    *,
    as_json: bool,
    dry_run: bool,
    quiet: bool,
) -> None:
    """Measure what values the layers of BUNDLE take, in float32, on pictures that it draws.

    A calibration that was stopped goes on behind the last network that was finished.
    """
    from l2p_export.calibration import calibrate, plan_calibration
    from l2p_runtime.bundle import open_bundle

    parsed = [parse_size(size) for size in sizes]
    opened = open_bundle(bundle, store)
    plan = plan_calibration(opened, out, prompts=prompts, samples=samples, sizes=parsed, seed=seed)
    if dry_run:
        if as_json:
            print_json({"statistics": str(out), "source": plan.source})
        else:
            click.echo(f"would measure {plan.source}, and write {out}")
        return
    found = calibrate(plan, Console(quiet=quiet))
    if as_json:
        print_json(_result(found, out))
    else:
        click.echo(out)


def _result(found: Statistics, out: Path) -> dict[str, object]:
    networks = {}
    for item in found.networks:
        largest = max(item.points, key=lambda point: point.ranges.peak)
        networks[item.network] = {
            "sha256": item.sha256,
            "calls": item.calls,
            "points": len(item.points),
            "peak": largest.ranges.peak,
            "peak_at": largest.point,
        }
    return {"statistics": str(out), "source": found.source, "networks": networks}
