"""The runtime's front door: open a bundle, run one denoising call, or draw an image."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeAlias

from l2p_runtime.backends import Array, Backend, Engine, open_backend
from l2p_runtime.bundle import Bundle, open_bundle
from l2p_runtime.contract import NETWORKS
from l2p_runtime.denoiser import Condition, Denoiser, encode_caption, make_workspace, predict
from l2p_runtime.errors import CancelledError, HostError, InternalError, L2PError, UsageError
from l2p_runtime.memory import parse_bytes
from l2p_runtime.requests import (
    PixelDType,
    Rng,
    check_embeds,
    check_image,
    check_size,
    check_time,
    image_request,
    plan_call,
)
from l2p_runtime.schedule import model_time, sigmas
from l2p_runtime.text import Tokenizer, bundle_tokenizer, encode_prompts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from l2p_runtime.positions import Policy

Progress: TypeAlias = Callable[[int, int], None]
"""Told (steps done, steps in all) after each step."""


class Pipeline:
    """A bundle's networks, loaded on one device. Made by `Pipeline.open`; use it in a `with` block.

    A pipeline serves one call at a time; open several for several threads.
    """

    def __init__(
        self, bundle: Bundle, backend: Backend, denoiser: Denoiser, plan: str, memory_budget_bytes: int | None
    ) -> None:
        self.bundle = bundle
        self.plan = plan
        self._backend = backend
        self._denoiser = denoiser
        self._tokenizer: Tokenizer | None = None
        # Of the last call alone: frames of one prompt load the text encoder once.
        self._encoded: dict[tuple[str, bool], NDArray[np.float32]] = {}
        self._memory_budget_bytes = memory_budget_bytes
        self._closed = False

    @classmethod
    def open(
        cls,
        path: str | Path,
        backend: str = "auto",
        device: int = 0,
        plan: str | None = None,
        memory_budget: int | str | None = None,
    ) -> Self:
        """Open a bundle and load its networks.

        Args:
            path: folder that `l2p-export build` wrote.
            backend: `auto`, or a backend by name.
            device: index of the device, where there are several.
            plan: precision plan; the bundle's first when None.
            memory_budget: bytes for weights, buffers and activations together, as a number or as `6GiB`; the pixel
                head runs in stripes that fit. Without it, what the device has free.

        Raises:
            ArtifactError: the bundle is damaged, or lacks the plan.
            HostError: the backend cannot run here, or the weights exceed the budget.
            UsageError: unknown backend, or a budget that is no size.
        """
        budget = parse_bytes(str(memory_budget)) if memory_budget is not None else None
        bundle = open_bundle(Path(path))
        name = bundle.manifest.plan(plan).name
        opened = open_backend(backend, device)
        weights = _weight_bytes(bundle, name)
        limit = opened.device.available_bytes() if budget is None else budget
        if weights > limit:
            raise HostError(
                f"the weights of plan `{name}` take {weights:,} bytes, {limit:,} bytes are there",
                hint="raise the memory budget, or use a plan of lower precision",
            )
        engines = _load_networks(opened, bundle, name)
        return cls(bundle, opened, Denoiser(bundle.manifest.model, opened.device, engines), name, budget)

    def denoise(
        self,
        image: NDArray[np.float32],
        time: NDArray[np.float32] | float,
        prompt_embeds: NDArray[np.float32] | Sequence[NDArray[np.float32]],
        *,
        positions: str | Policy | None = None,
    ) -> NDArray[np.float32]:
        """One denoising call.

        Args:
            image: noisy pixels [B,3,H,W], float32, unit noise.
            time: t = 1 - sigma [B], 0 at pure noise.
            prompt_embeds: unpadded embeddings [B,L,C], or one [L,C] an image, of equal padded length.
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
        stripes = plan_call(denoiser.model, batch, grid, denoiser.model.padded(len(captions[0])), self._free_bytes())
        device = denoiser.device
        condition = encode_caption(denoiser, captions, *grid, self._policy(positions))
        prediction = device.alloc(pixels.shape, "float32")
        workspace = make_workspace(denoiser, condition)
        predict(denoiser, device.upload(pixels), device.upload(times), condition, stripes, workspace, prediction)
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
            shift: of the noise schedule.
            negative_prompt: text; needs a bundle with a text encoder, which reads an empty one when None.
            prompt_embeds: unpadded prompt embeddings [L,C], instead of `prompt`.
            negative_embeds: unpadded embeddings [L,C] of what to steer away from.
            truncate_prompt: cut prompts that are too long, instead of refusing them.
            positions: position policy; the profile's when None.
            image_index: which image of the seed: another index, other noise.
            rng: `philox`, or `torch-cpu` for the noise of `torch.randn` on the CPU.
            dtype: full-range `uint8` or `uint16`, or `float16` in [0,1].
            progress: told after each step.
            cancelled: asked between networks and stripes.

        Returns:
            [H,W,3] of `dtype`.

        Raises:
            UsageError: a value out of range, a size that does not divide, a prompt without a text encoder, or a
                prompt that is too long.
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
        )
        grid, sampling = request.grid, request.sampling
        tokens = max(denoiser.model.padded(self._count(caption, truncate_prompt)) for caption in request.captions)
        stripes = plan_call(denoiser.model, 1, grid, tokens, self._free_bytes())
        captions = self._embed(request.captions, truncate_prompt)
        denoiser = self._opened()
        device = denoiser.device

        image = self._noise(height, width, seed, image_index, rng)
        conditions = [encode_caption(denoiser, [caption], *grid, self._policy(positions)) for caption in captions]
        workspaces = _workspaces(denoiser, conditions)
        predictions = [device.alloc((1, 3, height, width), "float32") for _ in captions]

        def check() -> None:
            if cancelled():
                raise CancelledError("drawing was cancelled")

        levels = sigmas(sampling.steps, sampling.shift)
        for index, (sigma, following) in enumerate(itertools.pairwise(levels)):
            time = device.upload(_float32([model_time(sigma)]))
            for condition, workspace, prediction in zip(conditions, workspaces, predictions, strict=True):
                predict(denoiser, image, time, condition, stripes, workspace, prediction, check)
            negative = predictions[1] if len(predictions) > 1 else None
            device.launch("euler", image, predictions[0], negative, sampling.guidance, following - sigma)
            progress(index + 1, sampling.steps)
        out = device.alloc((height, width, 3), dtype)
        device.launch("pixels", out, image[0])
        device.synchronize()
        return device.download(out)

    def encode(self, prompts: Sequence[str], *, truncate_prompt: bool = False) -> list[NDArray[np.float32]]:
        """Embeddings [L,C] of prompts, for `prompt_embeds` and `negative_embeds`; the text encoder is loaded once.

        Raises:
            UsageError: the bundle has no text encoder, or a prompt is too long.
            HostError: the text encoder does not fit the memory, or `tokenizers` is not installed.
        """
        self._opened()
        if isinstance(prompts, str):
            raise UsageError("prompts are one text, expected a sequence of texts")
        for prompt in prompts:
            self._count(prompt, truncate_prompt)
        return self._embed(prompts, truncate_prompt)

    def close(self) -> None:
        """Give all memory back; further calls are refused."""
        if not self._closed:
            for engine in self._denoiser.engines.values():
                engine.close()
        self._closed = True
        self._encoded, self._tokenizer = {}, None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _opened(self) -> Denoiser:
        if self._closed or not self._denoiser.engines:
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
        """Put embeddings where there is text: all texts are encoded, then the encoder is released."""
        texts = list(dict.fromkeys(caption for caption in captions if isinstance(caption, str)))
        if texts and any((text, truncate) not in self._encoded for text in texts):
            self._encoded = dict(zip(((t, truncate) for t in texts), self._run_encoder(texts, truncate), strict=True))
        return [self._encoded[caption, truncate] if isinstance(caption, str) else caption for caption in captions]

    def _run_encoder(self, texts: Sequence[str], truncate: bool) -> list[NDArray[np.float32]]:
        """Load the text encoder, run it and close it; where it does not fit beside the networks, they make room."""
        text, tokenizer = self.bundle.manifest.text, self._tokenizer
        if text is None or tokenizer is None:
            raise InternalError("texts reached the encoder without a tokenizer")
        record, denoiser, free = text.graph(self.plan), self._denoiser, self._free_bytes()
        weights = next(file.size_bytes for file in self.bundle.manifest.files if file.path == record.weights)
        held = sum(engine.memory_bytes() for engine in denoiser.engines.values())
        if weights > free + held:
            raise HostError(
                f"the text encoder's weights take {weights:,} bytes, {max(free + held, 0):,} bytes are there",
                hint="raise the memory budget, or pass embeddings made elsewhere",
            )
        makes_room = weights > free
        if makes_room:
            # Empty until the networks are back: a pipeline whose networks cannot be loaded again is closed.
            self._denoiser = replace(denoiser, engines={})
            for engine in denoiser.engines.values():
                engine.close()
        try:
            graph, file = self.bundle.path(record.graph), self.bundle.path(record.weights)
            encoder = self._backend.load(graph, file, text.network)
            try:
                return encode_prompts(encoder, tokenizer, texts, denoiser.device, truncate=truncate)
            finally:
                encoder.close()
        finally:
            if makes_room:
                self._denoiser = replace(denoiser, engines=_load_networks(self._backend, self.bundle, self.plan))

    def _free_bytes(self) -> int:
        """What a call may take: the device's free memory, or what the budget leaves beside the weights."""
        if self._memory_budget_bytes is None:
            return self._denoiser.device.available_bytes()
        return self._memory_budget_bytes - sum(engine.memory_bytes() for engine in self._denoiser.engines.values())

    def _policy(self, positions: str | Policy | None) -> str | Policy:
        return self.bundle.manifest.profiles[0].positions if positions is None else positions

    def _noise(self, height: int, width: int, seed: int, image_index: int, rng: Rng) -> Array:
        device = self._denoiser.device
        if rng == "torch-cpu":
            from l2p_runtime.noise import torch_cpu_noise

            return device.upload(torch_cpu_noise(seed, 3 * height * width).reshape(1, 3, height, width))
        image = device.alloc((1, 3, height, width), "float32")
        device.launch("noise", image[0], seed, image_index)
        return image


