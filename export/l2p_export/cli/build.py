"""`l2p-export build`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from l2p_engines.profiles import profile_names
from l2p_export.cli.console import (
    Console,
    dry_run_option,
    example,
    format_bytes,
    json_option,
    parse_grid,
    print_json,
    quiet_option,
)
from l2p_export.cli.engine_options import engine_options, read_engine_options
from l2p_export.cli.inputs import InputPath, lora_option
from l2p_export.cli.outputs import clear_leftovers, require_apart, require_writable

if TYPE_CHECKING:
    from l2p_export.build.bundle import BuildJob, Built


@click.command("build", epilog=example("build merged.safetensors --profile 4k --precision fp16 --out 4k.bundle"))
@click.argument("checkpoint", required=False, type=InputPath("checkpoint"))
@click.option(
    "--profile",
    "profiles",
    multiple=True,
    required=True,
    help=f"Optimization profile: {', '.join(profile_names())}, or a .toml path; repeatable.",
)
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    help="fp32 (default), fp16, fp8, fp8-attention, bf16, or for comparison fp16-plain, fp8-plain; repeatable.",
)
@click.option(
    "--plan",
    "plan_files",
    multiple=True,
    type=InputPath("plan file"),
    help="Precision plan file; repeatable.",
)
@click.option(
    "--statistics",
    multiple=True,
    type=InputPath("statistics file"),
    help="Statistics file from `calibrate`; repeatable.",
)
@engine_options
@click.option(
    "--source",
    type=InputPath("source"),
    help="Latent checkpoint or pipeline folder that supplies missing tensors.",
)
@lora_option
@click.option("--skip-text-encoder-lora", is_flag=True, help="Leave out what a LoRA changes in a text encoder.")
@click.option("--text-encoder", type=InputPath("text encoder"), help="Qwen3 folder, or a pipeline folder with one.")
@click.option("--store", type=click.Path(path_type=Path), help="Folder of files that bundles share; created if absent.")
@click.option(
    "--base-grid",
    metavar="ROWSxCOLUMNS",
    help="Trained grid in tokens; default: the profile's, the checkpoint's, or the family's.",
)
@click.option("--jobs", default=1, show_default=True, help="Processes that trace networks, one core each.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Bundle folder to write; default: named after the checkpoint."
)
@json_option
@dry_run_option
@quiet_option
def command(
    checkpoint: Path | None,
    profiles: tuple[str, ...],
    precisions: tuple[str, ...],
    plan_files: tuple[Path, ...],
    statistics: tuple[Path, ...],
    source: Path | None,
    loras: tuple[str, ...],
    text_encoder: Path | None,
    store: Path | None,
    base_grid: str | None,
    jobs: int,
    out: Path | None,
    *,
    skip_text_encoder_lora: bool,
    as_json: bool,
    dry_run: bool,
    quiet: bool,
    **engine_arguments: Any,
) -> None:
    """Build a verified bundle from CHECKPOINT: ONNX graphs, and engines when --target or --backend asks for them.

    Without CHECKPOINT, the demo model is built. For 16 and 64 px patches it is a small trained model with its text
    encoder, which draws plain coloured shapes. For other patches it is untrained, with seeded weights, and draws noise.

    A stopped build resumes where it stopped. A build with nothing new does nothing.
    """
    from l2p_export.build.bundle import build, check_build, check_machine
    from l2p_export.checkpoint.lora import parse_lora

    inputs: dict[str, Any] = {"source": source, "loras": loras, "text_encoder": text_encoder, "store": store}
    inputs["skip_text_encoder_lora"] = skip_text_encoder_lora
    inputs |= {"plan_files": plan_files, "statistics": statistics, "jobs": jobs}
    inputs["base_grid"] = parse_grid(base_grid)
    written = {"--out": out, "--store": store, "--timing-cache": engine_arguments["timing_cache"]}
    read: dict[str, Any] = {"CHECKPOINT": checkpoint, "--source": source, "--text-encoder": text_encoder}
    read |= {"--lora": [parse_lora(text).path for text in loras], "--plan": plan_files, "--statistics": statistics}
    read["--profile"] = [name for name in profiles if name not in profile_names()]
    require_apart(written, read)
    inputs["engines"] = read_engine_options(**engine_arguments)
    with check_build(checkpoint, profiles, precisions, out, **inputs) as plan:
        require_apart(written | {"--out": plan.out}, read)
        if dry_run:
            require_writable(written | {"--out": plan.out})
            check_machine(plan)
            _print_job(plan, as_json=as_json)
            return
        clear_leftovers(written["--timing-cache"])
        console = Console(quiet=quiet)
        built = build(plan, console)
    if not built.is_new:
        done = f"made again: {', '.join(built.made)}" if built.made else "nothing to do"
        console.done(f"`{built.bundle.root}` is up to date: {done}")
    if as_json:
        print_json(_result(built))
    else:
        click.echo(built.bundle.root)


def _print_job(job: BuildJob, *, as_json: bool) -> None:
    sizes = {item.name: job.weight_bytes(item) for item in job.plans}
    model = job.loaded.model.spec
    if as_json:
        print_json(
            {
                "out": str(job.out),
                "variant": model.variant,
                "parameters": job.loaded.checkpoint.parameters,
                "trained": job.is_trained,
                "weight_bytes": sizes,
                "profiles": [profile.name for profile in job.profiles],
                "targets": [target.spelling for target in job.engines.targets],
            }
        )
        return
    trained = "" if job.is_trained else ", untrained"
    click.echo(f"would write {job.out}")
    click.echo(f"variant {model.variant}, {job.loaded.checkpoint.parameters:,} parameters{trained}")
    for name, size in sizes.items():
        click.echo(f"{name}: {format_bytes(size)} of weights in {len(job.loaded.model.networks)} ONNX graphs")
    for target in job.engines.targets:
        click.echo(f"engines for {target.spelling}: about {format_bytes(sum(sizes.values()))}")


def _result(built: Built) -> dict[str, object]:
    bundle, manifest = built.bundle, built.bundle.manifest
    return {
        "bundle": str(bundle.root),
        "changed": built.is_new,
        "made": list(built.made),
        "digest": bundle.digest,
        "variant": manifest.model.variant,
        "trained": manifest.checkpoint.trained,
        "plans": [plan.name for plan in manifest.plans],
        "targets": list(dict.fromkeys(record.target for record in manifest.engines)),
        "engines": len(manifest.engines),
        "bytes": sum(record.size_bytes for record in manifest.files),
        "bytes_in_store": sum(record.size_bytes for record in manifest.files if record.in_store),
        "ledger": {
            status: sum(entry.status == status for entry in manifest.ledger)
            for status in ("passed", "failed", "not run")
        },
    }
