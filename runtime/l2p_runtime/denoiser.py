"""One denoising call: noisy pixels through stem, trunk, tail and head to a prediction.

    prompt embeddings -> caption                      once per prompt
    image -> stem -> trunk -> tail -> head -> prediction   every step

Plain functions over engines, independent of the backend that runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from l2p_runtime.captions import pad_captions
from l2p_runtime.policies import Frequencies
from l2p_runtime.positions import caption_tables, tables_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from l2p_runtime.backends import Array, Device, Engine
    from l2p_runtime.contract import ModelSpec
    from l2p_runtime.stripes import Stripe


@dataclass(frozen=True, slots=True)
class Denoiser:
    """A model on one device.

    Attributes:
        use: yields a network's engine by name; it is loaded already, or only for the time of the context.
    """

    model: ModelSpec
    device: Device
    use: Callable[[str], AbstractContextManager[Engine]]


@dataclass(frozen=True, slots=True)
class Condition:
    """One prompt, ready for every step at one size: caption tokens [B,T,D] and rotary tables [S,R]."""

    caption: Array
    rope_cos: Array
    rope_sin: Array


@dataclass(frozen=True, slots=True)
class Workspace:
    """Buffers of one denoising call: two of tokens [B,S,D], written alternately, and the modulation [B,A]."""

    tokens: Array
    other: Array
    modulation: Array


def encode_caption(
    denoiser: Denoiser,
    prompt_embeds: Sequence[NDArray[np.float32]],
    rows: int,
    columns: int,
    axes: Sequence[Frequencies],
) -> Condition:
    """Run the caption network for one prompt per image, all of equal padded length.

    Args:
        denoiser: the networks.
        prompt_embeds: one [L,C] per image of the batch, without padding.
        rows: h, token rows of the image.
        columns: w, token columns of the image.
        axes: rotary frequencies of time, rows and columns, from `axis_frequencies`.

    Returns:
        Caption tokens [B,T,D] float32 and rotary tables [S,R] float32, on the device.
    """
    model, device = denoiser.model, denoiser.device
    padded, mask = pad_captions(model, prompt_embeds)
    batch, tokens = mask.shape
    tables = tables_of(model, rows, columns, tokens, axes)
    caption_cos, caption_sin = caption_tables(tables, tokens)
    caption = device.alloc((batch, tokens, model.width), "float32")
    inputs = {"prompt_embeds": padded, "caption_mask": mask, "rope_cos": caption_cos, "rope_sin": caption_sin}
    with denoiser.use("caption") as engine:
        engine.run({name: device.upload(value) for name, value in inputs.items()}, {"caption": caption})
    return Condition(caption, device.upload(tables[0]), device.upload(tables[1]))


def turned(
    denoiser: Denoiser, conditions: Sequence[Condition], rows: int, columns: int, axes: Sequence[Frequencies]
) -> list[Condition]:
    """The same prompts with the rotary tables of other frequencies."""
    model, device = denoiser.model, denoiser.device
    found = []
    for condition in conditions:
        cosine, sine = tables_of(model, rows, columns, condition.caption.shape[1], axes)
        found.append(replace(condition, rope_cos=device.upload(cosine), rope_sin=device.upload(sine)))
    return found


def make_workspace(denoiser: Denoiser, condition: Condition) -> Workspace:
    """Allocate the buffers of a call, for the batch and size of a condition."""
    model, device = denoiser.model, denoiser.device
    batch, sequence = condition.caption.shape[0], condition.rope_cos.shape[0]
    shape = (batch, sequence, model.width)
    modulation = device.alloc((batch, model.time_width), "float32")
    return Workspace(device.alloc(shape, "float32"), device.alloc(shape, "float32"), modulation)


def predict(
    denoiser: Denoiser,
    image: Array,
    time: Array,
    conditions: Sequence[Condition],
    stripes: Sequence[Stripe],
    workspaces: Sequence[Workspace],
    predictions: Sequence[Array],
    check: Callable[[], None] = lambda: None,
) -> None:
    """Fill each of `predictions` [B,3,H,W] with x0 - noise for the noisy `image` [B,3,H,W] at `time` [B].

    Every network runs for all prompts before the next one is used. So each is loaded once per step if they are not all
    in memory.

    Args:
        denoiser: the networks.
        image: noisy pixels, float32.
        time: 1 - sigma, float32.
        conditions: the prompts.
        stripes: how the pixel head is cut.
        workspaces: buffers from `make_workspace`, one for each prompt.
        predictions: buffers of the results, one for each prompt.
        check: called between networks and stripes; it may raise to cancel.
    """
    prompts = list(zip(conditions, workspaces, predictions, strict=True))
    ropes = [{"rope_cos": condition.rope_cos, "rope_sin": condition.rope_sin} for condition in conditions]
    with denoiser.use("stem") as stem:
        for (condition, work, _), rope in zip(prompts, ropes, strict=True):
            inputs = {"image": image, "time": time, "caption": condition.caption, **rope}
            stem.run(inputs, {"tokens": work.tokens, "modulation": work.modulation})
    for network in ("trunk", "tail"):
        with denoiser.use(network) as layers:
            for (_, work, _), rope in zip(prompts, ropes, strict=True):
                read, written = (work.tokens, work.other) if network == "trunk" else (work.other, work.tokens)
                check()
                layers.run({"tokens": read, "modulation": work.modulation, **rope}, {"tokens_out": written})
    with denoiser.use("head") as head:
        for stripe in stripes:
            check()
            _draw_stripe(denoiser, head, image, stripe, workspaces, predictions, check)


def _draw_stripe(
    denoiser: Denoiser,
    head: Engine,
    image: Array,
    stripe: Stripe,
    workspaces: Sequence[Workspace],
    predictions: Sequence[Array],
    check: Callable[[], None],
) -> None:
    """Run the head on the rows a stripe reads and keep the rows that it owns, for all prompts."""
    model, device = denoiser.model, denoiser.device
    batch, patch_px = image.shape[0], model.patch_px
    rows, columns = image.shape[2] // patch_px, image.shape[3] // patch_px
    read = slice(stripe.read_first * patch_px, stripe.read_stop * patch_px)
    window = device.contiguous(image[:, :, read])
    whole = stripe.first == 0 and stripe.stop == rows
    made = None if whole else device.alloc(window.shape, "float32")
    for index, (work, prediction) in enumerate(zip(workspaces, predictions, strict=True)):
        if index > 0:
            check()
        features = device.contiguous(work.tokens[:, stripe.read_first * columns : stripe.read_stop * columns])
        tokens = features.reshape((batch, stripe.read_stop - stripe.read_first, columns, model.width))
        out = prediction if made is None else made
        head.run({"image": window, "tokens": tokens}, {"prediction": out})
        if made is not None:
            kept = slice((stripe.first - stripe.read_first) * patch_px, (stripe.stop - stripe.read_first) * patch_px)
            device.copy(prediction[:, :, stripe.first * patch_px : stripe.stop * patch_px], made[:, :, kept])
