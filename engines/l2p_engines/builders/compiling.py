"""Compiles one ONNX graph to one engine, in this process: parse, check, set profiles, compile, stream to disk.

Only this module checks the library's calls, which return None, -1 or False when they fail.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from l2p_engines.builders.explanations import build_error
from l2p_engines.builders.listeners import Journal, Phases, make_logger, make_monitor
from l2p_engines.builders.request import EngineSpec
from l2p_engines.builders.timings import load_timings, store_timings
from l2p_engines.builders.trt import EngineLibrary, Module, apply_settings
from l2p_runtime.contract import LIBRARY_TITLES, EngineProfile, InputShapes, TensorSpec, short_version, split_dim
from l2p_runtime.errors import ArtifactError, HostError, L2PError, UsageError

_DTYPES = {"float32": "FLOAT", "float16": "HALF", "uint8": "UINT8", "int64": "INT64", "bool": "BOOL"}


@dataclass(frozen=True, slots=True)
class Compiled:
    """A written engine: its digest and size, its profiles as the library gave them back, and the log's warnings."""

    sha256: str
    size_bytes: int
    profiles: tuple[EngineProfile, ...]
    warnings: tuple[str, ...]


def compile_engine(
    library: EngineLibrary,
    spec: EngineSpec,
    graph: str,
    out: Path,
    journal: Journal,
    phases: Phases,
    timings: Path | None = None,
) -> Compiled:
    """Compile an ONNX graph for a target and write the engine.

    Args:
        library: of the target's backend.
        spec: the engine to build.
        graph: path of the `.onnx`, in UTF-8, with its weights beside it.
        out: path of the engine; a file that is there is replaced.
        journal: receives the library's log.
        phases: receives the progress.
        timings: kernel timings that TensorRT reads and writes; None without.

    Raises:
        ArtifactError: the graph is damaged, or another network's.
        UsageError: a profile or setting that the library refuses.
        HostError: the machine lacks something, or the library failed.
    """
    if short_version(library.version) != spec.target.library_version:
        raise HostError(
            f"target {spec.target.spelling} needs version {spec.target.library_version} of "
            f"{LIBRARY_TITLES[library.backend]}, version {library.version} is installed"
        )
    library.require_gpu(spec.target.compute_capability)
    trt = library.module
    work = _Work(f"`{spec.label}` with {LIBRARY_TITLES[library.backend]} {library.version}", journal)
    builder = work.made(trt.Builder(make_logger(trt, journal)), "Builder()")
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = work.made(builder.create_network(flags), "create_network()")
    phases.start("parsing graph", None, 0)
    # The network's weights are the parser's memory: it must live until the engine is built.
    parser = _parse(trt, work, network, graph)
    phases.finish("parsing graph")
    _require_tensors(trt, spec, network)
    config = work.made(builder.create_builder_config(), "create_builder_config()")
    config.progress_monitor = make_monitor(trt, phases)
    refused = apply_settings(library, config, spec.target.compute_capability, spec.settings)
    if refused:
        raise work.error("; ".join(refused), fallback=UsageError)
    profiles = _add_profiles(work, builder, config, spec.profiles)
    if timings is not None:
        load_timings(config, timings)
    compiled = _build(trt, work, builder, network, config, out, phases)
    del parser
    if timings is not None:
        store_timings(config, timings)
    return Compiled(*compiled, profiles, tuple(journal.warnings))


@dataclass(frozen=True, slots=True)
class _Work:
    """The engine that is being built, and the library's log of it."""

    what: str
    journal: Journal

    def made(self, value: Any, call: str) -> Any:
        """An object of the library, unless it is None."""
        if value is None:
            raise self.error(f"{call} returned None")
        return value

    def error(self, happened: str, messages: Iterable[str] = (), fallback: type[L2PError] | None = None) -> L2PError:
        """The error for a call that failed; `fallback` is its type when the library logged nothing."""
        told = [*messages, *self.journal.errors]
        if not told and fallback is not None:
            return fallback(f"cannot build {self.what}: {happened}")
        return build_error(self.what, told, happened)


def _parse(trt: Module, work: _Work, network: Any, graph: str) -> Any:
    parser = work.made(trt.OnnxParser(network, work.journal.logger), "OnnxParser()")
    parsed = parser.parse_from_file(graph)
    if not parsed or parser.num_errors:
        errors = [_parser_error(parser.get_error(index)) for index in range(parser.num_errors)]
        raise work.error("the graph was not parsed", errors, ArtifactError)
    return parser


def _parser_error(error: Any) -> str:
    node = f" in node `{error.node_name()}` ({error.node_operator()})" if error.node_name() else ""
    return f"{error.desc()}{node}"


