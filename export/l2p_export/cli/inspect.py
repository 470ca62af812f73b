"""`l2p-export inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from l2p_export.cli.console import example, format_bytes, json_option, print_json, store_option
from l2p_export.cli.inputs import InputPath
from l2p_runtime.bundle import BUILD_LOCK, BUILD_STAGES, STORE_MARKER
from l2p_runtime.contract import MANIFEST_NAME

if TYPE_CHECKING:
    from l2p_runtime.contract import Manifest


@click.command("inspect", epilog=example("inspect merged.safetensors"))
@click.argument("path", type=InputPath("checkpoint or bundle"))
@click.option(
    "--source",
    type=InputPath("source"),
    help="Latent checkpoint that supplies missing tensors and is compared with.",
)
@click.option("--digest", is_flag=True, help="Also hash the trunk, which reads all its values.")
@store_option
@json_option
def command(path: Path, source: Path | None, store: Path | None, *, digest: bool, as_json: bool) -> None:
    """Describe a checkpoint, adapter, LoRA, text encoder or bundle. Only headers are read, except with --digest."""
    if any((path / name).exists() for name in (MANIFEST_NAME, BUILD_LOCK, BUILD_STAGES, STORE_MARKER)):
        facts = _bundle_facts(path, store)
    else:
        from l2p_export.checkpoint.describe import describe

        facts = describe(path, source, digest=digest)
    if as_json:
        print_json(facts)
        return
    for name, value in facts.items():
        if isinstance(value, dict):
            click.echo(f"{name}:")
            for key, item in value.items():
                click.echo(f"  {key}: {_text(key, item)}")
        else:
            click.echo(f"{name}: {_text(name, value)}")


def _bundle_facts(path: Path, store: Path | None) -> dict[str, Any]:
    from l2p_runtime.bundle import open_bundle
    from l2p_runtime.contract.codec import to_json

    bundle = open_bundle(path, store)
    manifest = bundle.manifest
    sizes = {record.path: record.size_bytes for record in manifest.files}
    return {
        "bundle": str(path),
        "digest": bundle.digest,
        "producer": manifest.producer,
        "variant": manifest.model.variant,
        "checkpoint": to_json(manifest.checkpoint),
        "plans": [plan.name for plan in manifest.plans],
        "profiles": [profile.name for profile in manifest.profiles],
        "sampling": to_json(manifest.sampling),
        "trained_grid": _trained_grid(manifest),
        "size_bytes": sum(record.size_bytes for record in manifest.files),
        "store": str(bundle.store) if bundle.store else "none",
        "model": to_json(manifest.model),
        "networks": {
            spec.name: f"{_signature(spec.inputs)} -> {_signature(spec.outputs)}" for spec in manifest.networks
        },
        "engines": {
            f"{record.network} in {record.plan} for {record.target}": f"{format_bytes(sizes[record.engine])}, built by "
            f"version {record.library_version}"
            for record in manifest.engines
        },
        "ledger": {
            f"{entry.comparison}, {entry.network}, {entry.case}": entry.status
            if entry.relative is None
            else f"{entry.status}, relative error {entry.relative:.1e} of {entry.threshold:.0e}"
            for entry in manifest.ledger
        },
    }


def _trained_grid(manifest: Manifest) -> str:
    """Token rows and columns, and whether the bundle states them or only its family does."""
    rows, columns = manifest.model_on().rotary.base_grid
    stated = "" if manifest.base_grid is not None else ", of the family: the checkpoint states none"
    return f"{rows} x {columns} tokens{stated}"


def _signature(tensors: tuple[Any, ...]) -> str:
    return ", ".join(f"{tensor.name} {tensor.describe()} {tensor.dtype}" for tensor in tensors)


def _text(name: str, value: object) -> str:
    if name == "size_bytes" and isinstance(value, int):
        return f"{value:,} ({format_bytes(value)})"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(key, item)}" for key, item in value.items())
    return str(value)
