"""Options of `build` for engines: targets and build settings, each with its cost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from l2p_engines.builders.engines import EngineOptions

Command = TypeVar("Command", bound=Callable[..., Any])

BACKENDS = ("auto", "onnx", "rtx", "tensorrt")

_OPTIONS = (
    click.option(
        "--backend",
        type=click.Choice(BACKENDS),
        default="auto",
        show_default=True,
        help="onnx: only ONNX graphs; rtx or tensorrt: engines too; auto: engines when --target is given.",
    ),
    click.option(
        "--target",
        "targets",
        metavar="LIST",
        help="Engine targets, e.g. rtx-sm89,rtx-sm120; or portable, or this (the GPU of this machine).",
    ),
    click.option(
        "--head-memory",
        metavar="SIZE",
        help="GPU memory for one stripe of the pixel head; default: 4GiB. Less memory means more stripes, and each "
        "recomputes 6 token rows.",
    ),
    click.option(
        "--workspace",
        metavar="SIZE",
        help="Workspace limit of one operation. Too little excludes fast kernels, or leaves none.",
    ),
    click.option(
        "--optimization-level",
        type=click.IntRange(0, 5),
        help="Builder optimization level: 0 builds fastest, 5 searches longest; the library's default is 3.",
    ),
    click.option(
        "--weight-streaming",
        is_flag=True,
        help="Allow weights to be streamed from host memory: fits smaller GPUs, at the speed of PCIe.",
    ),
    click.option(
        "--timing-cache",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="TensorRT: timing cache to read and write; speeds up the next build on the same GPU.",
    ),
    click.option(
        "--version-compatible",
        is_flag=True,
        help="TensorRT: engines also run on later versions; they are larger and lack some kernels.",
    ),
    click.option(
        "--hardware-compatible",
        is_flag=True,
        help="TensorRT: engines run on every GPU since Ampere; slower than engines for one GPU.",
    ),
)


def engine_options(command: Command) -> Command:
    """Add all engine options; the command gets them as keyword arguments for `read_engine_options`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def read_engine_options(
    backend: str,
    targets: str | None,
    head_memory: str | None,
    workspace: str | None,
    optimization_level: int | None,
    timing_cache: Path | None,
    *,
    weight_streaming: bool,
    version_compatible: bool,
    hardware_compatible: bool,
) -> EngineOptions:
    """Check the options, as far as that is possible without a model.

    Raises:
        UsageError: a target, size or setting that does not exist, or that the backend does not have.
        HostError: the backend's library is not installed.
    """
    from l2p_engines.builders.engines import parse_engine_options
    from l2p_engines.builders.trt import EngineSettings
    from l2p_runtime.memory import parse_bytes

    settings = EngineSettings(
        workspace_bytes=parse_bytes(workspace) if workspace is not None else None,
        optimization_level=optimization_level,
        weight_streaming=weight_streaming,
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
    )
    head_bytes = parse_bytes(head_memory) if head_memory is not None else None
    return parse_engine_options(backend, targets, settings, head_bytes, timing_cache)
