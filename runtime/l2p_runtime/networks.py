"""A bundle's networks on a backend: the precision plan, the files and the sizes that it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from l2p_runtime.backends import Backend, Engine, backend_names, open_backend
from l2p_runtime.contract import (
    ENGINE_BACKENDS,
    NETWORKS,
    TEXT_ENCODER,
    BasePrecision,
    EngineRecord,
    Manifest,
)
from l2p_runtime.errors import ArtifactError, HostError, InternalError, L2PError, UsageError
from l2p_runtime.memory import CallMemory, call_memory, cpu_call_memory, fused_call_memory

if TYPE_CHECKING:
    from l2p_runtime.bundle import Bundle
    from l2p_runtime.stripes import Stripe


@dataclass(frozen=True, slots=True)
class OpenedPlan:
    """A precision plan of a bundle on an opened backend: networks are loaded from the one and run on the other."""

    bundle: Bundle
    backend: Backend
    plan: str

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return self.bundle.manifest

    @property
    def base(self) -> BasePrecision:
        """The base precision of the plan."""
        return self.manifest.plan(self.plan).base

    @property
    def runs_engines(self) -> bool:
        """False on a backend that runs ONNX graphs."""
        return self.backend.load_engine is not None

    def of_plan(self, plan: str) -> OpenedPlan:
        """Another plan of the same bundle on the same backend."""
        return replace(self, plan=plan)


def open_plan(bundle: Bundle, name: str, device: int, plan: str | None) -> OpenedPlan:
    """Open a backend that runs a bundle, with the plan that it runs.

    Args:
        bundle: the bundle.
        name: of a backend; `auto` takes the fastest that runs here and that the bundle has files for.
        device: index of the device.
        plan: precision plan; the first that the backend runs when None.

    Raises:
        UsageError: no such backend or plan.
        HostError: the backend cannot run here.
        ArtifactError: the bundle has no engine, or no ONNX graph, for it.
    """
    manifest = bundle.manifest
    if plan is not None:
        manifest.plan(plan)
    if name != "auto":
        return _open(bundle, name, device, plan)
    reasons = []
    built_for = {record.target.split("-")[0].rstrip("0123456789.") for record in manifest.engines}
    for candidate in backend_names():
        if candidate in ENGINE_BACKENDS and candidate not in built_for:
            continue
        try:
            return _open(bundle, candidate, device, plan)
        except (HostError, ArtifactError) as error:
            reasons.append(error)
    if len(reasons) == 1:
        raise reasons[0]
    told = "; ".join(map(str, reasons))
    raise HostError(f"no backend can run this bundle here: {told}", hint=_hint(bundle, reasons))


def runnable_plans(bundle: Bundle, backend: Backend) -> list[str]:
    """The bundle's plans that a backend has all files for, in their order.

    Raises:
        ArtifactError: there is none; names what the first plan lacks.
    """
    missing: list[ArtifactError] = []
    found = []
    for ref in bundle.manifest.plans:
        try:
            _require_files(OpenedPlan(bundle, backend, ref.name))
            found.append(ref.name)
        except ArtifactError as error:
            missing.append(error)
    if not found:
        raise missing[0]
    return found


def load_network(opened: OpenedPlan, network: str, *, fused: bool = True) -> Engine:
    """Load one network: its engine on an engine backend, else its ONNX graph.

    Args:
        opened: the plan on its backend.
        network: its name.
        fused: take the fused graph, where the bundle has one and the backend runs it.

    Raises:
        ArtifactError: the bundle does not have that engine or ONNX graph, or it is damaged.
        HostError: it does not fit the device.
    """
    bundle, backend, spec = opened.bundle, opened.backend, opened.manifest.network(network)
    if backend.load_engine is not None:
        record = engine_record(opened, network)
        return backend.load_engine(bundle.path(record.engine), record, spec)
    _require_graph(opened, network)
    graph = opened.manifest.graph(network, opened.plan)
    chosen = graph.fused if fused and graph.fused is not None and backend.runs_fused else graph.graph
    return backend.load(bundle.path(chosen), bundle.path(graph.weights), spec)


def fused_networks(opened: OpenedPlan) -> tuple[str, ...]:
    """Networks of a denoising call whose fused graphs run, in order; none on a backend that does not take them."""
    manifest, plan = opened.manifest, opened.plan
    if not opened.backend.runs_fused:
        return ()
    return tuple(network for network in NETWORKS if manifest.graph(network, plan).fused is not None)


def engine_record(opened: OpenedPlan, network: str) -> EngineRecord:
    """The engine of a network that an engine backend runs.

    Raises:
        ArtifactError: the bundle has none for this GPU and library.
    """
    if opened.backend.target is None:
        raise InternalError(f"backend `{opened.backend.name}` runs no engines")
    return opened.manifest.engine(network, opened.plan, opened.backend.target)


def network_bytes(opened: OpenedPlan) -> dict[str, int]:
    """Network to the bytes of its engine, or of its ONNX graph's weights; the text encoder included."""
    manifest = opened.manifest
    sizes = {record.path: record.size_bytes for record in manifest.files}
    if not opened.runs_engines:
        return {network: sizes[manifest.graph(network, opened.plan).weights] for network in _networks(manifest)}
    return {network: sizes[engine_record(opened, network).engine] for network in _networks(manifest)}


