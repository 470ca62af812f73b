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
from l2p_runtime.contract import NETWORKS, TEXT_ENCODER
from l2p_runtime.denoiser import Denoiser, encode_caption, make_workspace, predict
from l2p_runtime.errors import HostError, InternalError, L2PError, UsageError
from l2p_runtime.guidance import Convention
from l2p_runtime.memory import (
    budget_bytes,
    call_memory,
    fused_call_memory,
    return_freed_memory,
    return_large_buffers_at_once,
)
from l2p_runtime.networks import (
    OpenedPlan,
    engine_record,
    head_rows_max,
    held_bytes,
    load_network,
    open_plan,
    require_sizes,
)
from l2p_runtime.positions import named_policy
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
from l2p_runtime.sampler import Preview, Progress, preview_bytes, sample
from l2p_runtime.text import Tokenizer, bundle_tokenizer, encode_prompts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from l2p_runtime.positions import Policy
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

    @property
    def bundle(self) -> Bundle:
        """The opened bundle."""
        return self._opened_plan.bundle

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
        positions: str | Policy | None = None,
    ) -> NDArray[np.float32]:
        """Run one denoising call.

        Args:
            image: noisy pixels [B,3,H,W], float32, unit noise.
            time: t = 1 - sigma [B], 0 at pure noise.
            prompt_embeds: unpadded embeddings [B,L,C], or one [L,C] per image, of equal padded length.
            positions: position policy; the profile's when None.

        Returns:
            x0 - noise, float32 [B,3,H,W].

        Raises:
            UsageError: shapes, sizes or values that the model does not take.
            HostError: the call does not fit the memory.
        """
        denoiser = self._opened()
        pixels = check_image(image)
        batch = pixels.shape[0]
        grid = check_size(denoiser.model, pixels.shape[2], pixels.shape[3])
        times = check_time(time, batch)
        captions = check_embeds(denoiser.model, prompt_embeds, batch)
        policy = self._policy(positions)
        stripes = self._plan_call(batch, grid, denoiser.model.padded(len(captions[0])))
        device = denoiser.device
        condition = encode_caption(denoiser, captions, *grid, policy)
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
        positions: str | Policy | None = None,
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
            image_index: which image of the seed: another index, other noise; only with `philox`.
            rng: `philox`, or `torch-cpu` for the noise of `torch.randn` on the CPU.
            dtype: full-range `uint8` or `uint16`, or `float16` in [0,1].
            progress: called after each step.
            preview: receives every step's estimate of the finished image, of `dtype`; takes buffers of its own.
            cancelled: called between networks and stripes; true stops the drawing.

        Returns:
            [H,W,3] of `dtype`.

        Raises:
            UsageError: a value out of range or of another type, a size that does not divide, a prompt without a text
                encoder, or a prompt that is too long.
            HostError: the image or the text encoder does not fit the memory, or `tokenizers` is not installed.
            CancelledError: `cancelled` said so.
        """
        denoiser = self._opened()
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
        stripes = self._plan_call(1, grid, tokens, shown_bytes)
        captions = self._embed(request.captions, truncate)
        image = self._noise(request, rng)
        conditions = [encode_caption(denoiser, [caption], *grid, policy) for caption in captions]
        return sample(
            denoiser,
            image,
            conditions,
            stripes,
            sampling,
            dtype,
            progress=progress,
            preview=preview,
            cancelled=cancelled,
        )

    def encode(self, prompts: Sequence[str], *, truncate_prompt: bool = False) -> list[NDArray[np.float32]]:
        """Embeddings [L,C] of prompts, for `prompt_embeds` and `negative_embeds`; the text encoder is loaded once.

        Raises:
            UsageError: the bundle has no text encoder, or a prompt is too long.
            HostError: the text encoder does not fit the memory, or `tokenizers` is not installed.
        """
        self._opened()
        truncate = flag("truncate_prompt", truncate_prompt)
        if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Iterable):
            raise UsageError(f"prompts are a {type(prompts).__name__}, expected a sequence of texts")
        # An iterator has its texts only once.
        texts = [text("a prompt", prompt) for prompt in prompts]
        for prompt in texts:
            self._count(prompt, truncate)
        return self._embed(texts, truncate)

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

    def _opened(self) -> Denoiser:
        if self._closed:
            raise UsageError("the pipeline is closed", hint="open it again")
        return self._denoiser

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
            self._encoded = dict(zip(((t, truncate) for t in texts), self._run_encoder(texts, truncate), strict=True))
        return [self._encoded[caption, truncate] if isinstance(caption, str) else caption for caption in captions]

    def _run_encoder(self, texts: Sequence[str], truncate: bool) -> list[NDArray[np.float32]]:
        """Load the text encoder, run it and close it; networks are released first if it does not fit beside them."""
        text, tokenizer = self.bundle.manifest.text, self._tokenizer
        if text is None or tokenizer is None:
            raise InternalError("texts reached the encoder without a tokenizer")
        weights = self._text_bytes
        limit = self._limit_bytes()
        if weights > limit:
            raise HostError(
                f"the text encoder's weights take {weights:,} bytes, {max(limit, 0):,} bytes are there",
                hint="raise the memory budget, or pass embeddings made elsewhere",
            )
        makes_room = self._keeps_networks and weights > self._free_bytes()
        if makes_room:
            self._release_networks()
        encoder = self._load(TEXT_ENCODER)
        try:
            embeds = encode_prompts(encoder, tokenizer, texts, self._opened_plan.backend.device, truncate=truncate)
        finally:
            encoder.close()
        if makes_room:
            self._keep_networks()
        return embeds

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
        limit, sizes = self._limit_bytes(), self._held_bytes
        largest = max(sizes, key=lambda network: sizes[network])
        if sizes[largest] > limit:
            library = self._opened_plan.backend.library_bytes if self._memory_budget_bytes is not None else 0
            raise HostError(
                f"the weights of `{largest}` in plan `{self.plan}` take {sizes[largest] + library:,} bytes with the "
                f"library that runs them, {limit + library:,} bytes are there",
                hint="raise the memory budget, or use a plan of lower precision",
            )
        if sum(sizes.values()) <= limit:
            self._keep_networks()

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

    def _plan_call(self, batch: int, grid: tuple[int, int], tokens: int, further_bytes: int = 0) -> tuple[Stripe, ...]:
        """Cut the head for a call. If all networks and the call do not fit together, the networks take turns.

        Args:
            batch: images.
            grid: token rows and columns.
            tokens: of the caption, padded.
            further_bytes: buffers beside those of a denoising call.

        Raises:
            HostError: the call does not fit even then.
            UsageError: engines were not built for this size.
        """
        model, sizes = self._denoiser.model, self._held_bytes
        opened = self._opened_plan
        fused = opened.runs_engines and opened.base != "fp32"
        need = (fused_call_memory if fused else call_memory)(model, batch, *grid, tokens)
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

    def _policy(self, positions: str | Policy | None) -> str | Policy:
        if positions is None:
            return self.bundle.manifest.profiles[0].positions
        return named_policy(positions)

    def _noise(self, request: ImageRequest, rng: Rng) -> Array:
        device, (height, width) = self._denoiser.device, request.size_px
        if rng == "torch-cpu":
            from l2p_runtime.noise import torch_cpu_noise

            return device.upload(torch_cpu_noise(request.seed, 3 * height * width).reshape(1, 3, height, width))
        image = device.alloc((1, 3, height, width), "float32")
        device.launch("noise", image[0], request.seed, request.image_index)
        return image
