"""`l2p-export pack`."""

from __future__ import annotations

from pathlib import Path

import click

from l2p_export.cli.console import (
    Console,
    dry_run_option,
    example,
    format_bytes,
    json_option,
    print_json,
    quiet_option,
    store_option,
)
from l2p_export.cli.inputs import InputPath
from l2p_export.cli.outputs import open_bundle_apart, require_writable


@click.command("pack", epilog=example("pack demo-4k.bundle --target onnx-cpu --out packed.bundle"))
@click.argument("bundle", type=InputPath("bundle"))
@click.option(
    "--target",
    help="Keep only the files of this target: onnx-cpu for ONNX graphs, e.g. rtx-sm89 for engines; default: all.",
)
@click.option("--plan", "plans", multiple=True, help="Keep only this precision plan; repeatable.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@store_option
@json_option
@dry_run_option
@quiet_option
def command(
    bundle: Path,
    target: str | None,
    plans: tuple[str, ...],
    out: Path,
    store: Path | None,
    *,
    as_json: bool,
    dry_run: bool,
    quiet: bool,
) -> None:
    """Copy BUNDLE with only the files that a target needs, into a folder that needs no store.

    Every file is hashed as it is copied.
    """
    from l2p_engines.store.output import require_bundle_or_nothing, require_disk
    from l2p_export.build.pack import pack, pack_manifest

    opened = open_bundle_apart(bundle, store, {"--out": out})
    manifest = pack_manifest(opened.manifest, target, plans)
    require_bundle_or_nothing(out)
    size_bytes = sum(record.size_bytes for record in manifest.files)
    facts: dict[str, object] = {"out": str(out), "plans": [plan.name for plan in manifest.plans], "bytes": size_bytes}
    facts["targets"] = list(dict.fromkeys(record.target for record in manifest.engines))
    if dry_run:
        require_writable({"--out": out})
        require_disk(out, size_bytes)
    else:
        facts["digest"] = pack(opened, manifest, out, Console(quiet=quiet)).digest
    if as_json:
        print_json(facts)
    else:
        click.echo(f"would write {out}: {format_bytes(size_bytes)}" if dry_run else out)
