"""Settings of a service and limits of its requests, as the parameters of a model's configuration hold them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from l2p_runtime.errors import UsageError
from l2p_runtime.requests import PixelDType

WRITE_AGAIN = "write the repository again with `l2p-export triton`"


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
            raise UsageError(f"the configuration does not say {', '.join(missing)}", hint=WRITE_AGAIN)
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


_TEXTS = ("bundle", "bundle_digest", "backend", "plan", "memory_budget", "dtype")
_NUMBERS = ("preview_px", "max_pixels", "max_steps", "max_prompt_bytes")
_DTYPES: tuple[PixelDType, ...] = ("uint8", "float16")


def _number(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 18 and int(text) > 0):
        raise UsageError(f"parameter {name} is {text[:40]!r}, expected a positive number", hint=WRITE_AGAIN)
    return int(text)
