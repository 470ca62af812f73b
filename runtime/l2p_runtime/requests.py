"""Checks of what callers pass to the pipeline: sizes, embeddings, pixels, memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from l2p_runtime.arguments import integer, one_of, real_number, text, whole_number
from l2p_runtime.contract import Manifest, Sampling
from l2p_runtime.errors import HostError, UsageError, counted
from l2p_runtime.guidance import own_guidance
from l2p_runtime.memory import CallMemory
from l2p_runtime.stripes import Stripe, plan_stripes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from l2p_runtime.contract import ModelSpec

PixelDType = Literal["uint8", "uint16", "float16"]
Rng = Literal["philox", "torch-cpu"]

_IMAGE_INDEX_MAX = 2**32 - 1
_FLOATS_OF_ML_DTYPES = ("bfloat16", "float8_e4m3fn", "float8_e5m2")
"""Formats of embeddings that are no NumPy dtypes."""


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """One image, checked, in plain Python numbers.

    Attributes:
        size_px: height and width.
        grid: token rows and columns.
        captions: the prompt's, then the negative one's: embeddings [L,C], or text for the bundle's text encoder.
        image_index: which image of the seed.
        rng: where its noise comes from.
    """

    size_px: tuple[int, int]
    grid: tuple[int, int]
    captions: tuple[NDArray[np.float32] | str, ...]
    sampling: Sampling
    seed: int
    image_index: int
    rng: Rng


def image_request(
    manifest: Manifest,
    *,
    prompt: str | None,
    negative_prompt: str | None,
    prompt_embeds: object,
    negative_embeds: object,
    height: int,
    width: int,
    seed: int,
    sampling: Mapping[str, float | None],
    fine_guidance: float = 1.0,
    rng: Rng,
    dtype: str,
    image_index: int = 0,
    guidance_convention: str = "l2p",
) -> ImageRequest:
    """Check everything a caller asks of one image, before anything is loaded or allocated.

    Embeddings take precedence over text; a prompt beside them is only a description. With a text encoder, the
    negative prompt is empty text unless given. `fine_guidance` is that of the second pass of a drawing coarse to fine.

    Raises:
        UsageError: a value out of range, a size that does not divide, or text for a bundle without a text encoder.
    """
    from l2p_runtime.noise import checked_seed

    model = manifest.model
    grid = check_size(model, height, width)
    seed = checked_seed(seed)
    image_index = whole_number("image_index", image_index, 0, _IMAGE_INDEX_MAX)
    if one_of("rng", rng, get_args(Rng)) == "torch-cpu" and image_index:
        raise UsageError(f"image_index is {image_index}, and rng torch-cpu has one image per seed", hint="use philox")
    one_of("dtype", dtype, get_args(PixelDType))
    for name, words in (("prompt", prompt), ("negative_prompt", negative_prompt)):
        if words is not None:
            text(name, words)
    chosen = _sampling(manifest.sampling, sampling, guidance_convention)
    captions = [_caption(manifest, "prompt", prompt, prompt_embeds)]
    guidance = max(chosen.guidance, fine_guidance, key=lambda scale: abs(scale - 1.0))
    if guidance != 1.0:
        if negative_prompt is None and manifest.text is not None:
            negative_prompt = ""
        if negative_embeds is None and negative_prompt is None:
            raise UsageError(
                f"guidance {guidance} needs the embeddings of a negative prompt",
                hint="pass --negative-embeddings FILE (negative_embeds= in Python), or guidance 1",
            )
        captions.append(_caption(manifest, "negative prompt", negative_prompt, negative_embeds))
    size_px = grid[0] * model.patch_px, grid[1] * model.patch_px
    return ImageRequest(size_px, grid, tuple(captions), chosen, seed, image_index, rng)


def check_size(model: ModelSpec, height: int, width: int) -> tuple[int, int]:
    """Token rows and columns of an image of this size in pixels.

    Raises:
        UsageError: not positive, does not divide by the patch, or larger than the model's positions reach.
    """
    multiple, longest = model.size_multiple_px, longest_px(model)
    height, width = integer("height", height), integer("width", width)
    for name, size in (("height", height), ("width", width)):
        if size < 1 or size > longest:
            raise UsageError(f"{name} is {size} px, expected {multiple} to {longest} px for variant {model.variant}")
    if height % multiple or width % multiple:
        near = [f"{a}x{b}" for a in _nearest(width, multiple, longest) for b in _nearest(height, multiple, longest)]
        raise UsageError(
            f"size {width}x{height} does not divide by {multiple} px, which variant {model.variant} needs",
            hint=f"the nearest sizes that do (width x height): {', '.join(near)}",
        )
    return height // model.patch_px, width // model.patch_px


def longest_px(model: ModelSpec) -> int:
    """The longest side that the model's positions reach."""
    return model.rotary.axis_lengths[1] * model.patch_px


