"""Reads the dimensions of an L2P checkpoint from its tensor shapes, and makes the shapes of given dimensions.

Source: docs/model.md, "Transformer", "Pixel head" and "Tensor names". Names are the published ones: split
q/k/v, no prefix.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from l2p_runtime.errors import ArtifactError

Shapes = Mapping[str, tuple[int, ...]]

VARIANTS: Mapping[int, str] = {16: "1k", 64: "4k", 128: "8k", 160: "10k"}
"""Patch size in pixels to variant."""

STAGES: Mapping[int, tuple[str, ...]] = {
    16: ("1", "2", "3", "4"),
    64: ("0", "0b", "1", "2", "3", "4"),
    128: ("_8k", "0", "0b", "1", "2", "3", "4"),
    160: ("_10k_a", "0", "0b", "1", "2", "3"),
}
"""U-Net levels of each patch size, full resolution first: `enc{level}`, `up{level}`, `dec{level}`."""

SINUSOID_WIDTH = 256

# Name prefixes of the tensors of each network outside its transformer blocks.
_OUTSIDE_BLOCKS: Mapping[str, tuple[str, ...]] = {
    "caption": ("cap_embedder.", "cap_pad_token"),
    "stem": ("all_x_embedder.", "x_pad_token", "t_embedder."),
    "trunk": (),
    "tail": (),
    "head": ("local_decoder.",),
}


@dataclass(frozen=True, slots=True)
class UNetLevel:
    """One resolution of the U-Net: channels out of its encoder, upsampling and decoder convolutions."""

    name: str
    encoder: int
    up: int
    decoder: int


@dataclass(frozen=True, slots=True)
class Dimensions:
    """Sizes of one model; the published ones in brackets.

    Attributes:
        patch_px: p [16, 64, 128, 160].
        width: D [3840].
        head_width: channels of an attention head [128].
        ffn_width: inner width of the SwiGLU [10240].
        caption_width: C [2560].
        time_width: A, width of the time embedding [256].
        time_hidden: inner width of the time embedding [1024].
        layers: main layers [30].
        noise_refiners: refiner layers on image tokens [2].
        context_refiners: refiner layers on caption tokens [2].
        levels: U-Net levels, full resolution first.
        bottleneck: channels of the U-Net's bottleneck [512].
        cut: first layer of a trunk that is shortened to match its source, and the one after its last; None for the
            family's own trunk.
    """

    patch_px: int
    width: int
    head_width: int
    ffn_width: int
    caption_width: int
    time_width: int
    time_hidden: int
    layers: int
    noise_refiners: int
    context_refiners: int
    levels: tuple[UNetLevel, ...]
    bottleneck: int
    cut: tuple[int, int] | None = None

    @property
    def heads(self) -> int:
        """Attention heads [30]."""
        return self.width // self.head_width

    @property
    def trunk(self) -> range:
        """The frozen layers: a sixth of the layers stays outside at each end [5 to 24 of 30]."""
        if self.cut is not None:
            return range(*self.cut)
        outside = min(max(1, self.layers // 6), (self.layers - 1) // 2)
        return range(outside, self.layers - outside)


def dimensions_from_shapes(shapes: Shapes) -> Dimensions:
    """Read the dimensions. Where tensors disagree, the majority decides, and `faults.shape_faults` names the others.

    Raises:
        ArtifactError: a latent checkpoint, no L2P checkpoint at all, an unknown patch size, or sizes that do not fit
            each other.
    """
    patch_px = _patch_px(shapes)

    def size(pattern: str) -> int:
        return _majority(shapes, pattern, 0)

    levels = tuple(
        UNetLevel(
            name,
            encoder=size(rf"local_decoder\.enc{name}\.0\.(?:weight|bias)"),
            up=size(rf"local_decoder\.up{name}\.1\.(?:weight|bias)"),
            decoder=size(rf"local_decoder\.dec{name}\.0\.(?:weight|bias)"),
        )
        for name in STAGES[patch_px]
    )
    dimensions = _body(shapes, patch_px, levels, size(r"local_decoder\.bottleneck\.0\.(?:weight|bias)"))
    _check(dimensions)
    return dimensions


def source_dimensions(shapes: Shapes, pixels: Dimensions) -> Dimensions:
    """Dimensions of the L2P model that a latent source becomes: its own transformer, the patches and head of `pixels`.

    Raises:
        ArtifactError: a tensor of the transformer is absent, or sizes do not fit each other.
    """
    dimensions = _body(shapes, pixels.patch_px, pixels.levels, pixels.bottleneck)
    _check(dimensions)
    return dimensions


def expected_shapes(d: Dimensions) -> dict[str, tuple[int, ...]]:
    """Published name to shape of every tensor that a model of these dimensions has."""
    shapes: dict[str, tuple[int, ...]] = {
        f"all_x_embedder.{d.patch_px}-1.weight": (d.width, 3 * d.patch_px**2),
        f"all_x_embedder.{d.patch_px}-1.bias": (d.width,),
        "t_embedder.mlp.0.weight": (d.time_hidden, SINUSOID_WIDTH),
        "t_embedder.mlp.0.bias": (d.time_hidden,),
        "t_embedder.mlp.2.weight": (d.time_width, d.time_hidden),
        "t_embedder.mlp.2.bias": (d.time_width,),
        "cap_embedder.0.weight": (d.caption_width,),
        "cap_embedder.1.weight": (d.width, d.caption_width),
        "cap_embedder.1.bias": (d.width,),
        "x_pad_token": (1, d.width),
        "cap_pad_token": (1, d.width),
    }
    groups = (("layers", d.layers, True), ("noise_refiner", d.noise_refiners, True))
    for group, count, modulated in (*groups, ("context_refiner", d.context_refiners, False)):
        for index in range(count):
            shapes |= _block_shapes(f"{group}.{index}", d, modulated=modulated)
    return shapes | _head_shapes(d)


def main_layer(name: str) -> int | None:
    """The number of the main layer that a tensor belongs to; None if it belongs to none."""
    match = re.match(r"layers\.([0-9]{1,4})\.", name)
    return int(match[1]) if match else None


def is_latent(name: str) -> bool:
    """Whether only Z-Image has a tensor of this name and no L2P model: its final layer, or its embedder of latents."""
    return name.startswith(("all_final_layer.", "all_x_embedder.2-1."))


def network_blocks(name: str, d: Dimensions) -> tuple[str, ...]:
    """The transformer blocks of one network, in the order they run."""
    blocks = {
        "caption": [f"context_refiner.{index}" for index in range(d.context_refiners)],
        "stem": [f"noise_refiner.{index}" for index in range(d.noise_refiners)]
        + [f"layers.{index}" for index in range(d.trunk.start)],
        "trunk": [f"layers.{index}" for index in d.trunk],
        "tail": [f"layers.{index}" for index in range(d.trunk.stop, d.layers)],
        "head": [],
    }
    return tuple(blocks[name])


def network_shapes(name: str, d: Dimensions) -> dict[str, tuple[int, ...]]:
    """Published name to shape of the tensors of one network; the five together are `expected_shapes`."""
    begins = (*(f"{block}." for block in network_blocks(name, d)), *_OUTSIDE_BLOCKS[name])
    return {tensor: shape for tensor, shape in expected_shapes(d).items() if tensor.startswith(begins)}


def shared_trunk(cut: range, equal_layers: tuple[int, ...]) -> tuple[int, int]:
    """The longest run of equal layers in `cut`, as (first, stop): a source may shorten the trunk, never lengthen it.

    Raises:
        ArtifactError: no layer of the cut is equal.
    """
    best = (0, 0)
    first = cut.start
    for index in cut:
        if index not in equal_layers:
            first = index + 1
        elif index + 1 - first > best[1] - best[0]:
            best = (first, index + 1)
    if best == (0, 0):
        raise ArtifactError(f"no layer of {cut.start} to {cut.stop - 1} equals the source's, so they share no trunk")
    return best


def published_dimensions(variant: str) -> Dimensions:
    """Dimensions of the published 1k, 4k, 8k and 10k checkpoints.

    Source: docs/model.md, "Variants", "Transformer" and "Pixel head".
    """
    patch_px = next(patch for patch, name in VARIANTS.items() if name == variant)
    narrow = {
        "_8k": UNetLevel("_8k", 3, 16, 16),
        "_10k_a": UNetLevel("_10k_a", 3, 16, 16),
        "0": UNetLevel("0", 16, 16, 16),
    }
    narrow |= {"0b": UNetLevel("0b", 32, 32, 16), "1": UNetLevel("1", 64, 64, 32), "2": UNetLevel("2", 128, 128, 64)}
    narrow |= {"3": UNetLevel("3", 256, 256, 128), "4": UNetLevel("4", 512, 512, 256)}
    if variant == "1k":
        narrow["1"] = UNetLevel("1", 64, 64, 64)
    if variant == "10k":
        narrow["3"] = UNetLevel("3", 256, 256, 128)
    return Dimensions(
        patch_px=patch_px,
        width=3840,
        head_width=128,
        ffn_width=10240,
        caption_width=2560,
        time_width=256,
        time_hidden=1024,
        layers=30,
        noise_refiners=2,
        context_refiners=2,
        levels=tuple(narrow[name] for name in STAGES[patch_px]),
        bottleneck=512,
    )


def _body(shapes: Shapes, patch_px: int, levels: tuple[UNetLevel, ...], bottleneck: int) -> Dimensions:
    """The transformer's sizes, by majority."""

    def size(pattern: str, axis: int) -> int:
        return _majority(shapes, pattern, axis)

    block = r"(?:layers|noise_refiner|context_refiner)\.\d+\."
    return Dimensions(
        patch_px=patch_px,
        width=size(block + r"(?:attention_norm[12]|ffn_norm[12])\.weight", 0),
        head_width=size(block + r"attention\.norm_[qk]\.weight", 0),
        ffn_width=size(block + r"feed_forward\.w[13]\.weight", 0),
        caption_width=size(r"cap_embedder\.0\.weight|cap_embedder\.1\.weight", -1),
        time_width=size(r"(?:layers|noise_refiner)\.\d+\.adaLN_modulation\.0\.weight", 1),
        time_hidden=size(r"t_embedder\.mlp\.0\.(?:weight|bias)", 0),
        layers=_count(shapes, "layers"),
        noise_refiners=_count(shapes, "noise_refiner"),
        context_refiners=_count(shapes, "context_refiner"),
        levels=levels,
        bottleneck=bottleneck,
    )


