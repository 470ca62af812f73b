"""One denoising call: noisy pixels go down through stem, trunk, tail and head, and come out as a prediction.

    prompt embeddings -> caption                      once a prompt
    image -> stem -> trunk -> tail -> head -> prediction   every step

Plain functions over loaded engines; nothing here knows which backend runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from l2p_runtime.positions import Policy, caption_tables, rope_tables

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from l2p_runtime.backends import Array, Device, Engine
    from l2p_runtime.contract import ModelSpec
    from l2p_runtime.stripes import Stripe


@dataclass(frozen=True, slots=True)
class Denoiser:
    """A model's loaded networks on one device."""

    model: ModelSpec
    device: Device
    engines: Mapping[str, Engine]


@dataclass(frozen=True, slots=True)
class Condition:
    """One prompt, ready for every step at one size: caption tokens [B,T,D] and rotary tables [S,R]."""

    caption: Array
    rope_cos: Array
    rope_sin: Array


@dataclass(frozen=True, slots=True)
class Workspace:
    """Buffers that one denoising call writes: tokens [B,S,D] twice, in turn, and the modulation [B,A]."""

    tokens: Array
    tokens_out: Array
    modulation: Array


def encode_caption(
    denoiser: Denoiser, prompt_embeds: Sequence[NDArray[np.float32]], rows: int, columns: int, policy: str | Policy
) -> Condition:
    """Run the caption network for one prompt an image, all of equal padded length.

    Args:
        denoiser: the loaded networks.
        prompt_embeds: one [L,C] an image of the batch, without padding.
        rows: h, token rows of the image.
        columns: w, token columns of the image.
        policy: position policy.
    """
    import numpy as np

    model, device = denoiser.model, denoiser.device
    batch, tokens = len(prompt_embeds), model.padded(len(prompt_embeds[0]))
    padded = np.zeros((batch, tokens, model.caption_width), np.float32)
    mask = np.zeros((batch, tokens), np.bool_)
    for index, embeds in enumerate(prompt_embeds):
        padded[index, : len(embeds)] = embeds
        mask[index, : len(embeds)] = True
    tables = rope_tables(model, rows, columns, tokens, policy)
    caption_cos, caption_sin = caption_tables(tables, tokens)
    caption = device.alloc((batch, tokens, model.width), "float32")
    inputs = {"prompt_embeds": padded, "caption_mask": mask, "rope_cos": caption_cos, "rope_sin": caption_sin}
    denoiser.engines["caption"].run(
        {name: device.upload(value) for name, value in inputs.items()}, {"caption": caption}
    )
    return Condition(caption, device.upload(tables[0]), device.upload(tables[1]))


def make_workspace(denoiser: Denoiser, condition: Condition) -> Workspace:
    """Allocate the buffers of a call for prompts and size like this one's."""
    model, device = denoiser.model, denoiser.device
    batch, sequence = condition.caption.shape[0], condition.rope_cos.shape[0]
    shape = (batch, sequence, model.width)
    modulation = device.alloc((batch, model.time_width), "float32")
    return Workspace(device.alloc(shape, "float32"), device.alloc(shape, "float32"), modulation)


def predict(
    denoiser: Denoiser,
    image: Array,
    time: Array,
    condition: Condition,
    stripes: Sequence[Stripe],
    workspace: Workspace,
    prediction: Array,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Fill `prediction` [B,3,H,W] with x0 - noise for the noisy `image` [B,3,H,W] at `time` [B].

    Args:
        denoiser: the loaded networks.
        image: noisy pixels, float32.
        time: 1 - sigma, float32.
        condition: the prompt.
        stripes: how the pixel head is cut.
        workspace: buffers from `make_workspace` for this prompt and size.
        prediction: where the result goes.
        check: called between networks and stripes; it may raise to cancel.
    """
    engines, rope = denoiser.engines, {"rope_cos": condition.rope_cos, "rope_sin": condition.rope_sin}
    tokens, tokens_out, modulation = workspace.tokens, workspace.tokens_out, workspace.modulation
    engines["stem"].run(
        {"image": image, "time": time, "caption": condition.caption, **rope},
        {"tokens": tokens, "modulation": modulation},
    )
    check()
    engines["trunk"].run({"tokens": tokens, "modulation": modulation, **rope}, {"tokens_out": tokens_out})
    check()
    engines["tail"].run({"tokens": tokens_out, "modulation": modulation, **rope}, {"tokens_out": tokens})
    patch_px = denoiser.model.patch_px
    rows, columns = image.shape[2] // patch_px, image.shape[3] // patch_px
    features = tokens[:, : rows * columns]
    for stripe in stripes:
        check()
        _draw_stripe(denoiser, image, features, stripe, (rows, columns), prediction)


def _draw_stripe(
    denoiser: Denoiser, image: Array, features: Array, stripe: Stripe, grid: tuple[int, int], prediction: Array
) -> None:
    """Run the head on the rows a stripe reads and keep the rows that it owns."""
    model, device, columns = denoiser.model, denoiser.device, grid[1]
    batch, patch_px = image.shape[0], model.patch_px
    read = slice(stripe.read_first * patch_px, stripe.read_stop * patch_px)
    read_rows = stripe.read_stop - stripe.read_first
    window = device.contiguous(image[:, :, read])
    tokens = device.contiguous(features[:, stripe.read_first * columns : stripe.read_stop * columns])
    inputs = {"image": window, "tokens": tokens.reshape((batch, read_rows, columns, model.width))}
    whole = stripe.first == 0 and stripe.stop == grid[0]
    out = prediction if whole else device.alloc(window.shape, "float32")
    denoiser.engines["head"].run(inputs, {"prediction": out})
    if not whole:
        kept = slice((stripe.first - stripe.read_first) * patch_px, (stripe.stop - stripe.read_first) * patch_px)
        device.copy(prediction[:, :, stripe.first * patch_px : stripe.stop * patch_px], out[:, :, kept])
