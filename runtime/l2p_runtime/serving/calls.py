"""What a request asks of `Pipeline.generate`, checked against the limits before anything is allocated for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from l2p_runtime.coarse import Coarse, check_coarse
from l2p_runtime.contract import Manifest
from l2p_runtime.errors import UsageError
from l2p_runtime.policies import require_policy
from l2p_runtime.requests import ImageRequest, PixelDType, check_size, image_request
from l2p_runtime.serving.spec import Limits

FINE: Mapping[str, str] = {"renoise": "renoise", "fine_steps": "steps", "fine_guidance": "guidance"}
"""Value of a request to the field of `Coarse`."""

INPUTS = (
    *("prompt", "negative_prompt", "prompt_embeds", "negative_embeds", "height", "width", "seed", "steps", "guidance"),
    *("positions", "base_grid", "coarse_height", "coarse_width", *FINE),
)
"""Values that a request may have."""


def checked_call(manifest: Manifest, limits: Limits, values: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `Pipeline.generate`, within the limits; what a request leaves out has the bundle's default.

    Raises:
        UsageError: a value that is wrong or over a limit.
    """
    profile = manifest.profiles[0]
    coarse = _coarse(values)
    call: dict[str, Any] = {
        "prompt": _text("prompt", values.get("prompt"), limits.prompt_bytes),
        "negative_prompt": _text("negative prompt", values.get("negative_prompt"), limits.prompt_bytes),
        "prompt_embeds": values.get("prompt_embeds"),
        "negative_embeds": values.get("negative_embeds"),
        "height": int(values.get("height", profile.height_px.opt)),
        "width": int(values.get("width", profile.width_px.opt)),
        "seed": int(values.get("seed", 0)),
        "steps": int(values["steps"]) if "steps" in values else None,
        "guidance": _written(values["guidance"]) if "guidance" in values else None,
        "positions": _text("position policy", values.get("positions"), limits.prompt_bytes),
        "base_grid": tuple(int(side) for side in values["base_grid"]) if "base_grid" in values else None,
        "coarse": coarse,
    }
    if call["prompt"] is None and call["prompt_embeds"] is None:
        raise UsageError("the request has neither prompt nor prompt_embeds")
    height, width = call["height"], call["width"]
    check_size(manifest.model, height, width)
    if height * width > limits.pixels:
        raise UsageError(f"{width}x{height} has {height * width:,} pixels, this server draws up to {limits.pixels:,}")
    if coarse is not None:
        check_size(manifest.model, coarse.height, coarse.width)
        check_coarse(coarse, height, width)
    steps = manifest.sampling.steps if call["steps"] is None else call["steps"]
    if steps > limits.steps:
        raise UsageError(f"steps is {steps}, this server takes up to {limits.steps}")
    if coarse is not None and steps + coarse.steps > limits.steps:
        raise UsageError(
            f"steps is {steps} and fine_steps is {coarse.steps}, this server takes up to {limits.steps} together"
        )
    guidance = manifest.sampling.guidance if call["guidance"] is None else call["guidance"]
    if manifest.text is None and call["negative_embeds"] is None:
        for name, scale in (("guidance", guidance), ("fine_guidance", 1.0 if coarse is None else coarse.guidance)):
            if scale != 1.0:
                raise UsageError(f"{name} {scale} needs negative_embeds; without them it has to be 1")
    manifest.model_on(call["base_grid"])
    if call["positions"] is not None:
        require_policy(call["positions"])
    return call


def call_request(manifest: Manifest, call: Mapping[str, Any], dtype: PixelDType) -> ImageRequest:
    """The image that a checked call draws.

    Raises:
        UsageError: as `image_request`.
    """
    sampling = {"steps": call["steps"], "guidance": call["guidance"], "shift": None}
    apart = {*sampling, "positions", "base_grid", "coarse"}
    rest = {name: value for name, value in call.items() if name not in apart}
    fine_guidance = 1.0 if call["coarse"] is None else call["coarse"].guidance
    return image_request(manifest, **rest, sampling=sampling, fine_guidance=fine_guidance, rng="philox", dtype=dtype)


def _coarse(values: Mapping[str, Any]) -> Coarse | None:
    sides = [name for name in ("coarse_height", "coarse_width") if name in values]
    fine = {field: values[name] for name, field in FINE.items() if name in values}
    if len(sides) == 1:
        other = "coarse_width" if sides == ["coarse_height"] else "coarse_height"
        raise UsageError(f"the request has {sides[0]} and no {other}")
    if not sides:
        if fine:
            raise UsageError("renoise, fine_steps and fine_guidance belong to coarse_height and coarse_width")
        return None
    for field in ("renoise", "guidance"):
        if field in fine:
            fine[field] = _written(fine[field])
    return Coarse(values["coarse_height"], values["coarse_width"], **fine)


def _written(value: Any) -> float:
    """A number as it was written: 2.1 from a float32, which is 2.0999999046325684, as metadata of a local image say."""
    return float(str(value))


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
