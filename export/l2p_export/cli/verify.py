"""`l2p-export verify`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from l2p_export.cli.console import (
    Console,
    backend_option,
    example,
    json_option,
    parse_size,
    print_json,
    quiet_option,
    store_option,
)
from l2p_export.cli.inputs import InputPath
from l2p_runtime.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from l2p_runtime.contract import LedgerEntry


@click.command("verify", epilog=example("verify demo-4k.bundle"))
@click.argument("bundle", type=InputPath("bundle"))
@backend_option
@click.option("--plan", help="Only this precision plan.")
@click.option(
    "--pictures", type=click.IntRange(min=1), help="Also draw this many captions of the small world under each plan."
)
@click.option("--size", help="WIDTHxHEIGHT of these pictures; default: the model's preferred size.")
@store_option
@json_option
@quiet_option
def command(
    bundle: Path,
    backend: str,
    plan: str | None,
    pictures: int | None,
    size: str | None,
    store: Path | None,
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    """Hash every file of BUNDLE and run its reference cases on this machine.

    With --pictures, each plan's pictures are judged and compared with those of the float32 plan, or of the first plan.

    Exit code 4 when a file was changed, 5 when an error exceeds its threshold.
    """
    from l2p_calib.ledger import require_passed
    from l2p_export.proof.verify import verify_bundle
    from l2p_runtime.bundle import open_bundle, verify_files

    size_px = None if size is None else parse_size(size)
    if size_px is not None and pictures is None:
        raise UsageError("--size is that of pictures, and none are asked for", hint="give --pictures too")
    console = Console(quiet=quiet)
    opened = open_bundle(bundle, store)
    asked = None
    if pictures is not None:
        from l2p_export.evaluation.plan_pictures import check_pictures, compare_pictures

        asked = check_pictures(opened, backend, plan, pictures, size_px)
    total = sum(record.size_bytes for record in opened.manifest.files)
    with console.task("hashing files", total) as advance:
        verify_files(opened, advance)
    ledger = verify_bundle(opened, backend, plan, console)
    if asked is not None:
        ledger += compare_pictures(opened, asked, console)
    if as_json:
        from l2p_runtime.contract.codec import to_json

        print_json({"bundle": str(bundle), "digest": opened.digest, "ledger": to_json(ledger)})
    else:
        _print_table(ledger)
    require_passed(ledger, {plan.name: plan.base for plan in opened.manifest.plans})


def _print_table(ledger: Sequence[LedgerEntry]) -> None:
    """One line per entry, with the reason where it did not pass or has no figures."""
    titles = ("comparison", "case", "network")
    rows = [titles, *((str(entry.comparison), entry.case, entry.network) for entry in ledger)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(titles))]
    head = " ".join(title.ljust(width) for title, width in zip(titles, widths, strict=True))
    click.echo(f"{head} {'relative':>9} {'limit':>7} {'max abs':>9} {'PSNR':>7}  status")
    for entry in ledger:
        figures = " " * 35
        if entry.relative is not None and entry.max_abs is not None and entry.psnr_db is not None:
            limit = f"{entry.threshold:.0e}" if entry.threshold is not None else ""
            figures = f"{entry.relative:>9.1e} {limit:>7} {entry.max_abs:>9.1e} {entry.psnr_db:>7.1f}"
        reason = "" if entry.status == "passed" and entry.relative is not None else f": {entry.reason}"
        names = (str(entry.comparison), entry.case, entry.network)
        told = " ".join(name.ljust(width) for name, width in zip(names, widths, strict=True))
        click.echo(f"{told} {figures}  {entry.status}{reason}")
