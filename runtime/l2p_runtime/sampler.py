"""The sampler: turns noise into an image, one prediction per step and prompt, with a preview of each step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from l2p_runtime.backends import Array
from l2p_runtime.contract import Sampling
from l2p_runtime.denoiser import Condition, Denoiser, make_workspace, predict
from l2p_runtime.errors import CancelledError
from l2p_runtime.requests import PixelDType
from l2p_runtime.schedule import model_time, sigmas

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from l2p_runtime.stripes import Stripe

Progress: TypeAlias = Callable[[int, int], None]
"""Receives (steps done, total steps) after each step."""

Preview: TypeAlias = "Callable[[int, int, NDArray[Any]], None]"
"""Receives (step, total steps, pixels [H,W,3]) before each step: the image if one step from here finished it."""

_FLOAT_BYTES = 4


def sample(
    denoiser: Denoiser,
    image: Array,
    conditions: Sequence[Condition],
    stripes: Sequence[Stripe],
    sampling: Sampling,
    dtype: PixelDType,
    *,
    progress: Progress,
    preview: Preview | None,
    cancelled: Callable[[], bool],
) -> NDArray[Any]:
    """Draw an image from noise.

    Args:
        denoiser: the model on its device.
        image: noise [1,3,H,W] on the device; overwritten.
        conditions: of the prompt, and of the negative one where there is guidance.
        stripes: of the head.
        sampling: steps, guidance and shift.
        dtype: of the pixels.
        progress: called after each step.
        preview: receives every step's estimate of the finished image.
        cancelled: called between networks and stripes; true stops the drawing.

    Returns:
        [H,W,3] of `dtype`.

    Raises:
        CancelledError: `cancelled` said so.
    """
    device = denoiser.device
    workspaces = [make_workspace(denoiser, condition) for condition in conditions]
    predictions = [device.alloc(image.shape, "float32") for _ in conditions]

    def check() -> None:
        if cancelled():
            raise CancelledError("drawing was cancelled")

    for index, (sigma, following) in enumerate(itertools.pairwise(sigmas(sampling.steps, sampling.shift))):
        time = device.upload(_float32([model_time(sigma)]))
        predict(denoiser, image, time, conditions, stripes, workspaces, predictions, check)
        negative = predictions[1] if len(predictions) > 1 else None
        if preview is not None:
            estimate = device.alloc(image.shape, "float32")
            device.copy(estimate, image)
            device.launch("euler", estimate, predictions[0], negative, sampling.guidance, -sigma)
            preview(index + 1, sampling.steps, _pixels(denoiser, estimate, dtype))
        device.launch("euler", image, predictions[0], negative, sampling.guidance, following - sigma)
        progress(index + 1, sampling.steps)
    return _pixels(denoiser, image, dtype)


def preview_bytes(height: int, width: int) -> int:
    """Bytes that previews take on the device beside the call, at most: the estimate and its pixels."""
    return _FLOAT_BYTES * 2 * 3 * height * width


def _pixels(denoiser: Denoiser, image: Array, dtype: PixelDType) -> NDArray[Any]:
    """Image [1,3,H,W] on the device as pixels [H,W,3] on the host."""
    device = denoiser.device
    out = device.alloc((*image.shape[2:], 3), dtype)
    device.launch("pixels", out, image[0])
    device.synchronize()
    return device.download(out)


def _float32(values: Sequence[float]) -> NDArray[Any]:
    import numpy as np

    return np.asarray(values, np.float32)