def check_embeds(model: ModelSpec, embeds: object, batch: int | None = None) -> list[NDArray[np.float32]]:
    """One [L,C] float32 array per image, from [L,C], [B,L,C] or a sequence of [L,C].

    Raises:
        UsageError: another rank or width, no tokens or too many, not finite, another batch size, or captions whose
            padded lengths differ.
    """
    import numpy as np

    if isinstance(embeds, np.ndarray) and embeds.ndim == 2:
        embeds = embeds[np.newaxis]
    if not isinstance(embeds, (np.ndarray, Sequence)) or isinstance(embeds, str):
        raise UsageError(f"prompt embeddings are a {type(embeds).__name__}, expected an array [B,L,C]")
    captions = [_check_caption(model, np.asarray(caption)) for caption in embeds]
    if not captions or (batch is not None and len(captions) != batch):
        raise UsageError(
            f"expected one caption per image, got {counted(len(captions), 'caption')} "
            f"for {counted(batch or 1, 'image')}"
        )
    lengths = {model.padded(len(caption)) for caption in captions}
    if len(lengths) > 1:
        raise UsageError(
            f"captions of one batch are padded to {sorted(lengths)} tokens, expected one length",
            hint="run them in separate calls",
        )
    return captions


def check_image(image: object) -> NDArray[np.float32]:
    """Noisy pixels [B,3,H,W] as contiguous float32.

    Raises:
        UsageError: another rank, other channels, values that are not finite, or no numbers.
    """
    import numpy as np

    array = float_array("image", image)
    if array.ndim != 4 or array.shape[1] != 3 or array.shape[0] < 1:
        raise UsageError(f"image has shape {list(array.shape)}, expected [B, 3, H, W]")
    return np.ascontiguousarray(array)


def check_time(time: object, batch: int) -> NDArray[np.float32]:
    """Times [B] in [0,1] as float32; a single number serves the whole batch.

    Raises:
        UsageError: another shape, or outside [0,1].
    """
    import numpy as np

    array = float_array("time", time)
    if array.ndim == 0:
        array = np.full(batch, array, np.float32)
    if array.shape != (batch,) or not ((array >= 0) & (array <= 1)).all():
        raise UsageError(f"time is {np.array2string(array, threshold=8)}, expected {batch} values from 0 to 1")
    return array


def plan_call(
    model: ModelSpec,
    grid: tuple[int, int],
    need: CallMemory,
    limit_bytes: int,
    head_limit_bytes: int,
    head_rows: int | None = None,
) -> tuple[Stripe, ...]:
    """Cut the head so that one denoising call fits, or refuse before anything is allocated.

    Args:
        model: the model.
        grid: token rows and columns.
        need: what the call takes.
        limit_bytes: what a call may take while a transformer network runs.
        head_limit_bytes: what it may take while the head runs.
        head_rows: maximum of token rows that the head takes at once; None for any number.

    Raises:
        HostError: the buffers, the attention or the smallest stripe do not fit.
    """
    rows, columns = grid
    if need.buffers_bytes + need.tokens_bytes > limit_bytes:
        raise HostError(
            f"{columns * model.patch_px}x{rows * model.patch_px} needs {need.buffers_bytes:,} bytes of buffers and "
            f"{need.tokens_bytes:,} bytes for attention, {max(limit_bytes, 0):,} bytes are there",
            hint="raise the memory budget, or draw a smaller image",
        )
    budget = head_limit_bytes - need.buffers_bytes
    if head_rows is not None:
        budget = min(budget, head_rows * need.head_row_bytes)
    return plan_stripes(model.head, rows, need.head_row_bytes, budget)


