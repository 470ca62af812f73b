"""Serves a bundle: checks a request against limits, draws, describes failures.

Independent of Triton: the models in `l2p_export/data/triton_models/` turn tensors into these calls and back.
"""

from __future__ import annotations

import base64
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias

from l2p_runtime import __version__
from l2p_runtime.bundle import Bundle, check_file, open_bundle
from l2p_runtime.errors import ArtifactError, CancelledError, HostError, L2PError, UsageError
from l2p_runtime.images.png import encode_png
from l2p_runtime.pipeline import Pipeline
from l2p_runtime.requests import ImageRequest, PixelDType, check_size, image_request

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ANY_BACKEND = "auto"
PREVIEW_DTYPE: PixelDType = "uint8"

Refusal: TypeAlias = Literal["INVALID_ARG", "UNAVAILABLE", "CANCELLED", "INTERNAL"]
"""Why a request has no image: it is wrong, this server cannot draw it, its caller cancelled, or a bug."""

PreviewCallback: TypeAlias = "Callable[[int, int, NDArray[np.uint8]], None]"
"""Receives (step, total steps, preview [h,w,3])."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of requests, checked before anything is allocated for one.

    Attributes:
        pixels: maximum pixels of one image, height times width.
        steps: maximum denoising steps of one image.
        prompt_bytes: maximum bytes of a prompt, and of a negative one, in UTF-8.
    """

    pixels: int
    steps: int
    prompt_bytes: int

    def __post_init__(self) -> None:
        for name in ("pixels", "steps", "prompt_bytes"):
            if getattr(self, name) < 1:
                raise UsageError(f"limit {name} is {getattr(self, name)}, expected 1 or more")


@dataclass(frozen=True, slots=True)
class ServiceSpec:
    """Settings of a service, stored as the string parameters of a model's configuration.

    Attributes:
        bundle: folder of the bundle, absolute or from the model's version folder.
        bundle_digest: digest of the bundle that it serves.
        backend: as `Pipeline.open` takes it.
        plan: precision plan; empty for the first that the backend runs.
        memory_budget: as `Pipeline.open` takes it; empty for what the device has free.
        dtype: of the images.
        preview_px: longest side of a preview.
        limits: of requests.
    """

    bundle: str
    bundle_digest: str
    backend: str
    plan: str
    memory_budget: str
    dtype: PixelDType
    preview_px: int
    limits: Limits

    def __post_init__(self) -> None:
        if self.preview_px < 1:
            raise UsageError(f"preview_px is {self.preview_px}, expected 1 or more")

    def to_parameters(self) -> dict[str, str]:
        """The parameters of a model's configuration."""
        limits = self.limits
        own = {name: str(getattr(self, name)) for name in _TEXTS}
        return own | {
            "preview_px": str(self.preview_px),
            "max_pixels": str(limits.pixels),
            "max_steps": str(limits.steps),
            "max_prompt_bytes": str(limits.prompt_bytes),
        }

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str]) -> Self:
        """Read the parameters that `to_parameters` made; further ones are ignored.

        Raises:
            UsageError: one is missing or no number.
        """
        missing = [name for name in (*_TEXTS, *_NUMBERS) if name not in parameters]
        if missing:
            raise UsageError(f"the configuration does not say {', '.join(missing)}", hint=_WRITE_AGAIN)
        numbers = {name: _number(name, parameters[name]) for name in _NUMBERS}
        dtype = next((known for known in _DTYPES if known == parameters["dtype"]), None)
        if dtype is None:
            raise UsageError(f"parameter dtype is {parameters['dtype'][:40]!r}, expected uint8 or float16")
        return cls(
            **{name: parameters[name] for name in _TEXTS if name != "dtype"},
            dtype=dtype,
            preview_px=numbers["preview_px"],
            limits=Limits(numbers["max_pixels"], numbers["max_steps"], numbers["max_prompt_bytes"]),
        )


@dataclass(frozen=True, slots=True)
class Drawn:
    """A finished image with its report.

    Attributes:
        pixels: the image, [H,W,3].
        report: sampling as used, bundle, plan, seconds of each part of the work.
        text: metadata for a file of the image.
    """

    pixels: NDArray[Any]
    report: Mapping[str, Any]
    text: Mapping[str, str]


