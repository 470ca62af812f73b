"""Batches of a transfer: images, noise and captions of this rank's share of a step's samples.

The random draws of a step depend only on the seed and the step's number. The distribution of samples over ranks and
micro batches does not change them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from l2p_export.families.z_image_l2p.pixel import Window
from l2p_export.training.corpus.corpus import Row
from l2p_export.training.corpus.reader import Images, image_reader
from l2p_export.training.flow import draw_sigmas
from l2p_export.training.loop.loop import generator
from l2p_export.training.source.folder import TOKENS_MULTIPLE, Embeds, Source, encode_texts
from l2p_export.training.transfer.spec import trained_model
from l2p_runtime.errors import UsageError
from l2p_runtime.noise import normal_noise
from l2p_runtime.positions import rope_tables

if TYPE_CHECKING:
    from l2p_export.families.z_image_l2p.dimensions import Dimensions
    from l2p_export.training.loop.distributed import ProcessGroup
    from l2p_export.training.transfer.spec import TransferSpec
    from l2p_runtime.text import Tokenizer


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro batch: noisy images `mixed` [B,3,H,W], `time` [B], embeddings, RoPE tables [S,R], target `wanted`."""

    mixed: Tensor
    time: Tensor
    embeds: Embeds
    rope: tuple[Tensor, Tensor]
    window: Window | None
    wanted: Tensor


@dataclass(frozen=True, slots=True)
class Captions:
    """Embeddings of all captions by padded length, and of the empty caption.

    Attributes:
        places: for each padded length, (index of an image in the corpus, its row in the embeddings).
    """

    embeds: Mapping[int, Embeds]
    places: Mapping[int, tuple[tuple[int, int], ...]]
    empty: Embeds


@dataclass(frozen=True, slots=True)
class Draws:
    """Random draws of a step for all its samples, on all ranks.

    Attributes:
        length: padded tokens of its captions.
        size_px: side of its images.
        places: (index in the corpus, row in the embeddings) of each image.
        sigma: sigmas [B].
        dropped: [B], true where the caption is dropped.
        window: part that the head draws; None for the whole image.
    """

    length: int
    size_px: int
    places: tuple[tuple[int, int], ...]
    sigma: Tensor
    dropped: Tensor
    window: Window | None


