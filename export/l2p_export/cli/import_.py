"""`l2p-export import`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from l2p_export.cli.console import Console, dry_run_option, example, format_bytes, json_option, print_json, quiet_option
from l2p_export.cli.inputs import InputPath, lora_option
from l2p_export.cli.outputs import clear_leftovers, require_apart, require_writable
from l2p_runtime import UsageError


@click.command("import", epilog=example("import merged.safetensors --lora style.safetensors:0.8 --out new.safetensors"))
@click.argument("checkpoint", type=InputPath("checkpoint"))
@click.option(
    "--source",
    type=InputPath("source"),
    help="Latent checkpoint or pipeline folder that supplies missing tensors.",
)
@lora_option
@click.option("--skip-text-encoder-lora", is_flag=True, help="Leave out what a LoRA changes in a text encoder.")
@click.option(
    "--spelling",
    type=click.Choice(["published", "node-ui"]),
    default="published",
    show_default=True,
    help="Key names to write; node-ui: those of ComfyUI.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help=".safetensors file to write.")
@json_option
@dry_run_option
@quiet_option
def command(
    checkpoint: Path,
    source: Path | None,
    loras: tuple[str, ...],
    spelling: str,
    out: Path,
    *,
    skip_text_encoder_lora: bool,
    as_json: bool,
    dry_run: bool,
    quiet: bool,
) -> None:
    """Convert CHECKPOINT, in the key names of any known tool, into one canonical file.

    CHECKPOINT is a file, a folder, or a model's folder in a Hugging Face cache. It may hold only adapters (with
    --source), or FP8 weights with scales.
    """
    from l2p_export.checkpoint.convert import output_bytes, require_room, write_checkpoint
    from l2p_export.checkpoint.loading import company_note, load_model
    from l2p_export.checkpoint.lora import parse_lora, trunk_layers_touched

    _check_out(out)
    requests = [parse_lora(text, skip_text_encoder=skip_text_encoder_lora) for text in loras]
    read = {"CHECKPOINT": checkpoint, "--source": source, "--lora": [request.path for request in requests]}
    require_apart({"--out": out}, read)
    loaded = load_model(checkpoint, source, requests)
    require_apart({"--out": out}, {"a file that belongs to them": loaded.files})
    total = output_bytes(loaded.checkpoint.tensors)
    facts: dict[str, Any] = {
        "out": str(out),
        "variant": loaded.model.spec.variant,
        "tensors": len(loaded.checkpoint.tensors),
        "size_bytes": total,
        "equal_layers": list(loaded.equal_layers),
        "trunk_layers": list(loaded.model.spec.trunk_layers),
        "passed_over": list(loaded.checkpoint.company),
    }
    console = Console(quiet=quiet)
    for note in (note for lora in loaded.loras for note in lora.notes):
        console.note(note)
    if loaded.checkpoint.company:
        console.note(company_note(loaded.checkpoint))
    touched = trunk_layers_touched(loaded.loras, loaded.model.network_shapes("trunk"))
    if touched:
        console.note(f"the LoRA changes frozen layers and makes another trunk: {', '.join(touched)}")
    if dry_run:
        require_writable({"--out": out})
        require_room(loaded, out)
    else:
        clear_leftovers(out)
        with console.task(f"writing {out.name}", total) as advance:
            facts["trunk_sha256"] = write_checkpoint(loaded, out, _target(spelling), advance)
    if as_json:
        print_json(facts)
    else:
        click.echo(f"would write {out}: {facts['tensors']} tensors, {format_bytes(total)}" if dry_run else out)


def _target(spelling: str) -> Any:  # the literal type of `convert.TargetSpelling`, checked by click
    return spelling


def _check_out(out: Path) -> None:
    if out.suffix != ".safetensors" or out.is_dir():
        raise UsageError(f"--out is `{out}`, expected a file name ending in .safetensors")
    if not out.parent.is_dir():
        raise UsageError(f"the folder `{out.parent}` does not exist", hint=f"mkdir -p {out.parent}")
