"""Serves a bundle: checks a request against limits, draws, describes failures.

Independent of Triton: the models in `l2p_export/data/triton_models/` turn tensors into these calls and back.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias

from l2p_runtime.bundle import Bundle, check_file, open_bundle
from l2p_runtime.errors import ArtifactError, CancelledError, HostError, L2PError, UsageError
from l2p_runtime.pipeline import Pipeline
from l2p_runtime.serving.calls import INPUTS, call_request, checked_call
from l2p_runtime.serving.pictures import picture_text, png_base64, small_preview
from l2p_runtime.serving.spec import WRITE_AGAIN, Limits, ServiceSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Refusal: TypeAlias = Literal["INVALID_ARG", "UNAVAILABLE", "CANCELLED", "INTERNAL"]
"""Why a request has no image: it is wrong, this server cannot draw it, its caller cancelled, or a bug."""

PreviewCallback: TypeAlias = "Callable[[int, int, NDArray[np.uint8]], None]"
"""Receives (step, total steps, preview [h,w,3])."""


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
                hint=WRITE_AGAIN,
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
            values: any of `INPUTS`: `prompt`, `negative_prompt` and `positions` as UTF-8 bytes, `prompt_embeds` and
                `negative_embeds` [L,C], `base_grid` [2], the others numbers; what is absent has the bundle's default.
            cancelled: called between networks and stripes; true stops the drawing.
            shown: receives a preview of every step.

        Raises:
            UsageError: a value that is wrong or over a limit; nothing was allocated for it.
            HostError: the image does not fit the memory.
            ArtifactError: the bundle is damaged.
            CancelledError: `cancelled` said so.
        """
        pipe, manifest = self._pipe, self._pipe.bundle.manifest
        call = checked_call(manifest, self.spec.limits, values)
        request, coarse = call_request(manifest, call, self.spec.dtype), call["coarse"]
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
            "backend": pipe.opened_plan.backend.name,
            "trained": manifest.checkpoint.trained,
            "width": call["width"],
            "height": call["height"],
            "seed": call["seed"],
            "steps": request.sampling.steps,
            "guidance": request.sampling.guidance,
            "shift": request.sampling.shift,
            "positions": call["positions"] or manifest.profiles[0].positions,
            "base_grid": list(manifest.model_on(call["base_grid"]).rotary.base_grid),
            **({} if coarse is None else {"coarse": asdict(coarse)}),
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


def _facts(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino


__all__ = [
    "INPUTS",
    "Drawn",
    "Limits",
    "PreviewCallback",
    "Refusal",
    "Service",
    "ServiceSpec",
    "picture_text",
    "png_base64",
    "small_preview",
]
