"""`l2p-export train source | corpus | transfer`: trains a source, draws a corpus, transfers a source to pixel space."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from l2p_export.cli.console import (
    Console,
    dry_run_option,
    example,
    json_option,
    parse_grid,
    parse_size,
    print_json,
    quiet_option,
)
from l2p_export.cli.grid_options import POSITIONS_TOLD
from l2p_export.cli.inputs import InputPath
from l2p_export.cli.outputs import clear_leftovers, require_apart, require_writable
from l2p_export.cli.train_text import forecast_lines
from l2p_runtime import CancelledError, UsageError
from l2p_runtime.policies import POSITIONS

if TYPE_CHECKING:
    from l2p_export.training.loop.distributed import ProcessGroup
    from l2p_export.training.transfer.spec import TransferSpec

_PUBLISHED_SIDE_PX = {"1k": 1024, "4k": 4096, "8k": 8192, "10k": 10240}
"""Side of the square images that the published adapters were trained on (docs/model.md, "Training recipe")."""


device_option = click.option("--device", help="cpu, cuda or cuda:1; default: a GPU if there is one.")


@click.group("train", epilog=example("train source --out source"))
def command() -> None:
    """Train a small latent source, draw a corpus with a source, or transfer a source to pixel space."""


@command.command("source", epilog=example("train source --steps 20000 --out source"))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Pipeline folder to write.")
@click.option("--work", type=click.Path(path_type=Path), help="Training states; OUT.training by default.")
@click.option("--init", type=InputPath("source"), help="Source to initialize from; its autoencoder is kept.")
@click.option("--samples", default=32, show_default=True, help="Images drawn and judged at each save; 0 for none.")
@click.option("--scenes", default=16_000, show_default=True, help="Number of rendered training images.")
@click.option(
    "--size-px",
    "sizes_px",
    type=int,
    multiple=True,
    default=(128,),
    show_default=True,
    help="Side of the training images; repeatable.",
)
@click.option("--autoencoder-steps", default=1500, show_default=True, help="Training steps of the autoencoder.")
@click.option("--steps", default=20_000, show_default=True, help="Training steps of text encoder and transformer.")
@click.option("--batch", default=32, show_default=True, help="Images per step.")
@click.option("--learning-rate", default=1.5e-3, show_default=True)
@click.option("--save-every", default=400, show_default=True, help="Steps between saved training states.")
@click.option("--seed", default=0, show_default=True)
@device_option
@json_option
@dry_run_option
@quiet_option
def source_command(
    out: Path, work: Path | None, init: Path | None, *, as_json: bool, dry_run: bool, quiet: bool, **options: Any
) -> None:
    """Train a small latent source on the small world, and write it as a diffusers pipeline folder.

    Autoencoder, text encoder and transformer are the published architectures at a small size. A stopped run resumes
    with the same command.
    """
    import torch

    from l2p_export.training.loop.distributed import chosen_device
    from l2p_export.training.loop.loop import Schedule
    from l2p_export.training.sheet import SampleSpec
    from l2p_export.training.source.train import SourceSpec, check_initial, train_source

    steps, save_every, seed = options["steps"], options["save_every"], options["seed"]
    autoencoder_steps = options["autoencoder_steps"]
    spec = SourceSpec(
        scenes=options["scenes"],
        autoencoder=Schedule(
            steps=autoencoder_steps,
            batch=32,
            learning_rate=2e-3,
            warmup_steps=50,
            cooldown_steps=autoencoder_steps // 3,
            weight_decay=0.0,
            ema=0.995,
            save_every=save_every,
            seed=seed,
        ),
        transformer=Schedule(
            steps=steps,
            batch=options["batch"],
            learning_rate=options["learning_rate"],
            warmup_steps=min(200, steps),
            cooldown_steps=steps // 5,
            ema=0.998,
            save_every=save_every,
            seed=seed,
        ),
        sizes_px=options["sizes_px"],
    )
    device = chosen_device(options["device"])
    if device.type == "cuda":
        # Sums stay float32. Matrix products in TF32 have an eighth of the rounding error of BF16 autocast.
        torch.set_float32_matmul_precision("high")
    work = work or out.with_name(out.name + ".training")
    require_apart({"--out": out, "--work": work}, {"--init": init})
    _require_new(out, "model_index.json")
    samples = SampleSpec(count=options["samples"]) if options["samples"] else None
    if dry_run:
        require_writable({"--out": out, "--work": work})
        check_initial(init)
    else:
        clear_leftovers(out, work)
        train_source(out, work, spec, Console(quiet=quiet), samples=samples, init=init, device=device)
    _tell({"out": str(out), "work": str(work), **asdict(spec)}, out, as_json=as_json, dry_run=dry_run)


@command.command("corpus", epilog=example("train corpus source --count 2000 --out corpus"))
@click.argument("source", required=False, type=InputPath("source"))
@click.option(
    "--prompts",
    type=InputPath("prompt file"),
    help="UTF-8 file, one prompt per line; default: captions of the small world.",
)
@click.option("--count", default=2000, show_default=True, help="Captions of the small world, without --prompts.")
@click.option("--seeds-per-prompt", default=1, show_default=True, help="Images per prompt.")
@click.option("--seed", default=0, show_default=True, help="Seed of the first image; it increases by 1 per image.")
@click.option("--size", default="128x128", show_default=True, help="WIDTHxHEIGHT in pixels.")
@click.option("--steps", default=30, show_default=True, help="Denoising steps.")
@click.option("--guidance", default=3.0, show_default=True, help="Guidance scale, 1 for none.")
@click.option("--shift", type=float, help="Shift of the sigma schedule; default: the source's.")
@click.option("--batch", default=16, show_default=True, help="Images drawn at once.")
@click.option(
    "--judged", is_flag=True, help="Drop images that do not show their caption; only for captions of the small world."
)
@device_option
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@json_option
@dry_run_option
@quiet_option
def corpus_command(
    source: Path | None,
    prompts: Path | None,
    out: Path,
    *,
    as_json: bool,
    dry_run: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Draw a training corpus with SOURCE: images with their prompts and seeds. A stopped run resumes.

    SOURCE is a pipeline folder: one that `train source` wrote, or a published Z-Image. Without it, the images are
    renders of the small world.
    """
    from l2p_calib.prompts import read_prompts
    from l2p_export.training.corpus.corpus import PROMPTS_BYTES_MAX
    from l2p_export.training.corpus.rendered import render_corpus, world_captions
    from l2p_export.world.captions import describe
    from l2p_export.world.judge import require_judge

    height, width = parse_size(options["size"])
    require_apart({"--out": out}, {"SOURCE": source, "--prompts": prompts})
    texts = read_prompts(prompts, PROMPTS_BYTES_MAX) if prompts else world_captions(options["count"], options["seed"])
    if source is None or options["judged"]:
        # Only captions of the small world can be rendered or judged.
        for text in texts:
            describe(text)
    if options["judged"]:
        require_judge()
    console = Console(quiet=quiet)
    if dry_run:
        require_writable({"--out": out})
    else:
        clear_leftovers(out)
    facts: dict[str, Any] = {"out": str(out), "prompts": len(texts), "images": len(texts) * options["seeds_per_prompt"]}
    if source is None:
        if not dry_run:
            facts["drawn"] = render_corpus(
                texts, options["seeds_per_prompt"], options["seed"], (height, width), out, console
            )
    else:
        from l2p_export.training.loop.distributed import chosen_device
        from l2p_export.training.source.draw import DrawSpec, draw_corpus, load_artist
        from l2p_export.training.source.folder import open_source

        opened = open_source(source)
        shift = opened.shift if options["shift"] is None else options["shift"]
        spec = DrawSpec(height, width, options["steps"], options["guidance"], shift, options["batch"])
        facts |= asdict(spec)
        if not dry_run:
            artist = load_artist(opened, chosen_device(options["device"]))
            facts["drawn"] = draw_corpus(
                artist,
                texts,
                options["seeds_per_prompt"],
                options["seed"],
                spec,
                out,
                console,
                judged=options["judged"],
            )
    _tell(facts, out, as_json=as_json, dry_run=dry_run)


