"""The sampler: turns noise into an image, one prediction per step and prompt, with a preview of each step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from l2p_runtime.backends import Array
from l2p_runtime.denoiser import Condition, Denoiser, make_workspace, predict
from l2p_runtime.errors import CancelledError
from l2p_runtime.requests import PixelDType
from l2p_runtime.schedule import model_time

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from l2p_runtime.stripes import Stripe

Progress: TypeAlias = Callable[[int, int], None]
"""Receives (steps done, total steps) after each step."""

Preview: TypeAlias = "Callable[[int, int, NDArray[Any]], None]"
"""Receives (step, total steps, pixels [H,W,3]) before each step: the image if one step from here finished it."""

_FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True)
class Watch:
    """How a caller follows a drawing.

    Attributes:
        progress: called after each step.
        preview: receives every step's estimate of the finished image; None for no previews.
        cancelled: called between networks and stripes; true stops the drawing.
        dtype: of the pixels of previews.
        steps: of the whole drawing, of which `done` were taken before.
    """

    progress: Progress
    preview: Preview | None
    cancelled: Callable[[], bool]
    dtype: PixelDType
    steps: int
    done: int = 0

    def check(self) -> None:
        """Raise CancelledError if the caller cancelled."""
        if self.cancelled():
            raise CancelledError("drawing was cancelled")


def sample(
    denoiser: Denoiser,
    image: Array,
    conditions: Sequence[Condition],
    stripes: Sequence[Stripe],
    schedule: Sequence[float],
    guidance: float,
    watch: Watch,
    conditions_at: Callable[[float], Sequence[Condition]] | None = None,
) -> None:
    """Take an image from the first sigma of a schedule to its last, one prediction per step and prompt, in place.

    Args:
        denoiser: the model on its device.
        image: noise, or an image mixed with noise, [1,3,H,W] on the device; overwritten.
        conditions: of the prompt, and of the negative one where there is guidance.
        stripes: of the head.
        schedule: sigma of each step, and that of the result.
        guidance: guidance scale; without a negative condition it has no effect.
        watch: progress, previews and cancelling.
        conditions_at: the conditions at a later step's time, for positions that depend on it; None for the same ones.

    Raises:
        CancelledError: the caller cancelled.
    """
    device = denoiser.device
    workspaces = [make_workspace(denoiser, condition) for condition in conditions]
    predictions = [device.alloc(image.shape, "float32") for _ in conditions]
    for index, (sigma, following) in enumerate(itertools.pairwise(schedule)):
        time = model_time(sigma)
        if conditions_at is not None and index > 0:
            conditions = conditions_at(time)
        times = device.upload(_float32([time]))
        predict(denoiser, image, times, conditions, stripes, workspaces, predictions, watch.check)
        negative = predictions[1] if len(predictions) > 1 else None
        done = watch.done + index + 1
        if watch.preview is not None:
            estimate = device.alloc(image.shape, "float32")
            device.copy(estimate, image)
            device.launch("euler", estimate, predictions[0], negative, guidance, -sigma)
            watch.preview(done, watch.steps, to_pixels(denoiser, estimate, watch.dtype))
        device.launch("euler", image, predictions[0], negative, guidance, following - sigma)
        watch.progress(done, watch.steps)


def preview_bytes(height: int, width: int) -> int:
    """Bytes that previews take on the device beside the call, at most: the estimate and its pixels."""
    return _FLOAT_BYTES * 2 * 3 * height * width


def to_pixels(denoiser: Denoiser, image: Array, dtype: PixelDType) -> NDArray[Any]:
    """Image [1,3,H,W] on the device as pixels [H,W,3] on the host."""
    device = denoiser.device
    out = device.alloc((*image.shape[2:], 3), dtype)
    device.launch("pixels", out, image[0])
    device.synchronize()
    return device.download(out)


def _float32(values: Sequence[float]) -> NDArray[Any]:
    import numpy as np

    return np.asarray(values, np.float32)