def held_bytes(opened: OpenedPlan) -> dict[str, int]:
    """Network to the bytes that it takes while it is loaded; the text encoder included."""
    held, is_float32 = opened.backend.held_bytes, opened.base == "fp32"
    return {network: held(weights, is_float32) for network, weights in network_bytes(opened).items()}


def forecast_call(
    opened: OpenedPlan, batch: int, grid: tuple[int, int], caption_tokens: int, prompts: int
) -> CallMemory:
    """Memory of one denoising call of a plan on its backend, besides the weights.

    Args:
        opened: the plan.
        batch: images.
        grid: token rows and columns.
        caption_tokens: of the longest caption, padded.
        prompts: 2 with guidance, 1 without.
    """
    call = (opened.manifest.model, batch, *grid, caption_tokens, prompts)
    if opened.runs_engines:
        return call_memory(*call) if opened.base == "fp32" else fused_call_memory(*call)
    if fused := fused_networks(opened):
        return cpu_call_memory(*call, fused_head="head" in fused)
    return call_memory(*call)


def head_rows_max(record: EngineRecord, batch: int, columns: int) -> int:
    """Maximum of token rows that a head engine takes at once, halo included, for an image of `columns` token columns.

    Raises:
        UsageError: it takes no such image.
    """
    most = 0
    for profile in record.profiles:
        tokens = next(shapes for shapes in profile.inputs if shapes.name == "tokens")
        if tokens.min[0] <= batch <= tokens.max[0] and tokens.min[2] <= columns <= tokens.max[2]:
            most = max(most, tokens.max[1])
    if not most:
        raise UsageError(f"no engine of the head takes {batch} images of {columns} token columns", hint=_OTHER_SIZE)
    return most


def require_sizes(
    opened: OpenedPlan,
    batch: int,
    grid: tuple[int, int],
    caption_tokens: int,
    stripes: Sequence[Stripe],
) -> None:
    """Refuse a call that an engine was not built for, before anything is loaded.

    Args:
        opened: on an engine backend; any other takes every size.
        batch: images.
        grid: token rows and columns.
        caption_tokens: padded.
        stripes: of the head.

    Raises:
        UsageError: names the sizes that the engines take.
    """
    if not opened.runs_engines:
        return
    model, rows = opened.manifest.model, {stripe.read_stop - stripe.read_first for stripe in stripes}
    for network in NETWORKS:
        record, spec = engine_record(opened, network), opened.manifest.network(network)
        for stripe_rows in rows if network == "head" else (0,):
            symbols = model.symbols(batch, grid, caption_tokens, stripe_rows)
            shapes = {tensor.name: tensor.resolve(symbols) for tensor in spec.inputs}
            if not any(profile.covers(shapes) for profile in record.profiles):
                patch = model.patch_px
                raise UsageError(
                    f"the bundle's engines do not take {grid[1] * patch}x{grid[0] * patch} with {caption_tokens} "
                    f"caption tokens and a batch of {batch}: `{network}` was built for {_ranges(record, shapes)}",
                    hint=_OTHER_SIZE,
                )


_OTHER_SIZE = "build the bundle with a --profile that holds this size, or run its graphs with --backend onnx"


def _networks(manifest: Manifest) -> tuple[str, ...]:
    return (*NETWORKS, *((TEXT_ENCODER,) if manifest.text is not None else ()))


def _open(bundle: Bundle, name: str, device: int, plan: str | None) -> OpenedPlan:
    backend = open_backend(name, device)
    try:
        if plan is None:
            return OpenedPlan(bundle, backend, runnable_plans(bundle, backend)[0])
        opened = OpenedPlan(bundle, backend, plan)
        _require_files(opened)
    except ArtifactError:
        backend.device.close()
        raise
    return opened


def _require_files(opened: OpenedPlan) -> None:
    for network in _networks(opened.manifest):
        if opened.runs_engines:
            engine_record(opened, network)
        else:
            _require_graph(opened, network)


def _require_graph(opened: OpenedPlan, network: str) -> None:
    if opened.manifest.has_graph(network, opened.plan):
        return
    have = ", ".join(dict.fromkeys(record.target for record in opened.manifest.engines))
    raise ArtifactError(
        f"the bundle has no graph of `{network}` in plan `{opened.plan}`: it was packed for {have}",
        hint="run it on such a GPU with --backend rtx or tensorrt, or take the bundle that it was packed from",
    )


def _ranges(record: EngineRecord, shapes: Mapping[str, Sequence[int]]) -> str:
    """The ranges of the first input that does not fit, profile by profile."""
    for name, shape in shapes.items():
        ranges = [next(part for part in profile.inputs if part.name == name) for profile in record.profiles]
        if not any(part.covers(shape) for part in ranges):
            spans = " or ".join(f"{list(part.min)} to {list(part.max)}" for part in ranges)
            return f"`{name}` from {spans}, and this is {list(shape)}"
    return "other combinations of sizes"


def _hint(bundle: Bundle, reasons: Sequence[L2PError]) -> str:
    """What helps most: with ONNX graphs, what the last candidate lacks, which is the CPU; else what the first does."""
    manifest = bundle.manifest
    has_graphs = any(
        all(manifest.has_graph(network, ref.name) for network in _networks(manifest)) for ref in manifest.plans
    )
    ordered = reversed(reasons) if has_graphs else reasons
    return next((error.hint for error in ordered if error.hint), "pip install 'l2p-export[cpu]'")
