"""Memory forecast of a transfer: parameters, and bytes on the device and in host memory, before anything is loaded.

Weights, gradients, moments and EMA are exact. Activations are an estimate: the tensors that autograd keeps for the
backward pass of one micro batch, by the formulas below, and the gradients in flight of the largest part. Not included
are the CUDA context, fragmentation of the allocator and workspaces of libraries.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from l2p_export.families.z_image_l2p.dimensions import Dimensions, expected_shapes, network_blocks, network_shapes
from l2p_export.families.z_image_l2p.specs import model_spec
from l2p_export.training.corpus.corpus import KEPT_BYTES
from l2p_export.training.transfer.storage import STORAGES
from l2p_runtime.errors import HostError
from l2p_runtime.memory import available_host_bytes

if TYPE_CHECKING:
    from l2p_export.training.loop.distributed import ProcessGroup
    from l2p_export.training.transfer.spec import TrainingOptions, TransferSpec

# (autocast, is trained) to the bytes that a block keeps for the backward pass, per token and per channel: of its width,
# and of the feed-forward's inner width. Counted with saved-tensor hooks on the blocks of this family
# (tests/unit/export/training/transfer/test_forecast.py counts again).
_KEPT = {
    ("none", True): (88, 16),
    ("none", False): (56, 12),
    ("bf16", True): (84, 8),
    ("bf16", False): (48, 6),
}


@dataclass(frozen=True, slots=True)
class TrainingForecast:
    """Memory of one process.

    Attributes:
        trained_parameters: of the whole model.
        frozen_parameters: of its trunk.
        processes: number of processes.
        local_processes: number of processes on this machine.
        device: `cpu` or `cuda`.
        device_bytes: item to bytes on the device of one process.
        host_bytes: item to bytes in host memory for one process, besides the device's; of `loading` and `saving`, only
            the larger one counts.
        basis: assumptions of the estimate of activations.
    """

    trained_parameters: int
    frozen_parameters: int
    processes: int
    local_processes: int
    device: str
    device_bytes: Mapping[str, int]
    host_bytes: Mapping[str, int]
    basis: str

    @property
    def device_total(self) -> int:
        """Bytes on the device of one process."""
        return sum(self.device_bytes.values())

    @property
    def host_total(self) -> int:
        """Bytes in host memory for all processes on this machine, including the device's if it is the CPU."""
        passing = ("loading", "saving")
        lasting = sum(size for what, size in self.host_bytes.items() if what not in passing)
        one = lasting + max(self.host_bytes.get(what, 0) for what in passing)
        return self.local_processes * (one + (self.device_total if self.device == "cpu" else 0))

    def as_dict(self) -> dict[str, Any]:
        """JSON values for `--json`."""
        return {
            "trained_parameters": self.trained_parameters,
            "frozen_parameters": self.frozen_parameters,
            "processes": self.processes,
            "device": self.device,
            "device_bytes": {**self.device_bytes, "total": self.device_total},
            "host_bytes": {**self.host_bytes, "total": self.host_total},
            "activations_basis": self.basis,
        }


