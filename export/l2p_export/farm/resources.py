"""Forecast of what drawing one frame takes of a machine, from a bundle's manifest; nothing is opened or run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from l2p_engines.forecast.calls import CallSize
from l2p_engines.forecast.fitting import CARD_RESERVE_BYTES, fit_call
from l2p_export.farm.job import Needs
from l2p_runtime.backends.onnx import LIBRARY_BYTES, held_bytes
from l2p_runtime.contract import ENGINE_BACKENDS, NETWORKS, TEXT_ENCODER
from l2p_runtime.errors import ArtifactError
from l2p_runtime.memory import CallMemory, call_memory, cpu_call_memory, fused_call_memory
from l2p_runtime.requests import check_size

if TYPE_CHECKING:
    from l2p_runtime.bundle import Bundle
    from l2p_runtime.contract import Manifest

PROCESS_BYTES = 256 << 20
"""Host memory of a process besides networks and images: interpreter, NumPy, file writers (docs/farm.md, "Needs")."""

GPU_PROCESS_BYTES = 3 << 30
"""The same on a GPU, where the driver and its libraries add theirs. An assumption, not a measurement."""

_BUDGET_MARGIN = 1.05
"""A memory budget holds within 5 %."""

_PIXEL_BYTES = 3 * 4
"""A pixel of the frame that is encoded, beside those that the memory budget has room for."""

_UNLIMITED = 1 << 62


@dataclass(frozen=True, slots=True)
class Draw:
    """What is drawn, and on what.

    Attributes:
        height_px, width_px: the image.
        caption_tokens: of the longest prompt; padded here.
        prompts: 2 with guidance, 1 without.
        backend: as `--backend`.
        plan: as `--plan`; the bundle's first when None.
        memory_budget_bytes: as `--memory-budget`.
        room_bytes: what drawing frames holds beside what drawing one image takes.
    """

    height_px: int
    width_px: int
    caption_tokens: int
    prompts: int = 2
    backend: str = "auto"
    plan: str | None = None
    memory_budget_bytes: int | None = None
    room_bytes: int = 0


def runs_on_gpu(manifest: Manifest, backend: str) -> bool:
    """Whether a job asks for a GPU: `auto` does where the bundle has engines."""
    if backend == "auto":
        return bool(manifest.engines)
    return backend in (*ENGINE_BACKENDS, "onnx-cuda")


def forecast_needs(bundle: Bundle, draw: Draw, cores: int | None = None) -> Needs:
    """Forecast memory with all networks loaded and the pixel head run whole, or as the memory budget says.

    Raises:
        UsageError: a size that the model does not take, or no such plan.
        ArtifactError: the bundle has no files for the backend.
    """
    manifest = bundle.manifest
    check_size(manifest.model, draw.height_px, draw.width_px)
    pixels = draw.height_px * draw.width_px * _PIXEL_BYTES
    if not runs_on_gpu(manifest, draw.backend):
        budget = draw.memory_budget_bytes or cpu_budget_bytes(bundle, draw)
        return Needs(int(budget * _BUDGET_MARGIN) + PROCESS_BYTES + pixels, cores=cores)
    weights = _weights(bundle, draw)
    on_card = draw.memory_budget_bytes or _whole_fit(manifest, draw, weights)
    # A network passes through host memory on its way to the card.
    host = GPU_PROCESS_BYTES + max(weights.values()) + pixels + draw.room_bytes
    return Needs(host, on_card + CARD_RESERVE_BYTES, cores)


def cpu_budget_bytes(bundle: Bundle, draw: Draw) -> int:
    """The memory budget with which a frame is drawn with all networks loaded and the pixel head whole."""
    base = bundle.manifest.plan(draw.plan).base
    held = {network: held_bytes(size, base == "fp32") for network, size in _weights(bundle, draw).items()}
    # The text encoder is in memory beside the networks while it runs, or they would be loaded again after it.
    return max(_whole_fit(bundle.manifest, draw, held), sum(held.values())) + LIBRARY_BYTES + draw.room_bytes


def _whole_fit(manifest: Manifest, draw: Draw, weights: Mapping[str, int]) -> int:
    """Bytes of a call with all networks in memory and the pixel head whole."""
    call = CallSize(draw.height_px, draw.width_px, draw.caption_tokens)
    return fit_call(manifest.model, call, _call_memory(manifest, draw), weights, "all", _UNLIMITED).needed_bytes


def _call_memory(manifest: Manifest, draw: Draw) -> CallMemory:
    """Memory of one denoising call besides the weights, as the runtime forecasts it on the backend."""
    plan, model = manifest.plan(draw.plan), manifest.model
    rows, columns = draw.height_px // model.patch_px, draw.width_px // model.patch_px
    call = (model, 1, rows, columns, model.padded(draw.caption_tokens), draw.prompts)
    if _runs_engines(manifest, draw.backend):
        return call_memory(*call) if plan.base == "fp32" else fused_call_memory(*call)
    if not runs_on_gpu(manifest, draw.backend):
        fused = [network for network in NETWORKS if manifest.graph(network, plan.name).fused is not None]
        if fused:
            return cpu_call_memory(*call, fused_head="head" in fused)
    return call_memory(*call)


def _runs_engines(manifest: Manifest, backend: str) -> bool:
    return backend in ENGINE_BACKENDS or (backend == "auto" and bool(manifest.engines))


def _weights(bundle: Bundle, draw: Draw) -> dict[str, int]:
    """Network to the bytes of its weights, or of its engine; the largest of several targets'."""
    manifest = bundle.manifest
    plan = manifest.plan(draw.plan).name
    sizes = {record.path: record.size_bytes for record in manifest.files}
    networks = [spec.name for spec in manifest.networks]
    if manifest.text is not None:
        networks.append(TEXT_ENCODER)
    if not _runs_engines(manifest, draw.backend):
        if missing := [network for network in networks if not manifest.has_graph(network, plan)]:
            raise ArtifactError(
                f"the bundle has no ONNX graph of `{missing[0]}` in plan `{plan}`", hint="give --backend of its engines"
            )
        return {network: sizes[manifest.graph(network, plan).weights] for network in networks}
    found: dict[str, int] = {}
    for record in manifest.engines:
        if record.plan == plan and (draw.backend == "auto" or record.target.startswith(draw.backend)):
            found[record.network] = max(found.get(record.network, 0), sizes[record.engine])
    if not found:
        raise ArtifactError(
            f"the bundle has no engine in plan `{plan}` for {draw.backend}", hint="give --plan, or --backend onnx"
        )
    return found