def least_memory(model: ModelSpec, grid: tuple[int, int], need: CallMemory, other_bytes: int, head_bytes: int) -> int:
    """The least bytes that a call fits into, networks included, when they take turns.

    Args:
        model: the model.
        grid: token rows and columns.
        need: what the call takes.
        other_bytes: what the largest network but the head takes.
        head_bytes: what the head takes.
    """
    halo, rows = model.head.halo_rows, grid[0]
    least_rows = rows if halo is None else min(1 + 2 * halo, rows)
    inside = max(other_bytes + need.tokens_bytes, head_bytes + least_rows * need.head_row_bytes)
    return need.buffers_bytes + inside


def _sampling(defaults: Sampling, asked: Mapping[str, float | None], convention: str) -> Sampling:
    steps, shift = asked.get("steps"), asked.get("shift")
    guidance = own_guidance(asked.get("guidance"), convention)
    return Sampling(
        defaults.steps if steps is None else integer("steps", steps),
        defaults.guidance if guidance is None else guidance,
        defaults.shift if shift is None else real_number("shift", shift),
    )


def _caption(manifest: Manifest, what: str, words: str | None, embeds: object) -> NDArray[np.float32] | str:
    model = manifest.model
    if embeds is None and words is not None and manifest.text is not None:
        return words
    if embeds is None:
        prefix = "negative-" if what.startswith("negative") else ""
        found = f"cannot read the {what}: it has no text encoder" if words is not None else f"was given no {what}"
        either = f"pass a {what}, or" if manifest.text is not None else "pass"
        raise UsageError(
            f"the bundle {found}",
            hint=f"{either} embeddings [L, {model.caption_width}] made elsewhere: --{prefix}embeddings FILE.npy, "
            f"or {'negative' if prefix else 'prompt'}_embeds= in Python; or build the bundle with --text-encoder DIR",
        )
    return check_embeds(model, embeds, 1)[0]


def _check_caption(model: ModelSpec, caption: NDArray[Any]) -> NDArray[np.float32]:
    array = float_array("prompt embeddings", caption)
    if array.ndim != 2 or array.shape[1] != model.caption_width:
        raise UsageError(f"prompt embeddings have shape {list(array.shape)}, expected [L, {model.caption_width}]")
    if not 1 <= len(array) <= model.caption_tokens_max:
        raise UsageError(f"the caption has {len(array)} tokens, expected 1 to {model.caption_tokens_max}")
    return array


def float_array(name: str, values: object) -> NDArray[np.float32]:
    """Numbers of any dtype as float32.

    Raises:
        UsageError: text, complex numbers, truth, or values that are not finite in float32.
    """
    import numpy as np

    try:
        given = np.asarray(values)
        # Text would be parsed, complex numbers would lose a part, and truth is no number.
        numbers = given.dtype.kind in "fiuO" or given.dtype.name in _FLOATS_OF_ML_DTYPES
        with np.errstate(over="ignore"):
            array = np.asarray(given if numbers else (), np.float32)
    # A tensor that needs a gradient refuses with a RuntimeError.
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"{name} cannot be read as float32: {error}") from error
    if not numbers:
        raise UsageError(f"{name} cannot be read as float32: it holds {given.dtype}")
    if not np.isfinite(array).all():
        raise UsageError(f"{name} holds NaN or Inf")
    return array


def _nearest(size: int, multiple: int, longest: int) -> list[int]:
    lower = size // multiple * multiple
    return [
        near for near in dict.fromkeys((lower, lower + (multiple if size % multiple else 0))) if 0 < near <= longest
    ]