def _block_shapes(name: str, d: Dimensions, *, modulated: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for projection in ("to_q", "to_k", "to_v", "to_out.0"):
        shapes[f"{name}.attention.{projection}.weight"] = (d.width, d.width)
    for norm in ("norm_q", "norm_k"):
        shapes[f"{name}.attention.{norm}.weight"] = (d.head_width,)
    for norm in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
        shapes[f"{name}.{norm}.weight"] = (d.width,)
    shapes[f"{name}.feed_forward.w1.weight"] = (d.ffn_width, d.width)
    shapes[f"{name}.feed_forward.w2.weight"] = (d.width, d.ffn_width)
    shapes[f"{name}.feed_forward.w3.weight"] = (d.ffn_width, d.width)
    if modulated:
        shapes[f"{name}.adaLN_modulation.0.weight"] = (4 * d.width, d.time_width)
        shapes[f"{name}.adaLN_modulation.0.bias"] = (4 * d.width,)
    return shapes


def _head_shapes(d: Dimensions) -> dict[str, tuple[int, ...]]:
    """The U-Net `local_decoder`: a decoder level reads [up, skip], the bottleneck [image, tokens]."""
    convs: list[tuple[str, int, int, int]] = []
    channels = 3
    for level in d.levels:
        convs.append((f"enc{level.name}.0", level.encoder, channels, 3))
        channels = level.encoder
    convs.append(("bottleneck.0", d.bottleneck, channels + d.width, 1))
    channels = d.bottleneck
    for level in reversed(d.levels):
        convs.append((f"up{level.name}.1", level.up, channels, 3))
        convs.append((f"dec{level.name}.0", level.decoder, level.up + level.encoder, 3))
        channels = level.decoder
    convs.append(("out_conv", 3, channels, 1))
    shapes: dict[str, tuple[int, ...]] = {}
    for name, out_channels, in_channels, kernel in convs:
        shapes[f"local_decoder.{name}.weight"] = (out_channels, in_channels, kernel, kernel)
        shapes[f"local_decoder.{name}.bias"] = (out_channels,)
    return shapes


def _patch_px(shapes: Shapes) -> int:
    names = [name for name in shapes if re.fullmatch(r"all_x_embedder\.[0-9]{1,6}-1\.(?:weight|bias)", name)]
    if any(map(is_latent, shapes)):
        raise ArtifactError(
            "this is a latent Z-Image checkpoint (it has a final layer or 2 px latent patches), not an L2P checkpoint",
            hint="an L2P checkpoint has `all_x_embedder.16-1`, `.64-1`, `.128-1` or `.160-1` and a `local_decoder`",
        )
    if not names or not any(name.startswith("local_decoder.") for name in shapes):
        raise ArtifactError(
            "this is not an L2P checkpoint: it has no `all_x_embedder.P-1` or no `local_decoder`",
            hint=f"its first tensors are {', '.join(sorted(shapes)[:3])}",
        )
    patches = sorted({int(re.findall(r"\d+", name)[0]) for name in names})
    unknown = [str(patch) for patch in patches if patch not in VARIANTS]
    if unknown or len(patches) > 1:
        raise ArtifactError(
            f"the checkpoint has patches of {', '.join(map(str, patches))} px, expected exactly one of "
            f"{', '.join(map(str, VARIANTS))}"
        )
    return patches[0]


def _majority(shapes: Shapes, pattern: str, axis: int) -> int:
    matcher = re.compile(pattern)
    found = [shape[axis] for name, shape in shapes.items() if shape and matcher.fullmatch(name) and len(shape) > axis]
    if not found:
        name = (
            re.sub(r"\(\?:([^)|]*)[^)]*\)", r"\1", pattern).replace("\\d+", "N").replace("\\", "").replace("[12]", "1")
        )
        raise ArtifactError(f"the checkpoint has no tensor `{name}`", hint="it is incomplete; download it again")
    return Counter(found).most_common(1)[0][0]


def _count(shapes: Shapes, group: str) -> int:
    matches = (re.match(rf"{group}\.([0-9]{{1,4}})\.", name) for name in shapes)
    indices = sorted({int(match[1]) for match in matches if match})
    # A gap is a missing layer; a stray `layers.9999` is an unknown one, not ten thousand missing layers.
    return max((index + 1 for rank, index in enumerate(indices, 1) if 2 * rank > index), default=0)


def _check(d: Dimensions) -> None:
    if d.layers < 1:
        raise ArtifactError("the checkpoint has no main layers (`layers.0` and on)")
    sizes = (d.width, d.head_width, d.ffn_width, d.caption_width, d.time_width, d.time_hidden, d.bottleneck)
    if min(*sizes, *(size for level in d.levels for size in (level.encoder, level.up, level.decoder))) < 1:
        raise ArtifactError("the checkpoint has tensors of size 0", hint="it is incomplete; download it again")
    if d.width % d.head_width:
        raise ArtifactError(f"the width {d.width} is no multiple of the head width {d.head_width}")
    # Rotary axes take 1/4, 3/8 and 3/8 of a head, each an even number of channels.
    if d.head_width % 16:
        raise ArtifactError(f"the head width is {d.head_width}, expected a multiple of 16 (rotary axes 1/4, 3/8, 3/8)")