def _load_networks(backend: Backend, bundle: Bundle, plan: str) -> dict[str, Engine]:
    """Load the networks of a denoising call, all or none."""
    engines: dict[str, Engine] = {}
    try:
        for network in NETWORKS:
            engines[network] = _load(backend, bundle, network, plan)
    except L2PError:
        for engine in engines.values():
            engine.close()
        raise
    return engines


def _load(backend: Backend, bundle: Bundle, network: str, plan: str) -> Engine:
    record = bundle.manifest.graph(network, plan)
    return backend.load(bundle.path(record.graph), bundle.path(record.weights), bundle.manifest.network(network))


def _weight_bytes(bundle: Bundle, plan: str) -> int:
    sizes = {record.path: record.size_bytes for record in bundle.manifest.files}
    return sum(sizes[record.weights] for record in bundle.manifest.graphs if record.plan == plan)


def _workspaces(denoiser: Denoiser, conditions: Sequence[Condition]) -> list[Any]:
    """One workspace a caption length: prompts of equal length share theirs."""
    by_length: dict[int, Any] = {}
    for condition in conditions:
        length = condition.rope_cos.shape[0]
        if length not in by_length:
            by_length[length] = make_workspace(denoiser, condition)
    return [by_length[condition.rope_cos.shape[0]] for condition in conditions]


def _float32(values: Sequence[float]) -> NDArray[np.float32]:
    import numpy as np

    return np.asarray(values, np.float32)