def _require_tensors(trt: Module, spec: EngineSpec, network: Any) -> None:
    """Require that the parsed graph has exactly the inputs and outputs of the network.

    The parsers take an empty file for a graph without any, and a profile may name inputs that are not there.
    """
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    if not inputs and not outputs:
        raise ArtifactError(
            f"cannot build `{spec.label}`: the file is no ONNX graph, or an empty one", hint="build the bundle again"
        )
    for kind, found, wanted in (("input", inputs, spec.network.inputs), ("output", outputs, spec.network.outputs)):
        tensors = {tensor.name: tensor for tensor in found}
        if tensors.keys() != {tensor.name for tensor in wanted}:
            names = ", ".join(sorted(tensors)) or "none"
            raise ArtifactError(
                f"the graph of `{spec.label}` has {kind}s {names}, expected {', '.join(t.name for t in wanted)}"
            )
        for tensor in wanted:
            _require_tensor(trt, spec.label, kind, tensors[tensor.name], tensor)


def _require_tensor(trt: Module, label: str, kind: str, found: Any, wanted: TensorSpec) -> None:
    shape = tuple(found.shape)
    fixed = [factor if not symbol else -1 for factor, symbol in map(split_dim, wanted.shape)]
    # Where the library has worked a size out, it knows more of an output than its symbol says.
    fits = len(shape) == len(fixed) and all(
        size == wish or (wish == -1 and kind == "output") for size, wish in zip(shape, fixed, strict=True)
    )
    if not fits or found.dtype != getattr(trt.DataType, _DTYPES.get(wanted.dtype, ""), None):
        dtype = str(found.dtype).removeprefix("DataType.").lower()
        raise ArtifactError(
            f"{kind} `{wanted.name}` of the graph of `{label}` is {dtype} {list(shape)}, "
            f"expected {wanted.dtype} {wanted.describe()}"
        )


def _add_profiles(
    work: _Work, builder: Any, config: Any, profiles: Sequence[EngineProfile]
) -> tuple[EngineProfile, ...]:
    added = []
    for index, wanted in enumerate(profiles):
        profile = work.made(builder.create_optimization_profile(), "create_optimization_profile()")
        for shapes in wanted.inputs:
            profile.set_shape(shapes.name, shapes.min, shapes.opt, shapes.max)
        position = config.add_optimization_profile(profile)
        if position != index:
            called = f"add_optimization_profile() returned {position} for {wanted.inputs}"
            raise work.error(called, fallback=UsageError)
        # An input whose shape is fixed needs no range, and none is given back for it.
        ranges = [
            (shapes, [tuple(map(int, shape)) for shape in profile.get_shape(shapes.name)]) for shapes in wanted.inputs
        ]
        found = EngineProfile(tuple(InputShapes(old.name, *new) if new else old for old, new in ranges))
        if found != wanted:
            raise work.error(f"the profile {wanted} came back as {found}", fallback=HostError)
        added.append(found)
    return tuple(added)


def _build(
    trt: Module, work: _Work, builder: Any, network: Any, config: Any, out: Path, phases: Phases
) -> tuple[str, int]:
    writer = None
    try:
        # Closing it writes too, what is left in its buffer.
        with out.open("wb") as file:
            writer = _make_writer(trt, file, phases)
            built = builder.build_serialized_network_to_stream(network, config, writer)
            # The libraries continue when a write fails, and report success.
            if writer.error is not None:
                raise writer.error
            if not built:
                raise work.error(f"build_serialized_network_to_stream() returned {built}")
            inconsistent = [text for text in work.journal.warnings if "not self-consistent" in text]
            if inconsistent:
                raise work.error("a profile's shapes contradict one another", inconsistent)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _disk_error(work.what, out, error, writer.size_bytes if writer is not None else 0) from error
    written = out.stat().st_size
    if not written or written != writer.size_bytes:
        raise HostError(f"the engine {work.what} has {written:,} bytes on disk, {writer.size_bytes:,} were written")
    return writer.digest.hexdigest(), written


def _make_writer(trt: Module, file: IO[bytes], phases: Phases) -> Any:
    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.digest = hashlib.sha256()
            self.size_bytes = 0
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            if self.error is not None:
                return 0
            try:
                file.write(data)
            except OSError as error:
                self.error = error
                return 0
            self.digest.update(data)
            self.size_bytes += len(data)
            phases.wrote(self.size_bytes)
            return len(data)

    return Writer()


def _disk_error(what: str, out: Path, error: OSError, size_bytes: int) -> HostError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return HostError(
        f"cannot write the engine {what} to `{out.parent}` after {size_bytes:,} bytes: {error.strerror or error}",
        hint="free some space, or choose another --out" if full else "choose another --out",
    )
