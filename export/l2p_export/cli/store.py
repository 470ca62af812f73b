"""`l2p-export store`: lists, prunes and checks the folder that bundles share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from l2p_export.cli.console import Console, dry_run_option, example, format_bytes, json_option, print_json, quiet_option
from l2p_export.cli.inputs import InputPath
from l2p_runtime import ArtifactError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from l2p_engines.store.shared import StoreEntry

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


@click.group("store", epilog=example("store ls shared"))
def command() -> None:
    """List, prune or check a store: the folder that `build --store` shares between bundles."""


@command.command("ls", epilog=example("store ls shared"))
@click.argument("store", type=InputPath("store"))
@json_option
def ls(store: Path, *, as_json: bool) -> None:
    """List every completed build stage in STORE, largest first, and how many bundles use it."""
    from l2p_engines.store.shared import list_store

    entries = list_store(store)
    if as_json:
        print_json({"store": str(store), "stages": [_facts(entry) for entry in entries]})
        return
    click.echo(f"{'kind':<8} {'what':<28} {'bytes':>10} {'age':>8}  used by")
    for entry in entries:
        users = f"{len(entry.used_by)} bundles" if len(entry.used_by) != 1 else entry.used_by[0]
        click.echo(
            f"{entry.stage.kind:<8} {entry.stage.label[:28]:<28} {format_bytes(entry.size_bytes):>10} "
            f"{_age(entry.age_seconds):>8}  {users if entry.used_by else '-'}"
        )
    click.echo(f"{len(entries)} stages, {format_bytes(sum(entry.size_bytes for entry in entries))}")


@command.command("prune", epilog=example("store prune shared --older-than 30d --dry-run"))
@click.argument("store", type=InputPath("store"))
@click.option("--older-than", default="0s", show_default=True, help="Only stages of at least this age, e.g. 30d, 12h.")
@json_option
@dry_run_option
def prune(store: Path, older_than: str, *, as_json: bool, dry_run: bool) -> None:
    """Remove the stages that no bundle uses from STORE.

    A bundle counts as long as it is in the folder where it was built. Copies made by `pack` have their own files.
    """
    from l2p_engines.store.shared import prune_store

    gone = prune_store(store, older_than_seconds=_seconds(older_than), dry_run=dry_run)
    _print_gone(store, gone, "would remove" if dry_run else "removed", as_json=as_json)


@command.command("check", epilog=example("store check shared --remove"))
@click.argument("store", type=InputPath("store"))
@click.option("--remove", is_flag=True, help="Remove damaged files; the next build recreates them.")
@json_option
@dry_run_option
@quiet_option
def check(store: Path, *, remove: bool, as_json: bool, dry_run: bool, quiet: bool) -> None:
    """Hash every file in STORE and remove leftovers of killed builds. Exit code 4 when a file is damaged."""
    from l2p_engines.store.shared import check_store, store_bytes

    is_removed = remove and not dry_run
    with Console(quiet=quiet).task("hashing files", store_bytes(store)) as advance:
        found = check_store(store, remove=remove, advance=advance, dry_run=dry_run)
    if as_json:
        print_json(
            {
                "store": str(store),
                "files": found.files,
                "bytes": found.size_bytes,
                "damaged": dict(found.damaged),
                "leftovers" if dry_run else "leftovers_removed": list(found.removed),
            }
        )
    else:
        for path in found.removed:
            click.echo(f"{'would remove' if dry_run else 'removed'} a leftover: {path}")
        for path, what in found.damaged:
            click.echo(f"{'removed' if is_removed else 'damaged'}: {path}: {what}")
        click.echo(f"{found.files} files, {format_bytes(found.size_bytes)}, {len(found.damaged)} damaged")
    if found.damaged:
        raise ArtifactError(
            f"damaged files in the store `{store}`: {len(found.damaged)}" + (", now removed" if is_removed else ""),
            hint="build the bundles that used them again"
            if is_removed
            else f"`l2p-export store check {store} --remove` removes them; then build again",
        )


def _print_gone(store: Path, gone: Sequence[StoreEntry], verb: str, *, as_json: bool) -> None:
    freed = sum(entry.size_bytes for entry in gone)
    if as_json:
        print_json({"store": str(store), "bytes": freed, "stages": [_facts(entry) for entry in gone]})
        return
    for entry in gone:
        click.echo(f"{verb} {entry.stage.kind} {entry.stage.label}, {format_bytes(entry.size_bytes)}")
    click.echo(f"{verb} {len(gone)} stages, {format_bytes(freed)}")


def _facts(entry: StoreEntry) -> dict[str, Any]:
    return {
        "kind": entry.stage.kind,
        "label": entry.stage.label,
        "key": entry.stage.key,
        "bytes": entry.size_bytes,
        "age_seconds": round(entry.age_seconds),
        "files": [record.path for record in entry.stage.files],
        "used_by": list(entry.used_by),
    }


def _seconds(text: str) -> float:
    match = re.fullmatch(r"([0-9]{1,9})\s*([smhdw])", text.strip().lower())
    if match is None:
        raise UsageError(f"--older-than is {text!r}, expected a number and s, m, h, d or w, as 30d")
    return int(match[1]) * _UNITS[match[2]]


def _age(seconds: float) -> str:
    unit = next((unit for unit in ("w", "d", "h", "m") if seconds >= 2 * _UNITS[unit]), "s")
    return f"{seconds / _UNITS[unit]:.0f} {unit}"
