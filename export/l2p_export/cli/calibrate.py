"""`l2p-export calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from l2p_calib.plans.plan import SWEPT
from l2p_calib.sensitivity import GATE
from l2p_export.cli.console import (
    Console,
    dry_run_option,
    example,
    json_option,
    parse_size,
    print_json,
    quiet_option,
    store_option,
)
from l2p_export.cli.inputs import InputPath
from l2p_export.cli.outputs import clear_leftovers, open_bundle_apart, require_writable

if TYPE_CHECKING:
    from l2p_calib.statistics.ranges import Statistics
    from l2p_export.precision.sweep import SweepResult
    from l2p_runtime.contract import BasePrecision


@click.command("calibrate", epilog=example("calibrate demo-4k.bundle --samples 16 --out statistics.json"))
@click.argument("bundle", type=InputPath("bundle"))
@click.option(
    "--prompts",
    type=InputPath("prompt file"),
    help="Prompt file, one prompt per line; default: the built-in prompts.",
)
@click.option("--samples", type=int, default=16, show_default=True, help="Denoising calls to measure.")
@click.option("--size", "sizes", multiple=True, metavar="WxH", help="Image size in pixels; repeatable.")
@click.option("--seed", type=click.IntRange(0, 2**63), default=0, show_default=True, help="Seed of the first image.")
@click.option("--out", type=click.Path(path_type=Path), help="Statistics file to write, for `build --statistics`.")
@click.option(
    "--sensitivity",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder to write: error of each group of layers in FP8, and a mixed-precision plan for `build --plan`.",
)
@click.option(
    "--gate",
    type=float,
    default=GATE,
    show_default=True,
    help="Maximum relative error of the plan that --sensitivity writes.",
)
@click.option(
    "--precision",
    type=click.Choice(SWEPT),
    default=SWEPT[0],
    show_default=True,
    help="What --sensitivity sweeps: only linear layers, or also query, key and value of attention.",
)
@click.option("--explain", metavar="LAYER", help="Print what the plans of BUNDLE, or a plan file, say about a layer.")
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
    out: Path | None,
    sensitivity: Path | None,
    gate: float,
    precision: BasePrecision,
    explain: str | None,
    store: Path | None,
    *,
    as_json: bool,
    dry_run: bool,
    quiet: bool,
) -> None:
    """Measure the value ranges of BUNDLE's layers in float32, on images that it draws.

    A stopped calibration resumes after the last completed network.
    """
    if explain is not None:
        _explain(bundle, explain, store, as_json=as_json)
        return
    if out is None:
        raise click.UsageError("--out is missing: the file to write statistics to")
    from l2p_calib.sensitivity import require_gate
    from l2p_export.precision.calibrate import calibrate, check_calibration, work_folder

    parsed = [parse_size(size) for size in sizes]
    written = {"--out": out, "--sensitivity": sensitivity, "the work folder of --out": work_folder(out)}
    opened = open_bundle_apart(bundle, store, written, {"--prompts": prompts})
    job = check_calibration(opened, out, prompts=prompts, samples=samples, sizes=parsed, seed=seed)
    require_gate(gate)
    if dry_run:
        require_writable(written)
        if as_json:
            folder = {"sensitivity": str(sensitivity)} if sensitivity else {}
            print_json({"statistics": str(out), "source": job.source, **folder})
        else:
            click.echo(f"would measure {job.source}, and write {out}" + (f" and {sensitivity}" if sensitivity else ""))
        return
    clear_leftovers(*written.values())
    console = Console(quiet=quiet)
    swept: list[SweepResult] = []

    def sweep(folder: Path, found: Statistics) -> None:
        from l2p_export.precision.sweep import sweep_bundle

        if sensitivity is not None:
            swept.append(sweep_bundle(job, folder, found, sensitivity, gate, console, precision))

    found = calibrate(job, console, sweep)
    if as_json:
        print_json(_result(found, out) | (_swept(swept[0]) if swept else {}))
    else:
        for path in (out, *(swept[0].files if swept else ())):
            click.echo(path)


def _explain(path: Path, layer: str, store: Path | None, *, as_json: bool) -> None:
    from l2p_export.precision.explain import explain, explained_lines
    from l2p_runtime.contract.codec import to_json

    found = explain(path, layer, store)
    if as_json:
        print_json({"layer": layer, "plans": to_json(found)})
    else:
        for item in found:
            for line in explained_lines(item):
                click.echo(line)


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


def _swept(swept: SweepResult) -> dict[str, object]:
    found = swept.found
    step = next(step for step in found.steps if step.kept == found.kept)
    return {
        "sensitivity": {
            "files": [str(path) for path in swept.files],
            "gate": found.gate,
            "groups": len(found.groups),
            "kept": [item.group for item in found.groups if item.is_kept],
            "error": step.deviation.error,
            "image_psnr_db": step.deviation.image_psnr_db,
            "pictures": found.pictures,
            "right": step.deviation.right,
            "right_in_float32": found.right,
        }
    }
