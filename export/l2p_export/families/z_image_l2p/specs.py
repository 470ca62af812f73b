"""Specifications of a `z_image_l2p` model and its networks, for the runtime and the engine builders."""

from __future__ import annotations

from l2p_export.families.z_image_l2p.dimensions import VARIANTS, Dimensions
from l2p_runtime.contract import HeadSpec, ModelSpec, NetworkSpec, RotarySpec, TensorSpec

FAMILY = "z_image_l2p"
SEQUENCE_MULTIPLE = 32
CAPTION_TOKENS_MAX = 512
HALO_ROWS = 3
"""Token rows of context on each side of a stripe: 3 p covers 3 (2^levels - 1), the U-Net's reach
(docs/design.md, "Head stripes")."""


def model_spec(d: Dimensions) -> ModelSpec:
    """The model's description for the runtime."""
    whole = d.patch_px != 2 ** len(d.levels)
    return ModelSpec(
        family=FAMILY,
        variant=VARIANTS[d.patch_px],
        patch_px=d.patch_px,
        width=d.width,
        heads=d.heads,
        layers=d.layers,
        trunk_layers=(d.trunk.start, d.trunk.stop),
        ffn_width=d.ffn_width,
        caption_width=d.caption_width,
        time_width=d.time_width,
        sequence_multiple=SEQUENCE_MULTIPLE,
        caption_tokens_max=CAPTION_TOKENS_MAX,
        rotary=RotarySpec(
            theta=256.0,
            axis_channels=(d.head_width // 4, d.head_width * 3 // 8, d.head_width * 3 // 8),
            axis_lengths=(1024, 512, 512),
            base_grid=(64, 64),
        ),
        head=HeadSpec(
            row_multiple=2 if whole else 1,
            # The reach of the 160 px head is not a whole number of tokens; it runs whole until its own halo is proven.
            halo_rows=None if whole else HALO_ROWS,
            peak_values_per_px=_head_peak_values_per_px(d, joins_skips=True),
            fused_peak_values_per_px=_head_peak_values_per_px(d, joins_skips=False),
        ),
    )


def network_specs(d: Dimensions) -> tuple[NetworkSpec, ...]:
    """Inputs and outputs of the five networks, in the order in which they run (docs/design.md, "Networks").

    Symbols: B batch, h and w token rows and columns (halved for the 160 px head), t caption tokens / 32, s sequence
    length, r token rows of a head stripe.
    """
    multiple = 2 if d.patch_px != 2 ** len(d.levels) else 1
    side_px = d.patch_px * multiple
    rows, columns = (f"{multiple}*r", f"{multiple}*w") if multiple > 1 else ("r", "w")
    pairs = d.head_width // 2
    caption_tokens = f"{SEQUENCE_MULTIPLE}*t"
    sequence_rope = _rope("s", pairs)
    modulation = TensorSpec("modulation", "float32", ("B", d.time_width))
    tokens = TensorSpec("tokens", "float32", ("B", "s", d.width))
    tokens_out = TensorSpec("tokens_out", "float32", ("B", "s", d.width))
    caption = TensorSpec("caption", "float32", ("B", caption_tokens, d.width))
    return (
        NetworkSpec(
            "caption",
            (
                TensorSpec("prompt_embeds", "float32", ("B", caption_tokens, d.caption_width)),
                TensorSpec("caption_mask", "bool", ("B", caption_tokens)),
                *_rope(caption_tokens, pairs),
            ),
            (caption,),
        ),
        NetworkSpec(
            "stem",
            (
                TensorSpec("image", "float32", ("B", 3, f"{side_px}*h", f"{side_px}*w")),
                TensorSpec("time", "float32", ("B",)),
                caption,
                *sequence_rope,
            ),
            (tokens, modulation),
        ),
        NetworkSpec("trunk", (tokens, modulation, *sequence_rope), (tokens_out,)),
        NetworkSpec("tail", (tokens, modulation, *sequence_rope), (tokens_out,)),
        NetworkSpec(
            "head",
            (
                TensorSpec("image", "float32", ("B", 3, f"{side_px}*r", f"{side_px}*w")),
                TensorSpec("tokens", "float32", ("B", rows, columns, d.width)),
            ),
            (TensorSpec("prediction", "float32", ("B", 3, f"{side_px}*r", f"{side_px}*w")),),
        ),
    )


def _rope(length: str, pairs: int) -> tuple[TensorSpec, TensorSpec]:
    return TensorSpec("rope_cos", "float32", (length, pairs)), TensorSpec("rope_sin", "float32", (length, pairs))


def _head_peak_values_per_px(d: Dimensions, *, joins_skips: bool) -> float:
    """Maximum of activation values alive at once in the U-Net, per pixel: skips, and a step's input and output.

    Args:
        d: the head's channels.
        joins_skips: a skip is copied beside the upsampled image; a fused graph reads both where they are.
    """
    skips = 0.0
    peak = 0.0
    channels, area = 3, 1.0
    for level in d.levels:
        # Convolution and SiLU: input, pre-activation and output.
        peak = max(peak, skips + (channels + 2 * level.encoder) * area)
        skips += level.encoder * area
        channels, area = level.encoder, area / 4
    peak = max(peak, skips + (channels + d.width + d.bottleneck) * area)
    channels = d.bottleneck
    for level in reversed(d.levels):
        area *= 4
        # Upsampled input and its convolution.
        peak = max(peak, skips + (channels + level.up) * area)
        if joins_skips:
            # [up, skip] joined, and the decoder's output.
            peak = max(peak, skips + (2 * level.up + level.encoder + 2 * level.decoder) * area)
        else:
            # The decoder's output of `up`, and then the sum of it and the skip's.
            peak = max(peak, skips + (max(level.up, level.decoder) + level.decoder) * area)
        skips -= level.encoder * area
        channels = level.decoder
    return peak