def padded_lengths(tokenizer: Tokenizer, images: Images) -> dict[str, int]:
    """Map each caption to the number of tokens that it is padded to."""
    texts = sorted({row.text for row in images.rows})
    return {text: -(-len(tokenizer.tokens(text)) // TOKENS_MULTIPLE) * TOKENS_MULTIPLE for text in texts}


def embed_captions(source: Source, images: Images) -> Captions:
    """Embed each caption once, with others of its padded length, because a batch holds captions of only one length."""
    lengths = padded_lengths(source.tokenizer, images)
    embeds, places = {}, {}
    for length in sorted(set(lengths.values())):
        members = [text for text in lengths if lengths[text] == length]
        embeds[length] = encode_texts(source, members, length)
        position = {text: index for index, text in enumerate(members)}
        places[length] = tuple(
            (index, position[row.text]) for index, row in enumerate(images.rows) if lengths[row.text] == length
        )
    return Captions(embeds, places, encode_texts(source, [""]))


def require_seeds(images: Images) -> None:
    """Check that every image has a seed, for stored noise.

    Raises:
        UsageError: names the first image without a seed.
    """
    for row in images.rows:
        if row.seed is None:
            raise UsageError(
                f"`{row.file_name}` has no seed, which --noise stored needs", hint="train with --noise fresh"
            )


def draw_step(captions: Captions, spec: TransferSpec, step: int) -> Draws:
    """Make the random draws of a step."""
    draws = generator(spec.schedule.seed, step)
    count = spec.schedule.batch
    lengths = tuple(captions.places)
    shares = torch.tensor([float(len(captions.places[length])) for length in lengths])
    length = lengths[int(torch.multinomial(shares, 1, generator=draws))]
    size_px = spec.sizes_px[int(torch.randint(len(spec.sizes_px), (1,), generator=draws))]
    picked = torch.randint(len(captions.places[length]), (count,), generator=draws).tolist()
    return Draws(
        length,
        size_px,
        tuple(captions.places[length][place] for place in picked),
        draw_sigmas(count, spec.shift, draws),
        torch.rand(count, generator=draws) < spec.caption_dropout,
        draw_window(size_px // spec.patch_px, spec, draws),
    )


def batches(
    images: Images, captions: Captions, d: Dimensions, spec: TransferSpec, ranks: ProcessGroup
) -> Callable[[int, int], Batch]:
    """Make a function from (step, micro batch) to this rank's batch, on its device."""
    parts = spec.schedule.micro_batches
    count = spec.schedule.batch // (parts * ranks.size)
    assemble = assembler(images, captions, d, spec, ranks.device)

    def batch(step: int, micro: int) -> Batch:
        first = (ranks.rank * parts + micro) * count
        return assemble(draw_step(captions, spec, step), range(first, first + count), (spec.schedule.seed, step))

    return batch


def assembler(
    images: Images, captions: Captions, d: Dimensions, spec: TransferSpec, device: torch.device
) -> Callable[[Draws, range, tuple[int, ...]], Batch]:
    """Make a function from random draws, the numbers of some of their samples, and a seed of noise to their batch."""
    model = trained_model(d, spec)
    read = image_reader(images, device)

    def assemble(drawn: Draws, samples: range, seed: tuple[int, ...]) -> Batch:
        places = [drawn.places[sample][0] for sample in samples]
        clean = read(places, drawn.size_px)
        if spec.noise == "stored":
            noise = torch.stack([stored_noise(images.rows[place], drawn.size_px) for place in places]).to(device)
        else:
            # From 1, because a seed sequence ignores zeros at its end.
            own = [generator(*seed, sample + 1, device=device) for sample in samples]
            noise = torch.stack([torch.randn(clean.shape[1:], generator=draws, device=device) for draws in own])
        part = slice(samples.start, samples.stop)
        sigma = drawn.sigma[part].to(device)
        rows = [drawn.places[sample][1] for sample in samples]
        embeds = _with_dropout(captions, drawn.length, rows, drawn.dropped[part])
        tokens = drawn.size_px // spec.patch_px
        cos, sin = (
            torch.from_numpy(table).to(device)
            for table in rope_tables(model, tokens, tokens, drawn.length, spec.positions)
        )
        wanted = clean - noise
        if drawn.window is not None:
            wanted = _cut(wanted, drawn.window, spec.patch_px)
        return Batch(
            torch.lerp(clean, noise, sigma[:, None, None, None]),
            1 - sigma,
            Embeds(embeds.values.to(device), embeds.mask.to(device)),
            (cos, sin),
            drawn.window,
            wanted,
        )

    return assemble


def stored_noise(row: Row, size_px: int) -> Tensor:
    """Noise [3,H,W] float32 that the runtime draws for the seed of an image.

    Raises:
        UsageError: the row has no seed.
    """
    if row.seed is None:
        raise UsageError(f"`{row.file_name}` has no seed, which --noise stored needs", hint="train with --noise fresh")
    return torch.from_numpy(normal_noise(row.seed, channels=3, rows=(0, size_px), cols=(0, size_px)))


def _with_dropout(captions: Captions, length: int, rows: list[int], dropped: Tensor) -> Embeds:
    stored = captions.embeds[length]
    values, mask = stored.values[rows].clone(), stored.mask[rows].clone()
    empty = captions.empty.values.shape[1]
    values[dropped], mask[dropped] = 0.0, False
    values[dropped, :empty], mask[dropped, :empty] = captions.empty.values[0], captions.empty.mask[0]
    return Embeds(values, mask)


def draw_window(tokens: int, spec: TransferSpec, draws: torch.Generator) -> Window | None:
    """A random window of the head in a square of tokens; None for the whole square."""
    side = spec.window_tokens
    if not side or side >= tokens:
        return None
    top, left = torch.randint(tokens - side + 1, (2,), generator=draws).tolist()
    return Window(slice(top, top + side), slice(left, left + side), spec.halo_tokens)


def _cut(image: Tensor, window: Window, patch_px: int) -> Tensor:
    rows, columns = (slice(part.start * patch_px, part.stop * patch_px) for part in (window.rows, window.columns))
    return image[:, :, rows, columns]