class Service:
    """A bundle that is served by one process, one request at a time; made by `Service.open`."""

    def __init__(self, pipe: Pipeline, spec: ServiceSpec) -> None:
        self.spec = spec
        self._pipe = pipe
        self._seen: dict[Path, tuple[int, int, int]] = {}
        self._check_bundle(first=True)

    @classmethod
    def open(cls, spec: ServiceSpec, folder: Path, device: int = 0) -> Self:
        """Open the bundle and load its networks.

        Args:
            spec: what to serve.
            folder: where a relative bundle path starts.
            device: index of the GPU.

        Raises:
            ArtifactError: no bundle, another one than the configuration names, damaged, or without files for this
                machine.
            HostError: the backend cannot run here, or the networks do not fit.
            UsageError: no such backend or plan.
        """
        root = folder / spec.bundle
        opened = open_bundle(root)
        if opened.digest != spec.bundle_digest:
            raise ArtifactError(
                f"the bundle here is {opened.digest[:12]}, the configuration names {spec.bundle_digest[:12]}",
                hint=_WRITE_AGAIN,
            )
        pipe = Pipeline.open(
            root, spec.backend, device, plan=spec.plan or None, memory_budget=spec.memory_budget or None
        )
        return cls(pipe, spec)

    def draw(
        self,
        values: Mapping[str, Any],
        *,
        cancelled: Callable[[], bool] = lambda: False,
        shown: PreviewCallback | None = None,
    ) -> Drawn:
        """Draw one image.

        Args:
            values: `prompt` and `negative_prompt` as UTF-8 bytes, `prompt_embeds` and `negative_embeds` [L,C], and
                the numbers `height`, `width`, `seed`, `steps`, `guidance`; what is absent has the bundle's default.
            cancelled: called between networks and stripes; true stops the drawing.
            shown: receives a preview of every step.

        Raises:
            UsageError: a value that is wrong or over a limit; nothing was allocated for it.
            HostError: the image does not fit the memory.
            ArtifactError: the bundle is damaged.
            CancelledError: `cancelled` said so.
        """
        call = self._checked(values)
        request, pipe = self._request(call), self._pipe
        started = time.perf_counter()
        texts = [caption for caption in request.captions if isinstance(caption, str)]
        if texts:
            pipe.encode(texts)
        encoded = time.perf_counter()
        preview_px = self.spec.preview_px

        def preview(step: int, steps: int, pixels: NDArray[Any]) -> None:
            if shown is not None:
                shown(step, steps, small_preview(pixels, preview_px))

        pixels = pipe.generate(
            **call, dtype=self.spec.dtype, cancelled=cancelled, preview=preview if shown is not None else None
        )
        drawn = time.perf_counter()
        report = {
            "bundle": pipe.bundle.digest,
            "plan": pipe.plan,
            "trained": pipe.bundle.manifest.checkpoint.trained,
            "width": call["width"],
            "height": call["height"],
            "seed": call["seed"],
            "steps": request.sampling.steps,
            "guidance": request.sampling.guidance,
            "shift": request.sampling.shift,
            "positions": pipe.bundle.manifest.profiles[0].positions,
            "seconds": {"text": encoded - started, "draw": drawn - encoded},
        }
        return Drawn(pixels, report, picture_text(report, call["prompt"], call["negative_prompt"]))

    def probe(self) -> Drawn:
        """Find out whether an image can be drawn now: check the bundle's files, then draw an image of the minimum size.

        Raises:
            ArtifactError: a file is absent or changed, or the bundle is another one.
            HostError: there is no memory for it, or the device failed.
        """
        import numpy as np

        self._check_bundle()
        manifest = self._pipe.bundle.manifest
        profile = min(manifest.profiles, key=lambda profile: profile.height_px.min * profile.width_px.min)
        values: dict[str, Any] = {"height": profile.height_px.min, "width": profile.width_px.min}
        values |= {"steps": 1, "guidance": 1.0}
        if manifest.text is not None:
            values["prompt"] = b""
        else:
            values["prompt_embeds"] = np.ones((1, manifest.model.caption_width), np.float32)
        return self.draw(values)

    def describe(self, error: BaseException) -> tuple[Refusal, str]:
        """A failure as callers see it, without paths of this machine and without source lines."""
        if isinstance(error, UsageError):
            return "INVALID_ARG", self._told(error)
        if isinstance(error, CancelledError):
            return "CANCELLED", str(error)
        if isinstance(error, (HostError, ArtifactError)):
            return "UNAVAILABLE", self._told(error)
        if isinstance(error, MemoryError):
            return "UNAVAILABLE", "this server is out of memory"
        return "INTERNAL", "this server failed in a way that it does not know; its log says more"

    def close(self) -> None:
        """Free all memory."""
        self._pipe.close()

    def _told(self, error: L2PError) -> str:
        # Hints that name options are for users of the command line.
        tells = isinstance(error, UsageError) and error.hint and "--" not in error.hint
        text = f"{error} ({error.hint})" if tells else str(error)
        bundle = self._pipe.bundle
        for folder in filter(None, (bundle.root, bundle.store)):
            text = text.replace(f"{folder.absolute()}{os.sep}", "").replace(str(folder), "bundle")
        return text

    def _checked(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of `Pipeline.generate`, within the limits."""
        manifest, limits = self._pipe.bundle.manifest, self.spec.limits
        profile = manifest.profiles[0]
        call: dict[str, Any] = {
            "prompt": _text("prompt", values.get("prompt"), limits.prompt_bytes),
            "negative_prompt": _text("negative prompt", values.get("negative_prompt"), limits.prompt_bytes),
            "prompt_embeds": values.get("prompt_embeds"),
            "negative_embeds": values.get("negative_embeds"),
            "height": int(values.get("height", profile.height_px.opt)),
            "width": int(values.get("width", profile.width_px.opt)),
            "seed": int(values.get("seed", 0)),
            "steps": int(values["steps"]) if "steps" in values else None,
            "guidance": float(values["guidance"]) if "guidance" in values else None,
        }
        if call["prompt"] is None and call["prompt_embeds"] is None:
            raise UsageError("the request has neither prompt nor prompt_embeds")
        height, width = call["height"], call["width"]
        check_size(manifest.model, height, width)
        if height * width > limits.pixels:
            raise UsageError(
                f"{width}x{height} has {height * width:,} pixels, this server draws up to {limits.pixels:,}"
            )
        steps = manifest.sampling.steps if call["steps"] is None else call["steps"]
        if steps > limits.steps:
            raise UsageError(f"steps is {steps}, this server takes up to {limits.steps}")
        guidance = manifest.sampling.guidance if call["guidance"] is None else call["guidance"]
        if guidance != 1.0 and manifest.text is None and call["negative_embeds"] is None:
            raise UsageError(f"guidance {guidance} needs negative_embeds; without them it has to be 1")
        return call

    def _request(self, call: Mapping[str, Any]) -> ImageRequest:
        sampling = {"steps": call["steps"], "guidance": call["guidance"], "shift": None}
        rest = {name: value for name, value in call.items() if name not in sampling}
        manifest = self._pipe.bundle.manifest
        return image_request(manifest, **rest, sampling=sampling, rng="philox", dtype=self.spec.dtype)

    def _check_bundle(self, *, first: bool = False) -> None:
        """Hash every file whose size or time has changed since it was last checked.

        Raises:
            ArtifactError: a file is absent or changed, or the manifest is another one.
        """
        bundle = self._pipe.bundle
        if not first and open_manifest_digest(bundle) != bundle.digest:
            raise ArtifactError("the bundle was replaced after it was loaded", hint="load the model again")
        for record in bundle.manifest.files:
            path = bundle.home(record) / record.path
            facts = _facts(path)
            if not first and (facts is None or self._seen.get(path) != facts):
                check_file(bundle.home(record), record, full=True)
            if facts is not None:
                self._seen[path] = facts


def open_manifest_digest(bundle: Bundle) -> str:
    """Digest of the manifest that lies in a bundle's folder now; empty when there is none."""
    from l2p_runtime.contract import MANIFEST_NAME, bundle_digest

    try:
        return bundle_digest((bundle.root / MANIFEST_NAME).read_bytes())
    except OSError:
        return ""


def small_preview(pixels: NDArray[Any], longest_px: int) -> NDArray[np.uint8]:
    """Pixels [H,W,3] as uint8 [h,w,3], every n-th row and column, so that no side exceeds `longest_px`."""
    import numpy as np

    step = max(1, -(-max(pixels.shape[:2]) // longest_px))
    small = pixels[::step, ::step]
    return np.ascontiguousarray(small if small.dtype == np.uint8 else np.rint(small.astype(np.float32) * 255), np.uint8)


def png_base64(pixels: NDArray[Any], text: Mapping[str, str]) -> bytes:
    """A PNG file as base64 in ASCII, which JSON can hold.

    Args:
        pixels: [H,W,3] uint8, or float16 in [0,1], which becomes 16 bits per channel.
        text: keyword to text that the file holds.
    """
    import numpy as np

    if pixels.dtype == np.float16:
        pixels = np.rint(pixels.astype(np.float32) * 65535).astype(np.uint16)
    # The caller waits while this is packed: level 6 made a smooth image 8 % smaller, in eight times the time.
    return base64.b64encode(encode_png(pixels, text, level=1))


def picture_text(report: Mapping[str, Any], prompt: str | None, negative_prompt: str | None) -> dict[str, str]:
    """Metadata for a file of an image, from its report."""
    names = ("seed", "steps", "guidance", "shift", "positions", "plan", "bundle", "trained")
    return {
        "Software": f"l2p-export {__version__}",
        "prompt": prompt or "",
        "negative_prompt": negative_prompt or "",
        "seed": str(report["seed"]),
        "bundle": str(report["bundle"]),
        "parameters": json.dumps({name: report[name] for name in names} | {"rng": "philox"}),
    }


_TEXTS = ("bundle", "bundle_digest", "backend", "plan", "memory_budget", "dtype")
_NUMBERS = ("preview_px", "max_pixels", "max_steps", "max_prompt_bytes")
_DTYPES: tuple[PixelDType, ...] = ("uint8", "float16")
_WRITE_AGAIN = "write the repository again with `l2p-export triton`"


def _number(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 18 and int(text) > 0):
        raise UsageError(f"parameter {name} is {text[:40]!r}, expected a positive number", hint=_WRITE_AGAIN)
    return int(text)


def _text(what: str, value: Any, most_bytes: int) -> str | None:
    if value is None:
        return None
    data = value.encode() if isinstance(value, str) else bytes(value)
    if len(data) > most_bytes:
        raise UsageError(f"the {what} has {len(data):,} bytes, this server takes up to {most_bytes:,}")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"the {what} is not UTF-8 at byte {error.start}") from error


def _facts(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino
