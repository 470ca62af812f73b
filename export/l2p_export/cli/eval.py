"""`l2p-export eval`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from l2p_export.cli.outputs import clear_leftovers, require_apart, require_writable
from l2p_runtime import UsageError

if TYPE_CHECKING:
    from l2p_export.evaluation.drawers import Drawer
    from l2p_export.evaluation.layouts import Layout
    from l2p_export.evaluation.scores import Evaluation, Prompt, Score

_COUNT = 500
_LAYOUT_IMAGES = 4


@click.command("eval", epilog=example("eval demo-4k.bundle --count 100 --out scores"))
@click.argument("model", type=InputPath("model"))
@click.option(
    "--prompts",
    type=InputPath("prompt file"),
    help="File with captions of the small world, one per line; with --layout, a benchmark's prompts.",
)
@click.option("--count", type=click.IntRange(min=1), help=f"Number of captions without --prompts; default: {_COUNT}.")
@click.option(
    "--held-out/--training",
    "held_out",
    default=None,
    help="Held-out captions (default), which training never shows, or training captions.",
)
@click.option(
    "--layout",
    type=click.Choice(["geneval", "dpg"]),
    help="Only draw, into the folders that the benchmark's script reads; --prompts is GenEval's .jsonl file or "
    "DPG-Bench's folder.",
)
@click.option(
    "--images-per-prompt",
    type=click.IntRange(min=1),
    help=f"Images for each prompt of --prompts; default: 1, or {_LAYOUT_IMAGES} with --layout.",
)
@click.option("--size", help="WIDTHxHEIGHT in pixels; default: the model's preferred size.")
@click.option("--steps", type=int, help="Denoising steps; default: the bundle's, or 30 for a source.")
@click.option("--guidance", type=float, help="Guidance scale, 1 for none; default: the bundle's, or 3 for a source.")
@click.option("--shift", type=float, help="Shift of the sigma schedule; default: the model's.")
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed of the first image; it increases by 1 per image."
)
@grid_options
@click.option("--plan", help="Precision plan of a bundle; default: its first.")
@backend_option
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder for images and scores; a stopped run resumes there."
)
@store_option
@json_option
@dry_run_option
@quiet_option
def command(model: Path, out: Path | None, *, as_json: bool, dry_run: bool, quiet: bool, **options: Any) -> None:
    """Draw images with MODEL, and score them.

    MODEL is a bundle, or a pipeline folder as `train source` writes it. On captions of the small world, an exact judge
    decides which images are right. For other prompts, --layout prepares the folders of public benchmarks.
    """
    from l2p_export.evaluation.drawers import DrawOptions, open_drawer

    _check_options(options, out)
    require_apart({"--out": out}, {"MODEL": model, "--store": options["store"], "--prompts": options["prompts"]})
    names = ("steps", "guidance", "shift", "backend", "plan", "store", "positions")
    size = options["size"]
    draw_options = DrawOptions(
        parse_size(size) if size is not None else None,
        base_grid=parse_grid(options["base_grid"]),
        coarse=read_coarse(options),
        **{name: options[name] for name in names},
    )
    console = Console(quiet=quiet)
    wanted = _prompts(options) if options["layout"] is None else _layout(options)
    drawer = open_drawer(model, draw_options)
    _check_prompts(drawer, wanted)
    if drawer.note:
        console.note(drawer.note)
    facts: dict[str, Any] = {
        "model": str(model),
        "out": str(out) if out is not None else None,
        "images": len(wanted) if isinstance(wanted, tuple) else wanted.images,
        "seed": options["seed"],
        **drawer.settings,
    }
    if dry_run:
        require_writable({"--out": out})
        _tell_plan(facts, as_json=as_json)
        return
    clear_leftovers(out)
    if isinstance(wanted, tuple):
        _evaluate(drawer, wanted, out, facts, console, as_json=as_json)
    else:
        _lay_out(drawer, wanted, out, facts, console, as_json=as_json)


def _check_options(options: dict[str, Any], out: Path | None) -> None:
    """Refuse options that contradict each other."""
    layout, prompts = options["layout"], options["prompts"]
    if layout is not None and (prompts is None or out is None):
        raise UsageError(
            f"--layout {layout} needs --prompts and --out", hint="give the benchmark's prompts and a folder"
        )
    if prompts is not None:
        for name, value in (("--count", options["count"]), ("--held-out and --training", options["held_out"])):
            if value is not None:
                raise UsageError(f"--prompts says what to draw, {name} would too", hint="give one of them")
    elif options["images_per_prompt"] is not None:
        raise UsageError("--images-per-prompt needs --prompts", hint="give --count instead")
    if out is not None and out.exists() and not out.is_dir():
        raise UsageError(f"--out `{out}` is a file, expected a folder")


def _prompts(options: dict[str, Any]) -> tuple[Prompt, ...]:
    """Prompts to draw and judge."""
    from l2p_export.evaluation.scores import file_prompts, world_prompts
    from l2p_export.world.judge import require_judge

    require_judge()
    if options["prompts"] is not None:
        return file_prompts(options["prompts"], options["images_per_prompt"] or 1, options["seed"])
    return world_prompts(options["count"] or _COUNT, options["seed"], held_out=options["held_out"] is not False)


def _layout(options: dict[str, Any]) -> Layout:
    """Images to draw for a benchmark."""
    from l2p_export.evaluation.layouts import read_layout

    images = options["images_per_prompt"] or _LAYOUT_IMAGES
    return read_layout(options["layout"], options["prompts"], images, options["seed"])


def _check_prompts(drawer: Drawer, wanted: tuple[Prompt, ...] | Layout) -> None:
    """Refuse prompts that the model cannot read, and sizes that the benchmark cannot."""
    from l2p_export.evaluation.drawers import check_prompts
    from l2p_export.evaluation.layouts import check_size

    if isinstance(wanted, tuple):
        check_prompts(drawer, [(f"the caption {prompt.text!r}", prompt.text) for prompt in wanted])
    else:
        check_size(wanted, drawer.height_px, drawer.width_px)
        check_prompts(drawer, [(picture.place, picture.text) for picture in wanted.pictures])


def _tell_plan(facts: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(facts)
        return
    where = f" into {facts['out']}" if facts["out"] is not None else ""
    click.echo(f"would draw {_said(facts)}{where}")


def _evaluate(
    drawer: Drawer,
    prompts: tuple[Prompt, ...],
    out: Path | None,
    facts: dict[str, Any],
    console: Console,
    *,
    as_json: bool,
) -> None:
    from l2p_export.evaluation.scores import draw_all, evaluate, scores_json, write_evaluation

    found = evaluate(prompts, draw_all(drawer, prompts, out, console))
    scores = {**facts, **scores_json(found)}
    if out is not None:
        write_evaluation(out, found, scores)
    if as_json:
        print_json(scores)
        return
    click.echo(_said(facts))
    for line in _lines(found):
        click.echo(line)


def _lay_out(
    drawer: Drawer, layout: Layout, out: Path | None, facts: dict[str, Any], console: Console, *, as_json: bool
) -> None:
    from l2p_export.evaluation.layouts import write_layout

    if out is None:
        raise UsageError("--layout needs --out")
    drawn = write_layout(layout, drawer, out, console)
    if as_json:
        print_json({**facts, "layout": layout.benchmark, "drawn": drawn})
    else:
        click.echo(out)


def _said(facts: dict[str, Any]) -> str:
    """Settings of the images, in one line."""
    sampling = f"{facts['steps']} steps, guidance {facts['guidance']:g}, shift {facts['shift']:g}"
    return f"{facts['images']} images of {facts['size']}, {sampling}, seeds from {facts['seed']}"


def _lines(found: Evaluation) -> Iterator[str]:
    """Score tables, without categories and parts that no caption has."""
    from l2p_export.evaluation.features import DIMENSIONS
    from l2p_export.evaluation.scores import frechet_reason

    rows = [("", "right", "of", "share", "95 % interval"), _cells("all", found.overall)]
    rows += [_cells(name, score) for name, score in found.categories.items() if score.count]
    rows += [_cells(f"part: {name}", score) for name, score in found.parts.items() if score.count]
    yield from _table(rows)
    frechet = found.frechet
    if frechet.to_renders is None or frechet.between_renders is None:
        yield f"Frechet distance to renders: {frechet_reason(frechet)}"
        return
    yield f"Frechet distance to renders: {frechet.to_renders:.4g}; of renders to renders: {frechet.between_renders:.4g}"
    yield f"On {DIMENSIONS} fixed features, not Inception's: compare it with figures of this command only."


def _cells(name: str, score: Score) -> tuple[str, ...]:
    interval, share = score.interval, score.share
    if interval is None or share is None:
        return name, "0", "0", "", ""
    return (
        name,
        str(score.passed),
        str(score.count),
        f"{share:.1%}",
        f"{interval[0]:.1%} to {interval[1]:.1%}",
    )


def _table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Columns of equal width, names flush left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        name, *cells = (
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join((name, *cells)).rstrip()
