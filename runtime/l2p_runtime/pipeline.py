"""The runtime's main interface: opens a bundle, runs one denoising call, or draws an image."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from l2p_runtime.arguments import flag, function, text, whole_number
from l2p_runtime.arguments import path as checked_path
from l2p_runtime.bundle import Bundle, open_bundle
from l2p_runtime.coarse import Coarse
from l2p_runtime.denoiser import Denoiser, encode_caption, make_workspace, predict
from l2p_runtime.drawing import draw, plan_stages
from l2p_runtime.errors import UsageError
from l2p_runtime.guidance import Convention
from l2p_runtime.loaded import LoadedNetworks
from l2p_runtime.memory import budget_bytes, return_freed_memory, return_large_buffers_at_once
from l2p_runtime.networks import OpenedPlan, open_plan
from l2p_runtime.policies import TimeDependent, axis_frequencies, require_policy
from l2p_runtime.prompt_encoder import PromptEncoder
from l2p_runtime.requests import (
    PixelDType,
    Rng,
    check_embeds,
    check_image,
    check_size,
    check_time,
    image_request,
)
from l2p_runtime.room import fit_call, require_encoder, require_largest
from l2p_runtime.sampler import Preview, Progress, Watch, preview_bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from l2p_runtime.contract import Grid
    from l2p_runtime.policies import Policy

_DEVICE_MAX = 2**31 - 1


class Pipeline:
    """A bundle's networks on one device. Made by `Pipeline.open`; use it in a `with` block.

    All networks stay loaded if they fit. Otherwise each is loaded when it is needed and closed after use, so that the
    memory must hold the largest network and not their sum.

    A pipeline serves one call at a time; open several for several threads.
    """

    def __init__(
        self,
        opened: OpenedPlan,
        memory_budget_bytes: int | None,
        *,
        owns_device: bool = False,
    ) -> None:
        self._networks = LoadedNetworks(opened, memory_budget_bytes)
        self._denoiser = Denoiser(opened.manifest.model, opened.backend.device, self._networks.use)
        self._prompts = PromptEncoder(self._networks)
        if memory_budget_bytes is not None:
            return_large_buffers_at_once()
        self._closed = False
        self._owns_device = owns_device

    @classmethod
    def open(
        cls,
        path: str | Path,
        backend: str = "auto",
        device: int = 0,
        plan: str | None = None,
        memory_budget: int | str | None = None,
        store: str | Path | None = None,
    ) -> Self:
        """Open a bundle and load its networks, if all of them fit.

        Args:
            path: folder that `l2p-export build` wrote.
            backend: a backend by name; `auto` takes the fastest that runs here and that the bundle has files for.
            device: index of the device, where there are several.
            plan: precision plan; the first of the bundle's that the backend runs when None.
            memory_budget: bytes for weights, buffers and activations together, as a number or as `6GiB`: networks
                are loaded one at a time if necessary, and the pixel head runs in stripes that fit. None for the free
                memory of the device.
            store: where the bundle's shared files are, if it was moved away from the store it was built with.

        Raises:
            ArtifactError: the bundle is damaged, or lacks the plan.
            HostError: the backend cannot run here, or the largest network exceeds the budget.
            UsageError: unknown backend, a budget that is no size, or an argument of another type.
        """
        folder, shared = checked_path("path", path), None if store is None else checked_path("store", store)
        text("backend", backend)
        index = whole_number("device", device, 0, _DEVICE_MAX)
        if plan is not None:
            text("plan", plan)
        budget = budget_bytes(memory_budget)
        opened = open_plan(open_bundle(folder, shared), backend, index, plan)
        try:
            pipeline = cls(opened, budget, owns_device=True)
            pipeline._networks.load_what_fits()
        except BaseException:
            opened.backend.device.close()
            raise
        return pipeline

    @classmethod
    def on_backend(cls, opened: OpenedPlan, memory_budget_bytes: int | None = None) -> Self:
        """Make a pipeline from a bundle and a backend that are open already; `close` leaves the device open.

        Raises:
            ArtifactError: the bundle lacks the plan's files for the backend.
            HostError: the largest network exceeds the budget.
            UsageError: a budget that is no size.
        """
        if not isinstance(opened, OpenedPlan):
            raise UsageError(f"opened is a {type(opened).__name__}, expected what `open_plan` returned")
        pipeline = cls(opened, budget_bytes(memory_budget_bytes))
        pipeline._networks.load_what_fits()
        return pipeline

    @classmethod
    def check_call(
        cls,
        opened: OpenedPlan,
        grid: tuple[int, int],
        caption_tokens: int,
        memory_budget_bytes: int | None = None,
        *,
        encodes: bool = False,
        prompts: int = 2,
    ) -> None:
        """Refuse a call that cannot be made, before anything is loaded.

        Args:
            opened: plan on its backend.
            grid: token rows and columns.
            caption_tokens: of the longest caption, padded.
            memory_budget_bytes: as in `open`.
            encodes: the text encoder runs too.
            prompts: 2 with guidance, 1 without.

        Raises:
            HostError: the call, the largest network or the text encoder exceeds the budget or the free memory.
            UsageError: engines were not built for this size.
        """
        room = LoadedNetworks(opened, memory_budget_bytes).room
        require_largest(room)
        if encodes:
            require_encoder(room)
        fit_call(room, 1, grid, caption_tokens, prompts)

    @property
    def bundle(self) -> Bundle:
        """The opened bundle."""
        return self._networks.opened.bundle

    @property
    def opened_plan(self) -> OpenedPlan:
        """The bundle's plan on its backend."""
        return self._networks.opened

    @property
    def plan(self) -> str:
        """Name of the precision plan that runs."""
        return self._networks.opened.plan

    def denoise(
        self,
        image: NDArray[np.float32],
        time: NDArray[np.float32] | float,
        prompt_embeds: NDArray[np.float32] | Sequence[NDArray[np.float32]],
        *,
        positions: str | Policy | TimeDependent | None = None,
        base_grid: Grid | None = None,
    ) -> NDArray[np.float32]:
        """Run one denoising call.

        Args:
            image: noisy pixels [B,3,H,W], float32, unit noise.
            time: t = 1 - sigma [B], 0 at pure noise.
            prompt_embeds: unpadded embeddings [B,L,C], or one [L,C] per image, of equal padded length.
            positions: position policy; the profile's when None. One that depends on time takes that of the first image.
            base_grid: token rows and columns of the trained grid; the bundle's when None.

        Returns:
            x0 - noise, float32 [B,3,H,W].

        Raises:
            UsageError: shapes, sizes or values that the model does not take.
            HostError: the call does not fit the memory.
        """
        denoiser = self._opened(base_grid)
        pixels = check_image(image)
        batch = pixels.shape[0]
        grid = check_size(denoiser.model, pixels.shape[2], pixels.shape[3])
        times = check_time(time, batch)
        captions = check_embeds(denoiser.model, prompt_embeds, batch)
        policy = self._policy(positions)
        stripes = self._networks.plan_call(batch, grid, denoiser.model.padded(len(captions[0])), 1)
        device = denoiser.device
        axes = axis_frequencies(denoiser.model.rotary, grid, policy, float(times[0]))
        with self._networks.giving_back():
            condition = encode_caption(denoiser, captions, *grid, axes)
            prediction = device.alloc(pixels.shape, "float32")
            work = make_workspace(denoiser, condition)
            predict(denoiser, device.upload(pixels), device.upload(times), [condition], stripes, [work], [prediction])
            device.synchronize()
            return device.download(prediction)

    def generate(
        self,
        prompt: str | None = None,
        *,
        height: int,
        width: int,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        guidance_convention: Convention = "l2p",
        shift: float | None = None,
        negative_prompt: str | None = None,
        prompt_embeds: NDArray[np.float32] | None = None,
        negative_embeds: NDArray[np.float32] | None = None,
        truncate_prompt: bool = False,
        positions: str | Policy | TimeDependent | None = None,
        base_grid: Grid | None = None,
        coarse: Coarse | None = None,
        image_index: int = 0,
        rng: Rng = "philox",
        dtype: PixelDType = "uint8",
        progress: Progress = lambda done, steps: None,
        preview: Preview | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> NDArray[Any]:
        """Draw one image.

        Args:
            prompt: text; needs a bundle with a text encoder.
            height: pixels, a multiple of the patch.
            width: pixels, a multiple of the patch.
            seed: 0 to 2^64 - 1; the same noise on every machine, backend and thread count.
            steps: denoising steps; the bundle's default when None.
            guidance: 1 is none; v = v_neg + guidance (v_pos - v_neg). With neither a text encoder nor negative
                embeddings, only 1 is possible.
            guidance_convention: `diffusers` for a guidance of its Z-Image pipeline, v_pos + guidance (v_pos - v_neg),
                where 0 is none: 1 is added to it.
            shift: of the noise schedule.
            negative_prompt: text; needs a bundle with a text encoder, which reads an empty one when None.
            prompt_embeds: unpadded prompt embeddings [L,C], instead of `prompt`.
            negative_embeds: unpadded embeddings [L,C] of what to steer away from.
            truncate_prompt: cut prompts that are too long, instead of refusing them.
            positions: position policy; the profile's when None.
            base_grid: token rows and columns of the trained grid; the bundle's when None.
            coarse: draw a smaller image first and finish it at this size; None to draw at this size from the start.
            image_index: which image of the seed: another index, other noise; only with `philox`.
            rng: `philox`, or `torch-cpu` for the noise of `torch.randn` on the CPU.
            dtype: full-range `uint8` or `uint16`, or `float16` in [0,1].
            progress: called after each step.
            preview: receives every step's estimate of the finished image, of `dtype`; takes buffers of its own. Of a
                coarse image it receives only the last, enlarged.
            cancelled: called between networks and stripes; true stops the drawing.

        Returns:
            [H,W,3] of `dtype`.

        Raises:
            UsageError: a value out of range or of another type, a size that does not divide, a prompt without a text
                encoder, or a prompt that is too long.
            HostError: the image or the text encoder does not fit the memory, or `tokenizers` is not installed.
            CancelledError: `cancelled` said so.
        """
        denoiser = self._opened(base_grid)
        if coarse is not None and not isinstance(coarse, Coarse):
            raise UsageError(f"coarse is a {type(coarse).__name__}, expected Coarse(height=..., width=...)")
        request = image_request(
            self.bundle.manifest,
            prompt=prompt,
            negative_prompt=negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_embeds=negative_embeds,
            height=height,
            width=width,
            seed=seed,
            sampling={"steps": steps, "guidance": guidance, "shift": shift},
            fine_guidance=1.0 if coarse is None else coarse.guidance,
            rng=rng,
            dtype=dtype,
            image_index=image_index,
            guidance_convention=guidance_convention,
        )
        truncate = flag("truncate_prompt", truncate_prompt)
        function("progress", progress)
        function("cancelled", cancelled)
        if preview is not None:
            function("preview", preview)
        policy = self._policy(positions)
        counts = [self._prompts.count_tokens(caption, truncate) for caption in request.captions]
        tokens = denoiser.model.padded(max(counts))
        shown_bytes = preview_bytes(*request.size_px) if preview is not None else 0
        stages = plan_stages(self._networks, request, coarse, tokens, shown_bytes)
        captions = self._prompts.embed(request.captions, truncate)
        watch = Watch(progress, preview, cancelled, dtype, sum(stage.steps for stage in stages))
        with self._networks.giving_back():
            return draw(denoiser, request, captions, stages, policy, watch)

    def encode(self, prompts: Sequence[str], *, truncate_prompt: bool = False) -> list[NDArray[np.float32]]:
        """Embeddings [L,C] of prompts, for `prompt_embeds` and `negative_embeds`; the text encoder is loaded once.

        Raises:
            UsageError: the bundle has no text encoder, or a prompt is too long.
            HostError: the text encoder does not fit the memory, or `tokenizers` is not installed.
        """
        (embeds,) = self.encode_each([prompts], truncate_prompt=truncate_prompt)
        return embeds

    def encode_each(
        self, groups: Iterable[Sequence[str]], *, truncate_prompt: bool = False
    ) -> list[list[NDArray[np.float32]]]:
        """Embeddings [L,C] of the prompts of each group; the text encoder is loaded once for all groups.

        Prompts of one group go through the encoder together, so that a group has the same bits whatever the other
        groups are. `generate` encodes a prompt and its negative prompt as one group.

        Raises:
            UsageError: the bundle has no text encoder, or a prompt is too long.
            HostError: the text encoder does not fit the memory, or `tokenizers` is not installed.
        """
        self._opened()
        return self._prompts.embed_each(groups, flag("truncate_prompt", truncate_prompt))

    @contextmanager
    def reserving(self, bytes_: int) -> Iterator[Self]:
        """Keep a part of the memory budget for the caller, such as for a finished image, while the block lasts."""
        with self._networks.reserving(bytes_):
            yield self

    def require_room(self, grid: tuple[int, int], caption_tokens: int, prompts: int) -> None:
        """Refuse an image that does not fit beside, or in turns with, the networks of this pipeline.

        Args:
            grid: token rows and columns.
            caption_tokens: of the longest caption, padded.
            prompts: 2 with guidance, 1 without.

        Raises:
            HostError: it exceeds the budget or the free memory.
            UsageError: engines were not built for this size, or the pipeline is closed.
        """
        self._opened()
        self._networks.plan_call(1, grid, caption_tokens, prompts)

    @property
    def keeps_networks(self) -> bool:
        """Whether all networks are in memory; otherwise each is loaded when its turn comes."""
        return bool(self._networks.engines)

    def close(self) -> None:
        """Give all memory back to the system; further calls are refused. Images that were returned stay."""
        self._networks.release()
        if self._owns_device and not self._closed:
            self._networks.opened.backend.device.close()
        self._closed = True
        self._prompts.close()
        return_freed_memory()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _opened(self, base_grid: Grid | None = None) -> Denoiser:
        """The denoiser, with the trained grid that counts."""
        if self._closed:
            raise UsageError("the pipeline is closed", hint="open it again")
        return replace(self._denoiser, model=self.bundle.manifest.model_on(base_grid))

    def _policy(self, positions: str | Policy | TimeDependent | None) -> str | Policy | TimeDependent:
        if positions is None:
            return self.bundle.manifest.profiles[0].positions
        return require_policy(positions)
