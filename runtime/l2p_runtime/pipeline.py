"""The runtime's main interface: opens a bundle, runs one denoising call, or draws an image."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from l2p_runtime.arguments import flag, function, text, whole_number
from l2p_runtime.arguments import path as checked_path
from l2p_runtime.backends import Array, Engine
from l2p_runtime.bundle import Bundle, open_bundle
from l2p_runtime.coarse import Coarse, check_coarse, mix_enlarged
from l2p_runtime.contract import NETWORKS, TEXT_ENCODER
from l2p_runtime.denoiser import Denoiser, encode_caption, make_workspace, predict, turned
from l2p_runtime.errors import HostError, InternalError, L2PError, UsageError
from l2p_runtime.guidance import Convention, prompts_of
from l2p_runtime.memory import (
    budget_bytes,
    return_freed_memory,
    return_large_buffers_at_once,
)
from l2p_runtime.networks import (
    OpenedPlan,
    engine_record,
    forecast_call,
    head_rows_max,
    held_bytes,
    load_network,
    open_plan,
    require_sizes,
)
from l2p_runtime.policies import TimeDependent, axis_frequencies, require_policy
from l2p_runtime.requests import (
    ImageRequest,
    PixelDType,
    Rng,
    check_embeds,
    check_image,
    check_size,
    check_time,
    image_request,
    least_memory,
    plan_call,
)
from l2p_runtime.sampler import Preview, Progress, Watch, preview_bytes, sample, to_pixels
from l2p_runtime.schedule import model_time, sigmas
from l2p_runtime.text import Tokenizer, bundle_tokenizer, encode_prompts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from l2p_runtime.contract import Grid
    from l2p_runtime.policies import Frequencies, Policy
    from l2p_runtime.stripes import Stripe

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
        self._opened_plan = opened
        self._denoiser = Denoiser(opened.manifest.model, opened.backend.device, self._use)
        self._held_bytes = held_bytes(opened)
        self._text_bytes = self._held_bytes.pop(TEXT_ENCODER, 0)
        self._engines: dict[str, Engine] = {}
        self._keeps_networks = False
        self._tokenizer: Tokenizer | None = None
        # Of only the last call: frames of one prompt load the text encoder once.
        self._encoded: dict[tuple[str, bool], NDArray[np.float32]] = {}
        self._memory_budget_bytes = memory_budget_bytes
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
            pipeline._load_what_fits()
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
        pipeline._load_what_fits()
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
        pipeline = cls(opened, memory_budget_bytes)
        pipeline._require_largest()
        if encodes:
            pipeline._require_encoder()
        pipeline._plan_call(1, grid, caption_tokens, prompts)

    @property
    def bundle(self) -> Bundle:
        """The opened bundle."""
        return self._opened_plan.bundle

    @property
    def opened_plan(self) -> OpenedPlan:
        """The bundle's plan on its backend."""
        return self._opened_plan

    @property
    def plan(self) -> str:
        """Name of the precision plan that runs."""
        return self._opened_plan.plan

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
        stripes = self._plan_call(batch, grid, denoiser.model.padded(len(captions[0])), 1)
        device = denoiser.device
        axes = axis_frequencies(denoiser.model.rotary, grid, policy, float(times[0]))
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
        policy, grid, sampling = self._policy(positions), request.grid, request.sampling
        tokens = max(denoiser.model.padded(self._count(caption, truncate)) for caption in request.captions)
        shown_bytes = preview_bytes(*request.size_px) if preview is not None else 0
        coarse_grid: tuple[int, int] = grid
        coarse_stripes: tuple[Stripe, ...] = ()
        if coarse is not None:
            coarse_grid = check_size(denoiser.model, coarse.height, coarse.width)
            check_coarse(coarse, *request.size_px)
            coarse_stripes = self._plan_call(1, coarse_grid, tokens, prompts_of(sampling.guidance))
        # The coarse image is held until it is enlarged.
        coarse_bytes = 0 if coarse is None else 4 * 3 * coarse.height * coarse.width
        prompts = prompts_of(sampling.guidance if coarse is None else coarse.guidance)
        stripes = self._plan_call(1, grid, tokens, prompts, shown_bytes + coarse_bytes)
        captions = self._embed(request.captions, truncate)
        steps_wanted = sampling.steps + (coarse.steps if coarse else 0)
        watch = Watch(progress, preview, cancelled, dtype, steps_wanted)
        schedule = sigmas(sampling.steps, sampling.shift)
        if coarse is None:
            image = self._noise(request, request.size_px, rng)
            self._sample(denoiser, image, captions, grid, stripes, schedule, sampling.guidance, policy, watch)
            return to_pixels(denoiser, image, dtype)
        small = self._noise(request, (coarse.height, coarse.width), rng)
        unseen = replace(watch, preview=None)
        self._sample(
            denoiser, small, captions, coarse_grid, coarse_stripes, schedule, sampling.guidance, policy, unseen
        )
        image = self._noise(request, request.size_px, rng)
        if preview is not None:
            shown = denoiser.device.alloc(image.shape, "float32")
            denoiser.device.copy(shown, image)
            mix_enlarged(denoiser.device, shown, small, 0.0)
            preview(sampling.steps, steps_wanted, to_pixels(denoiser, shown, dtype))
        mix_enlarged(denoiser.device, image, small, coarse.renoise)
        rest = replace(watch, done=sampling.steps)
        self._sample(denoiser, image, captions, grid, stripes, coarse.sigmas, coarse.guidance, policy, rest)
        return to_pixels(denoiser, image, dtype)

    def encode(self, prompts: Sequence[str], *, truncate_prompt: bool = False) -> list[NDArray[np.float32]]:
        """Embeddings [L,C] of prompts, for `prompt_embeds` and `negative_embeds`; the text encoder is loaded once.

        Raises:
            UsageError: the bundle has no text encoder, or a prompt is too long.
            HostError: the text encoder does not fit the memory, or `tokenizers` is not installed.
        """
        self._opened()
        truncate = flag("truncate_prompt", truncate_prompt)
        return self._embed(self._checked_texts(prompts, truncate), truncate)

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
        truncate = flag("truncate_prompt", truncate_prompt)
        checked = [self._checked_texts(group, truncate) for group in groups]
        return self._run_encoder(checked, truncate) if any(checked) else [[] for _ in checked]

    @contextmanager
    def reserving(self, bytes_: int) -> Iterator[Self]:
        """Keep a part of the memory budget for the caller, such as for a finished image, while the block lasts."""
        whole = self._opened_plan
        backend = replace(whole.backend, library_bytes=whole.backend.library_bytes + bytes_)
        self._opened_plan = replace(whole, backend=backend)
        try:
            yield self
        finally:
            self._opened_plan = whole

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
        self._plan_call(1, grid, caption_tokens, prompts)

    @property
    def keeps_networks(self) -> bool:
        """Whether all networks are in memory; otherwise each is loaded when its turn comes."""
        return self._keeps_networks

    def close(self) -> None:
        """Give all memory back to the system; further calls are refused. Images that were returned stay."""
        self._release_networks()
        if self._owns_device and not self._closed:
            self._opened_plan.backend.device.close()
        self._closed = True
        self._encoded, self._tokenizer = {}, None
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

    def _count(self, caption: NDArray[np.float32] | str, truncate: bool) -> int:
        """Tokens of a caption, unpadded; refuses a text that is too long before anything is loaded for it."""
        if not isinstance(caption, str):
            return len(caption)
        if self._tokenizer is None:
            self._tokenizer = bundle_tokenizer(self.bundle)
        return len(self._tokenizer.tokens(caption, truncate=truncate))

    def _embed(self, captions: Sequence[NDArray[np.float32] | str], truncate: bool) -> list[NDArray[np.float32]]:
        """Replace texts by their embeddings: all texts are encoded, then the encoder is released."""
        texts = list(dict.fromkeys(caption for caption in captions if isinstance(caption, str)))
        if texts and any((text, truncate) not in self._encoded for text in texts):
            (embeds,) = self._run_encoder([texts], truncate)
            self._encoded = dict(zip(((t, truncate) for t in texts), embeds, strict=True))
        return [self._encoded[caption, truncate] if isinstance(caption, str) else caption for caption in captions]

    def _checked_texts(self, prompts: object, truncate: bool) -> list[str]:
        """Prompts that the text encoder takes."""
        if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Iterable):
            raise UsageError(f"prompts are a {type(prompts).__name__}, expected a sequence of texts")
        # An iterator has its texts only once.
        texts = [text("a prompt", prompt) for prompt in prompts]
        for prompt in texts:
            self._count(prompt, truncate)
        return texts

    def _run_encoder(self, groups: Sequence[Sequence[str]], truncate: bool) -> list[list[NDArray[np.float32]]]:
        """Load the text encoder, run it and close it; networks are released first if it does not fit beside them."""
        text, tokenizer = self.bundle.manifest.text, self._tokenizer
        if text is None or tokenizer is None:
            raise InternalError("texts reached the encoder without a tokenizer")
        self._require_encoder()
        makes_room = self._keeps_networks and self._text_bytes > self._free_bytes()
        if makes_room:
            self._release_networks()
        encoder = self._load(TEXT_ENCODER)
        try:
            device = self._opened_plan.backend.device
            embeds = [encode_prompts(encoder, tokenizer, texts, device, truncate=truncate) for texts in groups]
        finally:
            encoder.close()
        if makes_room:
            self._keep_networks()
        return embeds

    def _require_encoder(self) -> None:
        weights, limit = self._text_bytes, self._limit_bytes()
        if weights > limit:
            raise HostError(
                f"the text encoder's weights take {weights:,} bytes, {max(limit, 0):,} bytes are there",
                hint="raise the memory budget, or pass embeddings made elsewhere",
            )

    @contextmanager
    def _use(self, network: str) -> Iterator[Engine]:
        """A network's engine: one that is kept, or one that is loaded only for this use."""
        kept = self._engines.get(network)
        if kept is not None:
            yield kept
            return
        engine = self._load(network)
        try:
            yield engine
        finally:
            engine.close()
            return_freed_memory()

    def _load_what_fits(self) -> None:
        """Load all networks, or none if they must take turns.

        Raises:
            HostError: the largest of them exceeds the budget.
        """
        self._require_largest()
        if sum(self._held_bytes.values()) <= self._limit_bytes():
            self._keep_networks()

    def _require_largest(self) -> None:
        limit, sizes = self._limit_bytes(), self._held_bytes
        largest = max(sizes, key=lambda network: sizes[network])
        if sizes[largest] > limit:
            library = self._opened_plan.backend.library_bytes if self._memory_budget_bytes is not None else 0
            raise HostError(
                f"the weights of `{largest}` in plan `{self.plan}` take {sizes[largest] + library:,} bytes with the "
                f"library that runs them, {limit + library:,} bytes are there",
                hint="raise the memory budget, or use a plan of lower precision",
            )

    def _keep_networks(self) -> None:
        """Load all networks, to stay; all or none."""
        try:
            for network in NETWORKS:
                self._engines[network] = self._load(network)
        except L2PError:
            self._release_networks()
            raise
        self._keeps_networks = True

    def _release_networks(self) -> None:
        for engine in self._engines.values():
            engine.close()
        self._engines, self._keeps_networks = {}, False

    def _load(self, network: str) -> Engine:
        return load_network(self._opened_plan, network)

    def _plan_call(
        self, batch: int, grid: tuple[int, int], tokens: int, prompts: int, further_bytes: int = 0
    ) -> tuple[Stripe, ...]:
        """Cut the head for a call. If all networks and the call do not fit together, the networks take turns.

        Args:
            batch: images.
            grid: token rows and columns.
            tokens: of the caption, padded.
            prompts: 2 with guidance, 1 without.
            further_bytes: buffers beside those of a denoising call.

        Raises:
            HostError: the call does not fit even then.
            UsageError: engines were not built for this size.
        """
        model, sizes = self._denoiser.model, self._held_bytes
        opened = self._opened_plan
        need = forecast_call(opened, batch, grid, tokens, prompts)
        need = replace(need, buffers_bytes=need.buffers_bytes + further_bytes)
        head_rows = None
        if opened.runs_engines:
            head_rows = head_rows_max(engine_record(opened, "head"), batch, grid[1])
        stripes = None
        if self._keeps_networks:
            free = self._free_bytes()
            with suppress(HostError):
                stripes = plan_call(model, grid, need, free, free, head_rows)
        if stripes is None:
            limit, head = self._limit_bytes(), sizes["head"]
            others = max(size for network, size in sizes.items() if network != "head")
            try:
                stripes = plan_call(model, grid, need, limit - others, limit - head, head_rows)
            except HostError as error:
                if self._memory_budget_bytes is not None:
                    least = least_memory(model, grid, need, others, head) + opened.backend.library_bytes
                    error.hint = f"raise the memory budget to {least:,} bytes or more, or draw a smaller image"
                raise
            self._release_networks()
        require_sizes(opened, batch, grid, tokens, stripes)
        return stripes

    def _free_bytes(self) -> int:
        """Bytes that are free beside the loaded networks."""
        if self._memory_budget_bytes is None:
            return self._opened_plan.backend.device.available_bytes()
        return self._limit_bytes() - (sum(self._held_bytes.values()) if self._keeps_networks else 0)

    def _limit_bytes(self) -> int:
        """Bytes that would be free with no network loaded.

        The budget without what the library takes, or free memory plus that of loaded networks.
        """
        if self._memory_budget_bytes is not None:
            return self._memory_budget_bytes - self._opened_plan.backend.library_bytes
        held = sum(engine.memory_bytes() for engine in self._engines.values())
        return self._opened_plan.backend.device.available_bytes() + held

    def _sample(
        self,
        denoiser: Denoiser,
        image: Array,
        captions: Sequence[NDArray[np.float32]],
        grid: tuple[int, int],
        stripes: Sequence[Stripe],
        schedule: Sequence[float],
        guidance: float,
        policy: str | Policy | TimeDependent,
        watch: Watch,
    ) -> None:
        """Run one schedule at one size, with the negative caption only where there is guidance."""
        captions = captions[: prompts_of(guidance)]

        def axes(time: float) -> tuple[Frequencies, ...]:
            return axis_frequencies(denoiser.model.rotary, grid, policy, time)

        first = axes(model_time(schedule[0]))
        conditions = [encode_caption(denoiser, [caption], *grid, first) for caption in captions]
        later = (
            (lambda time: turned(denoiser, conditions, *grid, axes(time)))
            if isinstance(policy, TimeDependent)
            else None
        )
        sample(denoiser, image, conditions, stripes, schedule, guidance, watch, later)

    def _policy(self, positions: str | Policy | TimeDependent | None) -> str | Policy | TimeDependent:
        if positions is None:
            return self.bundle.manifest.profiles[0].positions
        return require_policy(positions)

    def _noise(self, request: ImageRequest, size_px: tuple[int, int], rng: Rng) -> Array:
        device, (height, width) = self._denoiser.device, size_px
        if rng == "torch-cpu":
            from l2p_runtime.noise import torch_cpu_noise

            return device.upload(torch_cpu_noise(request.seed, 3 * height * width).reshape(1, 3, height, width))
        image = device.alloc((1, 3, height, width), "float32")
        device.launch("noise", image[0], request.seed, request.image_index)
        return image
