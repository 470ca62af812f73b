"""Draws an image: noise through one schedule at its size, or through one at each of several growing sizes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from l2p_runtime.backends import Array
from l2p_runtime.coarse import Coarse, check_coarse, mix_enlarged
from l2p_runtime.denoiser import Denoiser, encode_caption, turned
from l2p_runtime.guidance import prompts_of
from l2p_runtime.loaded import LoadedNetworks
from l2p_runtime.policies import TimeDependent, axis_frequencies
from l2p_runtime.requests import ImageRequest, check_size
from l2p_runtime.sampler import Watch, sample, to_pixels
from l2p_runtime.schedule import model_time, sigmas

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from l2p_runtime.policies import Frequencies, Policy
    from l2p_runtime.stripes import Stripe


@dataclass(frozen=True, slots=True)
class Stage:
    """A schedule that is run at one size.

    Attributes:
        size_px: height and width.
        grid: token rows and columns.
        stripes: of the head.
        schedule: sigma of each step, and that of the result.
        guidance: guidance scale; 1 is none.
    """

    size_px: tuple[int, int]
    grid: tuple[int, int]
    stripes: Sequence[Stripe]
    schedule: Sequence[float]
    guidance: float

    @property
    def steps(self) -> int:
        """Denoising steps."""
        return len(self.schedule) - 1


def plan_stages(
    networks: LoadedNetworks, request: ImageRequest, coarse: Coarse | None, tokens: int, shown_bytes: int
) -> list[Stage]:
    """Fit what an image is drawn in: one stage, or two coarse to fine.

    Args:
        networks: what the memory has to hold; they are closed if the image needs the room.
        request: the image.
        coarse: how it is drawn coarse to fine; None for one stage.
        tokens: of the longest caption, padded.
        shown_bytes: what previews take.

    Raises:
        UsageError: a coarse image that is not smaller, or of another shape; or engines were not built for a size.
        HostError: a stage does not fit the memory.
    """
    model, sampling = networks.opened.manifest.model, request.sampling

    def stage(size_px: tuple[int, int], schedule: Sequence[float], guidance: float, further_bytes: int = 0) -> Stage:
        grid = check_size(model, *size_px)
        stripes = networks.plan_call(1, grid, tokens, prompts_of(guidance), further_bytes)
        return Stage(size_px, grid, stripes, schedule, guidance)

    schedule = sigmas(sampling.steps, sampling.shift)
    if coarse is None:
        return [stage(request.size_px, schedule, sampling.guidance, shown_bytes)]
    check_size(model, coarse.height, coarse.width)
    check_coarse(coarse, *request.size_px)
    # The coarse image is held until it is enlarged.
    held_bytes = 4 * 3 * coarse.height * coarse.width
    return [
        stage((coarse.height, coarse.width), schedule, sampling.guidance),
        stage(request.size_px, coarse.sigmas, coarse.guidance, shown_bytes + held_bytes),
    ]


def draw(
    denoiser: Denoiser,
    request: ImageRequest,
    captions: Sequence[NDArray[np.float32]],
    stages: Sequence[Stage],
    policy: str | Policy | TimeDependent,
    watch: Watch,
) -> NDArray[Any]:
    """Draw an image in one stage, or coarse to fine in several.

    A stage after the first starts from the image of the one before it, enlarged and mixed with noise to the first
    sigma of its schedule. Previews start with that image, enlarged.

    Args:
        denoiser: the model on its device.
        request: whose noise is drawn from.
        captions: embeddings [L,C] of the prompt, and of the negative one where a stage has guidance.
        stages: in order of their sizes; the last has that of the request.
        policy: position policy.
        watch: progress, previews and cancelling.

    Returns:
        [H,W,3] of the dtype of `watch`.

    Raises:
        CancelledError: the caller cancelled.
    """
    unseen = replace(watch, preview=None)
    image = make_noise(denoiser, request, stages[0].size_px)
    for before, stage in itertools.pairwise(stages):
        _run(denoiser, image, captions, before, policy, unseen)
        watch, unseen = (replace(seen, done=seen.done + before.steps) for seen in (watch, unseen))
        noise = make_noise(denoiser, request, stage.size_px)
        if watch.preview is not None and stage is stages[-1]:
            shown = denoiser.device.alloc(noise.shape, "float32")
            denoiser.device.copy(shown, noise)
            mix_enlarged(denoiser.device, shown, image, 0.0)
            watch.preview(watch.done, watch.steps, to_pixels(denoiser, shown, watch.dtype))
        mix_enlarged(denoiser.device, noise, image, stage.schedule[0])
        image = noise
    _run(denoiser, image, captions, stages[-1], policy, watch)
    return to_pixels(denoiser, image, watch.dtype)


def make_noise(denoiser: Denoiser, request: ImageRequest, size_px: tuple[int, int]) -> Array:
    """The noise of a request's seed at one size, float32 [1,3,H,W] on the device."""
    device, (height, width) = denoiser.device, size_px
    if request.rng == "torch-cpu":
        from l2p_runtime.noise import torch_cpu_noise

        return device.upload(torch_cpu_noise(request.seed, 3 * height * width).reshape(1, 3, height, width))
    image = device.alloc((1, 3, height, width), "float32")
    device.launch("noise", image[0], request.seed, request.image_index)
    return image


def _run(
    denoiser: Denoiser,
    image: Array,
    captions: Sequence[NDArray[np.float32]],
    stage: Stage,
    policy: str | Policy | TimeDependent,
    watch: Watch,
) -> None:
    """Run one stage in place, with the negative caption only where there is guidance."""

    def axes(time: float) -> tuple[Frequencies, ...]:
        return axis_frequencies(denoiser.model.rotary, stage.grid, policy, time)

    first = axes(model_time(stage.schedule[0]))
    conditions = [
        encode_caption(denoiser, [caption], *stage.grid, first) for caption in captions[: prompts_of(stage.guidance)]
    ]
    later = (
        (lambda time: turned(denoiser, conditions, *stage.grid, axes(time)))
        if isinstance(policy, TimeDependent)
        else None
    )
    sample(denoiser, image, conditions, stage.stripes, stage.schedule, stage.guidance, watch, later)