def transfer_forecast(
    d: Dimensions,
    spec: TransferSpec,
    options: TrainingOptions,
    ranks: ProcessGroup,
    *,
    caption_tokens: int,
    text_parameters: int = 0,
    caption_values: int = 0,
    files: int = 0,
) -> TrainingForecast:
    """Forecast the memory of a transfer.

    Args:
        d: dimensions of the pixel model.
        spec: settings of the transfer.
        options: memory and precision options.
        ranks: the process group.
        caption_tokens: tokens of the longest padded caption.
        text_parameters: of the text encoder, which stays in host memory in float32.
        caption_values: number of values of all captions' embeddings, which also stay in host memory.
        files: images that are read from a corpus, assumed to have the largest training size.
    """
    trunk = network_shapes("trunk", d)
    frozen = _count(trunk)
    trained = _count(expected_shapes(d)) - frozen
    shares = ranks.size if ranks.is_sharded else 1
    on_cpu = options.optimizer_device == "cpu"
    narrow = on_cpu and options.autocast == "bf16" and not ranks.is_sharded
    part = -(-trained // shares)
    weight_bytes = (2 if narrow else 4) * part
    trunk_bytes = _trunk_bytes(trunk, options.trunk_storage, shares)
    activations, basis = _activations(d, spec, options, ranks, caption_tokens)
    device = {"weights": weight_bytes, "gradients": weight_bytes, "trunk": trunk_bytes, "activations": activations}
    host = {"text encoder": 4 * text_parameters, "caption embeddings": 4 * caption_values}
    host["images that were read"] = min(KEPT_BYTES, files * 3 * max(spec.sizes_px) ** 2)
    if on_cpu:
        host |= {"masters": 4 * part, "gradients": 4 * part, "moments": 8 * part, "averages": 4 * part}
    else:
        device |= {"moments": 8 * part, "averages": 4 * part}
    if options.autocast == "bf16":
        device["autocast copies"] = _autocast_bytes(d, spec, options, trained, narrow=narrow)
    if ranks.is_sharded:
        # One block at a time is gathered in float32, with its gradient.
        device["gathered block"] = 2 * 4 * max(_count(_block_shapes(d, block)) for block in _blocks(d))
    is_elsewhere = ranks.device.type != "cpu" or ranks.is_sharded
    whole_trunk = _trunk_bytes(trunk, options.trunk_storage, 1)
    host["loading"] = 4 * trained + whole_trunk if is_elsewhere else 0
    # Rank 0 converts the EMA to BF16 adapters in host memory; a sharded EMA is gathered there first.
    host["saving"] = (2 + (4 if ranks.is_sharded else 0)) * trained if ranks.is_rank_zero else 0
    return TrainingForecast(trained, frozen, ranks.size, ranks.local_size, ranks.device.type, device, host, basis)


def require_memory(
    forecast: TrainingForecast, spec: TransferSpec, options: TrainingOptions, ranks: ProcessGroup
) -> None:
    """Check that a run fits into memory.

    Raises:
        HostError: it does not fit; names the largest items, and the options that lower them.
    """
    lower = _options(forecast, spec, options, ranks)
    if ranks.device.type == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(ranks.device)
        if forecast.device_total > free:
            raise HostError(
                _excess(f"`{ranks.device}`", forecast.device_bytes, forecast.device_total, free), hint=lower
            )
    free = available_host_bytes()
    if forecast.host_total > free:
        parts = {**forecast.host_bytes, **(forecast.device_bytes if ranks.device.type == "cpu" else {})}
        raise HostError(_excess("the host's memory", parts, forecast.host_total, free), hint=lower)


def kept_bytes(d: Dimensions, spec: TransferSpec, options: TrainingOptions, caption_tokens: int) -> tuple[int, int]:
    """Bytes of activations that autograd keeps for one sample at the largest size.

    Returns:
        Bytes of all parts, and of the largest part.
    """
    side = max(spec.sizes_px) // spec.patch_px
    image_tokens = model_spec(d).padded(side * side)
    tokens = {"context_refiner": caption_tokens, "noise_refiner": image_tokens, "layers": image_tokens + caption_tokens}
    trunk = set(network_blocks("trunk", d))
    kept, largest = 0, 0
    for block in _blocks(d):
        width, inner = _KEPT[options.autocast, block not in trunk]
        count = tokens[block.partition(".")[0]]
        whole = count * (width * d.width + inner * d.ffn_width)
        kept += 4 * count * d.width if spec.checkpointing else whole
        largest = max(largest, whole)
    window = spec.window_tokens
    drawn = side if not window or window >= side else min(side, window + 2 * spec.halo_tokens)
    item = 4 if options.autocast == "none" else 2
    head, head_largest = _head_bytes(d, (drawn * spec.patch_px) ** 2, item, checkpointing=spec.checkpointing)
    return kept + head, max(largest, head_largest)


def _activations(
    d: Dimensions, spec: TransferSpec, options: TrainingOptions, ranks: ProcessGroup, caption_tokens: int
) -> tuple[int, str]:
    """Bytes of activations of one micro batch of one process, and a description of the estimate."""
    samples = max(1, spec.schedule.batch // (spec.schedule.micro_batches * ranks.size))
    kept, largest = kept_bytes(d, spec, options, caption_tokens)
    side_px = max(spec.sizes_px)
    # Mixed image, target, prediction, and their difference.
    images = 4 * 4 * 3 * side_px**2
    # Gradients take half of the kept bytes. With checkpointing, a part is also kept while its gradients are computed.
    in_flight = largest * 3 // 2 if spec.checkpointing else largest // 2
    how = "recomputed block by block" if spec.checkpointing else "kept"
    precision = "float32" if options.autocast == "none" else "BF16 autocast"
    basis = f"estimate for {samples} images of {side_px} px at once, {precision}, activations {how}"
    return samples * (kept + images + in_flight), basis


def _head_bytes(d: Dimensions, area_px: int, item: int, *, checkpointing: bool) -> tuple[int, int]:
    """Bytes that the pixel head keeps for one image: of all levels, and of the largest level."""
    kept, largest, channels, area = 0, 0, 3, area_px
    for level in d.levels:
        inside = item * level.encoder * area
        # The input, outputs of the convolution and of the activation, which pooling reads, and pooling's int64 indices.
        kept += item * channels * area + inside * (1 if checkpointing else 2) + 8 * level.encoder * area // 4
        largest = max(largest, 2 * inside)
        channels, area = level.encoder, area // 4
    kept += item * (channels + d.width) * area + item * d.bottleneck * area
    channels = d.bottleneck
    for level in reversed(d.levels):
        small, area = area, area * 4
        joined = level.up + level.encoder
        kept += item * (channels * (small if checkpointing else area) + joined * area)
        kept += 0 if checkpointing else item * level.decoder * area
        largest = max(largest, item * area * max(channels + level.up, joined + 2 * level.decoder))
        channels = level.decoder
    return kept + item * channels * area, largest


def _autocast_bytes(d: Dimensions, spec: TransferSpec, options: TrainingOptions, trained: int, *, narrow: bool) -> int:
    """Bytes of autocast's BF16 copies of float32 weights, trained and frozen."""
    frozen = 0 if spec.checkpointing or options.trunk_storage != "float32" else _count(network_shapes("trunk", d))
    return 2 * ((0 if narrow else trained) + frozen)


def _trunk_bytes(trunk: Mapping[str, tuple[int, ...]], storage: str, shares: int) -> int:
    """Bytes of the trunk: matrices in their storage dtype, the rest in float32; sharded only if all is float32."""
    matrices = sum(math.prod(shape) for shape in trunk.values() if len(shape) == 2)
    rows = sum(shape[0] for shape in trunk.values() if len(shape) == 2)
    rest = _count(trunk) - matrices
    if storage == "float32":
        return -(-4 * (matrices + rest) // shares)
    return STORAGES[storage] * matrices + 4 * rest + (4 * rows if storage == "float8" else 0)


def _options(forecast: TrainingForecast, spec: TransferSpec, options: TrainingOptions, ranks: ProcessGroup) -> str:
    """Hint that lists the options that would lower memory, most effective first."""
    parts = forecast.device_bytes
    splits = spec.schedule.batch > spec.schedule.micro_batches * ranks.size
    can_move = forecast.device != "cpu" and options.optimizer_device == "same"
    # Option to about the bytes that it saves. The last two always help, by an amount that depends on the machine.
    choices = {
        "--checkpointing": 0 if spec.checkpointing else parts["activations"] // 2,
        "a larger --micro-batches": parts["activations"] // 2 if splits else 0,
        "--optimizer-device cpu": parts.get("moments", 0) if can_move else 0,
        "--trunk-storage bfloat16 or float8": parts["trunk"] // 2 if options.trunk_storage == "float32" else 0,
        "--window-tokens": 0 if spec.window_tokens or spec.variant == "10k" else 2,
        "more processes with --sharding fsdp": 0 if ranks.is_sharded else 1,
    }
    named = sorted((name for name, gain in choices.items() if gain), key=lambda name: -choices[name])
    return "lower it with " + ", ".join(named)


def _excess(where: str, parts: Mapping[str, int], total: int, free: int) -> str:
    largest = sorted(((size, what) for what, size in parts.items() if size), reverse=True)[:4]
    listed = ", ".join(f"{what} {size:,}" for size, what in largest)
    return f"the run takes about {total:,} bytes of {where}, and {free:,} are free: {listed}"


def _blocks(d: Dimensions) -> tuple[str, ...]:
    return tuple(block for network in ("caption", "stem", "trunk", "tail") for block in network_blocks(network, d))


def _block_shapes(d: Dimensions, block: str) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in expected_shapes(d).items() if name.startswith(f"{block}.")}


def _count(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())