@command.command(
    "transfer",
    epilog=example("train transfer source --corpus corpus --size-px 128 --out adapters.safetensors"),
)
@click.argument("source", type=InputPath("source"))
@click.option(
    "--corpus",
    type=InputPath("corpus"),
    help="Folder that `train corpus` wrote, or of your own images with a metadata.jsonl; default: scenes of the small "
    "world.",
)
@click.option(
    "--holdout",
    type=float,
    default=0.0,
    show_default=True,
    help="Images to compute the loss on instead of training on them: a number, or a share below 1.",
)
@click.option("--count", default=20_000, show_default=True, help="Scenes of the small world, without --corpus.")
@click.option("--variant", type=click.Choice(["1k", "4k", "8k", "10k"]), default="1k", show_default=True)
@click.option("--size-px", "sizes_px", type=int, multiple=True, help="Side of the training images; repeatable.")
@click.option(
    "--window-tokens",
    default=0,
    show_default=True,
    help="Side of the square window that the head is trained on; 0 for the whole image.",
)
@click.option(
    "--halo-tokens", default=3, show_default=True, help="Tokens around the window that the head also reads; 3 is exact."
)
@click.option(
    "--noise",
    type=click.Choice(["stored", "fresh"]),
    default="stored",
    show_default=True,
    help="stored: each image's own noise, as published; fresh: new noise at each step.",
)
@click.option("--steps", default=10_000, show_default=True, help="Optimizer steps.")
@click.option("--batch", default=8, show_default=True, help="Samples per step, over all ranks.")
@click.option(
    "--micro-batches", default=1, show_default=True, help="Micro batches per step, for gradient accumulation."
)
@click.option("--learning-rate", default=5e-5, show_default=True)
@click.option("--warmup-steps", default=100, show_default=True, help="Linear warm-up of the learning rate.")
@click.option("--ema", default=0.999, show_default=True, help="EMA decay of the weights.")
@click.option(
    "--init", type=InputPath("adapter file"), help="Adapters of this source to initialize from, of any variant."
)
@click.option("--shift", default=3.0, show_default=True, help="Shift of the sigma schedule; recorded for sampling.")
@click.option(
    "--positions",
    type=click.Choice(POSITIONS),
    metavar="POLICY",
    default="native",
    show_default=True,
    help=f"{POSITIONS_TOLD} The trained grid is that of --base-grid or --init.",
)
@click.option("--base-grid", metavar="ROWSxCOLUMNS", help="Trained grid in tokens that --positions stretches from.")
@click.option("--sampling-steps", type=int, help="Recommended steps to record in the adapter file; default: none.")
@click.option("--guidance", type=float, help="Recommended guidance to record in the adapter file; default: none.")
@click.option("--caption-dropout", default=0.1, show_default=True, help="Share of samples without a caption.")
@click.option(
    "--head-divisor", default=1, show_default=True, help="Divisor of the published channels of the pixel head."
)
@click.option(
    "--checkpointing", is_flag=True, help="Activation checkpointing: recompute activations in the backward pass."
)
@device_option
@click.option(
    "--autocast", type=click.Choice(["none", "bf16"]), help="Autocast dtype; default: bf16 on a GPU, none on the CPU."
)
@click.option(
    "--trunk-storage",
    type=click.Choice(["float32", "bfloat16", "float8"]),
    default="float32",
    show_default=True,
    help="Storage dtype of the frozen trunk; bfloat16 is exact for a BF16 source.",
)
@click.option(
    "--optimizer-device",
    type=click.Choice(["same", "cpu"]),
    default="same",
    show_default=True,
    help="Device of float32 master weights, optimizer moments and EMA.",
)
@click.option(
    "--compile",
    "is_compiled",
    is_flag=True,
    help="Compile the pixel head with torch.compile: slower start, faster steps.",
)
@click.option(
    "--sharding",
    type=click.Choice(["none", "fsdp"]),
    default="none",
    show_default=True,
    help="none: replicated on each rank (DDP); fsdp: weights and optimizer moments sharded across ranks (FSDP2).",
)
@click.option("--save-every", default=500, show_default=True, help="Steps between saved training states.")
@click.option(
    "--samples", default=0, show_default=True, help="Scenes of the small world drawn and judged at each save."
)
@click.option("--licence", "license_text", help="Licence to record in the adapter file.")
@click.option("--seed", default=0, show_default=True)
@click.option("--work", type=click.Path(path_type=Path), help="Training states; OUT.training by default.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help=".safetensors file of adapters to write.")
@json_option
@dry_run_option
@quiet_option
def transfer_command(source: Path, corpus: Path | None, out: Path, work: Path | None, **options: Any) -> None:
    """Transfer SOURCE, a pipeline folder, to pixel space: train all but its trunk, and write only the adapters.

    A stopped run resumes with the same command; --steps may be larger. `build ADAPTERS --source SOURCE` builds a bundle
    of the result. On several GPUs: `torchrun --nproc-per-node N -m l2p_export train transfer ...`; --batch counts the
    samples of all ranks.
    """
    from l2p_export.training.loop.distributed import joined

    if out.suffix != ".safetensors":
        raise UsageError(f"--out is `{out}`, expected a file name ending in .safetensors")
    work = work or out.with_name(out.stem + ".training")
    require_apart({"--out": out, "--work": work}, {"SOURCE": source, "--corpus": corpus, "--init": options["init"]})
    with joined(options["device"], options["sharding"]) as ranks, _one_voice(is_rank_zero=ranks.is_rank_zero):
        _transfer(source, corpus, out, work, options, ranks)


def _transfer(
    source: Path, corpus: Path | None, out: Path, work: Path, options: dict[str, Any], ranks: ProcessGroup
) -> None:
    from l2p_export.training.transfer.adapters import check_adapters
    from l2p_export.training.transfer.run import check_job_images, check_transfer, run_transfer
    from l2p_export.training.transfer.spec import TrainingOptions
    from l2p_runtime.progress import Silent

    spec, metadata = _transfer_spec(options), _sampling_metadata(options)
    autocast = options["autocast"] or ("bf16" if ranks.device.type == "cuda" else "none")
    means = TrainingOptions(autocast, options["trunk_storage"], options["optimizer_device"], options["is_compiled"])
    job = check_transfer(source, corpus, spec, means, ranks, scenes=options["count"], samples=options["samples"])
    if options["init"] is not None:
        check_adapters(options["init"])
    dry_run, as_json = options["dry_run"], options["as_json"]
    console = Console(quiet=options["quiet"] or not ranks.is_rank_zero)
    report = console if ranks.is_rank_zero else Silent()
    if dry_run:
        require_writable({"--out": out, "--work": work})
    else:
        for line in forecast_lines(job.forecast):
            console.done(line)
        job.require_memory()
        clear_leftovers(*((out, work) if ranks.is_rank_zero else ()))
    job = check_job_images(job, report)
    facts = {"out": str(out), "work": str(work), **job.facts, "forecast": job.forecast.as_dict()}
    if not dry_run:
        facts["holdout_loss"] = run_transfer(job, out, work, options["init"], metadata, report)
    if ranks.is_rank_zero and dry_run and not as_json:
        facts["forecast"] = "\n  ".join(["", *forecast_lines(job.forecast)])
    if ranks.is_rank_zero:
        _tell(facts, out, as_json=as_json, dry_run=dry_run)
    if dry_run:
        job.require_memory()


def _sampling_metadata(options: dict[str, Any]) -> dict[str, str]:
    """Metadata of the adapter file: recommended sampling and licence."""
    from l2p_runtime.contract import Sampling

    steps, guidance = options["sampling_steps"], options["guidance"]
    Sampling(steps if steps is not None else 1, guidance if guidance is not None else 1.0, options["shift"])
    stated = {"l2p.steps": steps, "l2p.guidance": guidance, "license": options["license_text"]}
    return {
        name: f"{value:g}" if isinstance(value, float) else str(value)
        for name, value in stated.items()
        if value is not None
    }


def _transfer_spec(options: dict[str, Any]) -> TransferSpec:
    from l2p_export.tensors.files import open_weights
    from l2p_export.tensors.metadata import trained_grid
    from l2p_export.training.loop.loop import Schedule
    from l2p_export.training.transfer.spec import TransferSpec

    names = (
        "variant",
        "noise",
        "shift",
        "caption_dropout",
        "window_tokens",
        "halo_tokens",
        "head_divisor",
        "checkpointing",
        "holdout",
        "positions",
    )
    taken = ("steps", "batch", "micro_batches", "learning_rate", "warmup_steps", "ema", "save_every", "seed")
    schedule = Schedule(cooldown_steps=options["steps"] // 5, **{name: options[name] for name in taken})
    sizes_px = options["sizes_px"] or (_PUBLISHED_SIDE_PX[options["variant"]],)
    base_grid = parse_grid(options["base_grid"])
    if base_grid is None and options["init"] is not None and options["positions"] != "native":
        base_grid = trained_grid(open_weights(options["init"]).metadata)
    return TransferSpec(
        sizes_px=sizes_px, schedule=schedule, base_grid=base_grid, **{name: options[name] for name in names}
    )


@contextmanager
def _one_voice(*, is_rank_zero: bool) -> Iterator[None]:
    """Let only rank 0 report an error that all ranks raise; the others exit with the same code."""
    from l2p_export.training.loop.loop import StoppedError

    try:
        yield
    except (UsageError, StoppedError, CancelledError) as error:
        if is_rank_zero:
            raise
        raise click.exceptions.Exit(error.exit_code) from error


def _require_new(out: Path, name: str) -> None:
    if (out / name).exists():
        raise UsageError(f"`{out}` holds a trained source already", hint="choose another folder, or remove it")


def _tell(facts: dict[str, Any], out: Path, *, as_json: bool, dry_run: bool) -> None:
    if as_json:
        print_json(facts)
    elif dry_run:
        click.echo("\n".join(f"{name}: {value}" for name, value in facts.items()))
    else:
        click.echo(out)
