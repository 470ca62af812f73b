"""Denoising calls that ONNX graphs and engines are compared on: grids, captions, seeded inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from l2p_runtime.captions import pad_captions
from l2p_runtime.contract import ModelSpec, Profile
from l2p_runtime.positions import caption_tables, rope_tables

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Tensors = Mapping[str, NDArray[Any]]


CORNER_PIXELS_MAX = 1_500_000
"""Corners of a profile up to this many pixels are run while building; larger ones are listed as not run."""


MINIMUM_CASE_PIXELS_MAX = 7_000_000
"""The same for the minimum corner of a profile, which engines can run too; 2560x2560 of the 10k profile is within."""


MINIMUM_CASE_FLOPS_MAX = 5_000_000_000_000
"""Maximum operations of one call at that corner. At the published size, 16x16 tokens take 3.4 to 3.7 TFLOP, about a
tenth of a build on two cores. The 64x64 tokens at which 8k-zeroshot begins take 57."""


@dataclass(frozen=True, slots=True)
class Case:
    """One denoising call: token grid and unpadded caption length; the bundle contains those that are `stored`."""

    name: str
    rows: int
    columns: int
    caption_tokens: int
    stored: bool


def small_cases(model: ModelSpec) -> tuple[Case, ...]:
    """Two small stored cases: a grid with pad tokens and a short caption; no pads and a caption of over 32 tokens."""
    step = model.head.row_multiple
    return Case("padded", 2 * step, 3 * step, 7, stored=True), Case("full", 8, 4, 33, stored=True)


def minimum_case(model: ModelSpec, profile: Profile) -> Case:
    """The minimum corner of a profile, stored: the smallest call that engines of the profile take."""
    return _corner(model, profile.height_px.min, profile.width_px.min, profile.caption_tokens.min, stored=True)


def corner_cases(model: ModelSpec, profile: Profile) -> tuple[Case, ...]:
    """The other corners of a profile, non-square ones included."""
    height, width = profile.height_px, profile.width_px
    sizes = ((height.min, width.max), (height.max, width.min), (height.max, width.max))
    return tuple(_corner(model, h, w, profile.caption_tokens.opt, stored=False) for h, w in sizes)


def case_inputs(model: ModelSpec, case: Case, seed: int) -> dict[str, NDArray[Any]]:
    """The inputs of one case from seeded noise; see `call_inputs` for their names and shapes."""
    import numpy as np

    from l2p_runtime.noise import normal_noise

    rows, columns = (0, case.rows * model.patch_px), (0, case.columns * model.patch_px)
    caption = (0, case.caption_tokens), (0, model.caption_width)
    (embeds,) = normal_noise(seed, image_index=1, channels=1, rows=caption[0], cols=caption[1])
    image = normal_noise(seed, rows=rows, cols=columns)[np.newaxis]
    return call_inputs(model, image, 0.3 + 0.4 * (seed % 2), embeds)


def call_inputs(
    model: ModelSpec, image: NDArray[np.float32], time: float, prompt_embeds: NDArray[np.float32]
) -> dict[str, NDArray[Any]]:
    """The inputs of one denoising call: those of its networks, and the token grid.

    Args:
        model: the model, for patch size, padding and rotary axes.
        image: noisy pixels [1,3,H,W].
        time: t = 1 - sigma.
        prompt_embeds: [L,C], without padding.

    Returns:
        `image`, `time` [1], `prompt_embeds` [1,T,C], `caption_mask` [1,T], `rope_cos` and `rope_sin` [S,R] float32, and
        `grid` int64 [2]: token rows and columns.
    """
    import numpy as np

    rows, columns = (size // model.patch_px for size in image.shape[2:])
    padded, mask = pad_captions(model, [prompt_embeds])
    cosine, sine = rope_tables(model, rows, columns, mask.shape[1])
    return {
        "image": image,
        "time": np.asarray([time], np.float32),
        "prompt_embeds": padded,
        "caption_mask": mask,
        "rope_cos": cosine,
        "rope_sin": sine,
        "grid": np.asarray([rows, columns], np.int64),
    }


def network_inputs(network: str, case: Tensors, made: Tensors) -> dict[str, NDArray[Any]]:
    """The inputs of one network, from a case's inputs and the outputs of earlier networks (`network.output`)."""
    import numpy as np

    rope = {"rope_cos": case["rope_cos"], "rope_sin": case["rope_sin"]}
    if network == "caption":
        cosine, sine = caption_tables((rope["rope_cos"], rope["rope_sin"]), case["caption_mask"].shape[1])
        prompt = {"prompt_embeds": case["prompt_embeds"], "caption_mask": case["caption_mask"]}
        return {**prompt, "rope_cos": np.ascontiguousarray(cosine), "rope_sin": np.ascontiguousarray(sine)}
    if network == "stem":
        return {"image": case["image"], "time": case["time"], "caption": made["caption.caption"], **rope}
    if network == "head":
        rows, columns = (int(size) for size in case["grid"])
        tokens = made["tail.tokens_out"][:, : rows * columns]
        return {"image": case["image"], "tokens": tokens.reshape(len(tokens), rows, columns, -1)}
    before = "stem.tokens" if network == "trunk" else "trunk.tokens_out"
    return {"tokens": made[before], "modulation": made["stem.modulation"], **rope}


def _corner(model: ModelSpec, height_px: int, width_px: int, caption_tokens: int, *, stored: bool) -> Case:
    rows, columns = height_px // model.patch_px, width_px // model.patch_px
    return Case(f"{width_px}x{height_px}", rows, columns, caption_tokens, stored=stored)
