"""Training of a transfer: a latent source becomes a pixel model by training its outer layers with a frozen trunk.

Initialized and trained as published (docs/model.md, "Trunk and adapters" and "Training recipe"): tensors that match by
name and shape are copied, the trunk is frozen, and the rest learns x0 - noise by flow matching.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from l2p_engines.store.locks import locked
from l2p_export.families.z_image_l2p.blocks import Block
from l2p_export.families.z_image_l2p.pixel import PixelModel, checkpoint_activations
from l2p_export.tensors.metadata import BASE_GRID
from l2p_export.training.corpus.checking import images_digest
from l2p_export.training.corpus.reader import Images
from l2p_export.training.corpus.rendered import RenderedScenes
from l2p_export.training.loop.distributed import ALONE, ProcessGroup, averaging_gradients, shard_across
from l2p_export.training.loop.loop import Schedule, train_weights
from l2p_export.training.loop.masters import Weights, trained_weights
from l2p_export.training.source.folder import Source, folder_digest
from l2p_export.training.transfer.adapters import copy_adapters, trunk_sha256, write_adapters
from l2p_export.training.transfer.batches import Batch, batches, embed_captions, require_seeds
from l2p_export.training.transfer.holdout import append_loss, held_out_batches, mean_loss, read_losses
from l2p_export.training.transfer.model import initial_model
from l2p_export.training.transfer.spec import (
    PLAIN,
    TrainingOptions,
    TransferSpec,
    require_compiler,
    require_split,
    transfer_dimensions,
)
from l2p_export.training.transfer.storage import largest_error
from l2p_runtime.errors import HostError, UsageError

if TYPE_CHECKING:
    from l2p_runtime.progress import Reporter


def transfer(
    source: Source,
    images: Images,
    spec: TransferSpec,
    out: Path,
    folder: Path,
    report: Reporter,
    on_save: Callable[[int, PixelModel], None] | None = None,
    *,
    init: Path | None = None,
    options: TrainingOptions = PLAIN,
    ranks: ProcessGroup = ALONE,
    metadata: Mapping[str, str] = MappingProxyType({}),
    held_out: Images | None = None,
) -> PixelModel:
    """Train adapters and write them to `out` with the digest of the trunk that they belong to.

    Args:
        source: the source to transfer to pixel space.
        images: images with captions: a corpus, or scenes.
        spec: settings of the transfer.
        out: .safetensors file, written from the EMA weights at each saved state.
        folder: folder of training states.
        report: gets steps and loss.
        on_save: called on rank 0 with the model, which then has the EMA weights.
        init: adapters of this trunk to initialize from, of any variant; copied where name and shape match.
        options: memory and precision options.
        ranks: the process group; all ranks must call this with the same arguments.
        metadata: metadata of the file besides its trunk and the shift.
        held_out: images to compute the loss on at each saved state: `holdout.csv` in the folder, and the file's
            metadata. Rank 0 computes it.

    Returns:
        The model with the EMA weights; with the weights of the last step if they are sharded across ranks.

    Raises:
        As `loop.train`; ArtifactError for a damaged corpus or source; UsageError for a batch that does not split over
        processes and micro batches, stored noise without seeds, or `on_save` or `held_out` with sharded weights;
        HostError if the compiler is missing, or another run writes `out`.
    """
    require_split(spec.schedule, ranks)
    require_compiler(options, ranks)
    _require_seeds(images, held_out, spec)
    if ranks.is_sharded and (on_save is not None or held_out is not None):
        raise UsageError(
            "weights that are sharded across ranks cannot draw samples or be scored on held-out images",
            hint="give --sharding none, or --samples 0 and --holdout 0",
        )
    d = transfer_dimensions(source, spec)
    model = initial_model(source, d, spec.schedule.seed, options.trunk_storage)
    _tell_rounding(model, options, ranks, report)
    digest = trunk_sha256(source, d)
    begun = None if init is None else copy_adapters(init, model, digest, report)
    if spec.checkpointing:
        checkpoint_activations(model)
    batch_of = batches(images, embed_captions(source, images), d, spec, ranks)
    weights, called = _on_device(model, spec.schedule, options, ranks)

    def batch_loss(module: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=options.autocast == "bf16"):
            made = module(batch.mixed, batch.time, batch.embeds.values, batch.embeds.mask, *batch.rope, batch.window)
        error: Tensor = (made.to(torch.float32) - batch.wanted).square().mean()
        return error

    held = None
    if held_out is not None and ranks.is_rank_zero:
        held = held_out_batches(held_out, embed_captions(source, held_out), d, spec, ranks)

    rows, columns = spec.trained_grid
    states = {"l2p.shift": f"{spec.shift:g}", BASE_GRID: f"{rows}x{columns}", **metadata}

    def saved(step: int, averaged: Mapping[str, Tensor]) -> None:
        stated = states
        with _values_of(model, averaged) if held or on_save else nullcontext():
            if held is not None and held_out is not None:
                found = mean_loss(held(), partial(batch_loss, model))
                append_loss(folder, step, found)
                stated = states | {"l2p.holdout_loss": f"{found:.6g}", "l2p.holdout_images": str(len(held_out))}
            write_adapters(out, averaged, digest, stated)
            if on_save is not None:
                on_save(step, model)

    settings = {"stage": "transfer", "trunk": digest, "corpus": images_digest(images), "images": len(images)}
    settings |= {"text_encoder": folder_digest(source.folder, ("text_encoder", "tokenizer"))}
    settings |= {"held_out": None if held_out is None else images_digest(held_out)}
    settings |= {**asdict(spec), **options.settings}
    # Only for scenes: states of runs on a corpus have no such key.
    settings |= {"init": begun} | ({"scenes": True} if isinstance(images, RenderedScenes) else {})
    # Steps repeat a few shapes many times, so searching the fastest kernel for each pays.
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True), _locked_file(out, ranks):
        averaged = train_weights(
            weights,
            lambda step, micro: batch_loss(called, batch_of(step, micro)),
            spec.schedule,
            folder,
            settings,
            report,
            title=f"transfer {spec.variant}",
            on_save=saved,
            ranks=ranks,
            called=called,
        )
        is_scored = held_out is None or [step for step, _ in read_losses(folder)][-1:] == [spec.schedule.steps]
        if ranks.is_rank_zero and not (out.exists() and is_scored):
            saved(spec.schedule.steps, averaged)
    if not ranks.is_sharded:
        model.load_state_dict(dict(averaged), strict=False)
    return model


def _require_seeds(images: Images, held_out: Images | None, spec: TransferSpec) -> None:
    for part in (images, held_out):
        if part is not None and spec.noise == "stored":
            require_seeds(part)


@contextmanager
def _locked_file(out: Path, ranks: ProcessGroup) -> Iterator[None]:
    """Hold the lock of the adapter file, which two runs with their own folders of states may share."""
    if not ranks.is_rank_zero:
        yield
        return
    with ExitStack() as stack:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            lock = out.with_name(f".{out.name}.lock")
            stack.enter_context(locked(lock, busy=f"another run is writing `{out}`"))
        except OSError as error:
            raise HostError(f"cannot write `{out}`: {error.strerror or error}", hint="choose another --out") from error
        yield


def _on_device(
    model: PixelModel, schedule: Schedule, options: TrainingOptions, ranks: ProcessGroup
) -> tuple[Weights, nn.Module]:
    """Move the model to its device; returns the trained weights and the module that the loss calls."""
    on_cpu = options.optimizer_device == "cpu"
    if ranks.is_sharded:
        trunk = tuple(part for part in model.trunk.modules() if isinstance(part, Block))
        # Layers in BF16 or FP8 storage are small and not trained, so they stay replicated.
        whole = trunk if options.trunk_storage != "float32" else ()
        blocks = tuple(part for part in model.modules() if isinstance(part, Block) and part not in whole)
        shard_across(model, blocks, whole, ranks)
    elif not on_cpu:
        model.to(ranks.device)
    if ranks.device.type == "cuda" and not ranks.is_sharded:
        # 64 images of 1024 px at a quarter of the channels, on an H200: 246 ms per step, 301 ms in contiguous format.
        model.head.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if options.is_compiled:
        model.head.compile()
    narrow = on_cpu and not ranks.is_sharded and options.autocast == "bf16"
    weights = trained_weights(model, schedule.weight_decay, schedule.beta2, on_cpu=on_cpu, narrow=narrow)
    model.to(ranks.device)
    return weights, averaging_gradients(model, ranks)


@contextmanager
def _values_of(model: nn.Module, averaged: Mapping[str, Tensor]) -> Iterator[None]:
    """Context in which the model has the given weights."""
    own = {name: parameter for name, parameter in model.named_parameters() if name in averaged}
    before = {name: parameter.detach().clone() for name, parameter in own.items()}
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(averaged[name])
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(before[name])


def _tell_rounding(model: PixelModel, options: TrainingOptions, ranks: ProcessGroup, report: Reporter) -> None:
    error = largest_error(model.trunk)
    if error and ranks.is_rank_zero:
        report.note(
            f"--trunk-storage {options.trunk_storage} moves the frozen trunk's values by up to {error:.2g} of a "
            "layer's, root mean square; adapters learn beside that trunk and run beside the exact one"
        )
