"""The two engine libraries behind one protocol, loaded on first use. Only this module knows how they differ.

`rtx` is TensorRT for RTX, which compiles ahead of time with no GPU; `tensorrt` is TensorRT, which times kernels on the
GPU of the machine. Their calls are otherwise the same, and so is what they do on failure: return None, -1 or False.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Protocol, TypeAlias

from l2p_engines.builders.gpus import Gpu, gpus
from l2p_runtime.contract import LIBRARY_TITLES, PORTABLE, EngineBackend, short_version
from l2p_runtime.errors import HostError, UsageError

Module: TypeAlias = Any
"""`tensorrt_rtx` or `tensorrt`: neither has type information."""

OPTIMIZATION_LEVELS = range(6)
"""Both libraries take any number, and use 5 for all above it without a word."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How an engine is built; what is None or False is left at the library's own choice.

    Attributes:
        workspace_bytes: device memory that one operation may take; a kernel that wants more is not used.
        optimization_level: 0 to 5; higher builds longer and may run faster.
        weight_streaming: weights may stay in host memory while the engine runs.
        tf32: float32 matrix products may round their inputs to 10 bits, which is the libraries' default.
        version_compatible: runs on later versions of the library too.
        hardware_compatible: runs on later GPUs too.
    """

    workspace_bytes: int | None = None
    optimization_level: int | None = None
    weight_streaming: bool = False
    tf32: bool = False
    version_compatible: bool = False
    hardware_compatible: bool = False

    def __post_init__(self) -> None:
        if self.workspace_bytes is not None and not 1 <= self.workspace_bytes < 2**63:
            raise UsageError(f"the workspace is {self.workspace_bytes} bytes, expected 1 or more")
        if self.optimization_level is not None and self.optimization_level not in OPTIMIZATION_LEVELS:
            raise UsageError(f"the optimization level is {self.optimization_level}, expected 0 to 5")


class EngineLibrary(Protocol):
    """The operations in which the backends differ."""

    @property
    def backend(self) -> EngineBackend:
        """Which of the two."""

    @property
    def module(self) -> Module:
        """The library itself."""

    @property
    def version(self) -> str:
        """As the library states it, `1.7.1.116`."""

    def require_gpu(self, capability: str) -> None:
        """Check that this machine can build for a compute capability, before anything of the library is created.

        Raises:
            HostError: it cannot.
        """

    def configure(self, config: Any, capability: str, settings: EngineSettings) -> list[str]:
        """Set on a builder's configuration what only this library has; returns what it refused."""


@dataclass(frozen=True, slots=True)
class RtxLibrary:
    """TensorRT for RTX."""

    module: Module
    version: str
    backend: EngineBackend = "rtx"

    def require_gpu(self, capability: str) -> None:
        """Nothing: it compiles for a GPU that is not there."""

    def configure(self, config: Any, capability: str, settings: EngineSettings) -> list[str]:
        """Set the compute capability; unset, the engine is portable."""
        del settings
        if capability == PORTABLE:
            return []
        config.num_compute_capabilities = 1
        wanted = getattr(self.module.ComputeCapability, capability.upper())
        return [] if config.set_compute_capability(wanted, 0) else [f"set_compute_capability({capability}) is False"]


@dataclass(frozen=True, slots=True)
class TensorRtLibrary:
    """TensorRT."""

    module: Module
    version: str
    backend: EngineBackend = "tensorrt"

    def require_gpu(self, capability: str) -> None:
        """Ask the driver first: without a driver, TensorRT returns objects that crash the process."""
        gpu = first_gpu("TensorRT builds engines on a GPU")
        if gpu.capability != capability:
            raise HostError(
                f"TensorRT builds for the GPU of this machine, {gpu.name} ({gpu.capability}); {capability} was wanted",
                hint=f"build on a machine with a GPU of {capability}, or with `--target this` for this one",
            )

    def configure(self, config: Any, capability: str, settings: EngineSettings) -> list[str]:
        """Set compatibility with other GPUs and versions; it builds for the GPU that is there."""
        del capability
        if settings.version_compatible:
            config.set_flag(self.module.BuilderFlag.VERSION_COMPATIBLE)
        if settings.hardware_compatible:
            config.hardware_compatibility_level = self.module.HardwareCompatibilityLevel.AMPERE_PLUS
        return []


@dataclass(frozen=True, slots=True)
class _Package:
    """Where a library comes from; `pattern` is what its version must match."""

    module: str
    pattern: str
    wanted: str
    distributions: tuple[str, ...]
    hint: str
    library: type[RtxLibrary | TensorRtLibrary]


_PACKAGES: dict[EngineBackend, _Package] = {
    "rtx": _Package(
        "tensorrt_rtx",
        r"1\.7\.\d",
        "1.7",
        ("tensorrt_rtx_cu13", "tensorrt_rtx_cu12"),
        "pip install 'l2p-export[rtx]'",
        RtxLibrary,
    ),
    "tensorrt": _Package(
        "tensorrt",
        r"11\.\d+\.\d",
        "11",
        ("tensorrt_cu13", "tensorrt_cu12"),
        "pip install --extra-index-url https://pypi.nvidia.com 'l2p-export[tensorrt]'",
        TensorRtLibrary,
    ),
}


def load_library(backend: EngineBackend) -> EngineLibrary:
    """Import a library and check its version.

    Raises:
        HostError: it is not installed, does not load, is another version, or its packages are of different versions.
    """
    package = _PACKAGES[backend]
    try:
        module = importlib.import_module(package.module)
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == package.module
        found = "is not installed" if absent else f"does not load: {error}"
        raise HostError(f"{LIBRARY_TITLES[backend]} {found}", hint=package.hint) from error
    version = str(module.__version__)
    if not re.match(package.pattern, version):
        raise HostError(
            f"{LIBRARY_TITLES[backend]} is version {version}, this version of l2p-export builds with {package.wanted}",
            hint=package.hint,
        )
    _require_one_version(package, version)
    return package.library(module, version)


def library_version(backend: EngineBackend) -> str:
    """The first two numbers of an installed library's version, `1.7`: engines of one do not run on another.

    Raises:
        HostError: it is not installed, or another version than this one builds with.
    """
    return short_version(load_library(backend).version)


def first_gpu(why: str) -> Gpu:
    """The GPU that a build uses.

    Raises:
        HostError: no driver, or no GPU.
    """
    found = gpus()
    if not found:
        raise HostError(
            f"{why}, and this machine has no NVIDIA driver or no GPU",
            hint="run it on a machine with a GPU, or name what it is for, as in --target rtx-sm89",
        )
    return found[0]


def require_settings(backend: EngineBackend, settings: EngineSettings) -> None:
    """Refuse what a backend cannot do.

    Raises:
        UsageError: it cannot.
    """
    if backend == "tensorrt":
        return
    if settings.version_compatible:
        # The build looks for libnvinfer_lean.so.1, which no package holds (docs/design.md, "TensorRT facts").
        raise UsageError(
            "TensorRT for RTX builds no engine that runs on other versions",
            hint="leave that setting out, or build for a target of backend tensorrt",
        )
    if settings.hardware_compatible:
        raise UsageError(
            "TensorRT for RTX has no hardware compatibility levels",
            hint="`--target portable` runs on every GPU that it supports",
        )


def apply_settings(library: EngineLibrary, config: Any, capability: str, settings: EngineSettings) -> list[str]:
    """Set all settings on a builder's configuration; returns what the library refused, as text."""
    trt = library.module
    flags = {trt.BuilderFlag.TF32: settings.tf32, trt.BuilderFlag.WEIGHT_STREAMING: settings.weight_streaming}
    for flag, value in flags.items():
        (config.set_flag if value else config.clear_flag)(flag)
    refused = []
    # By default an engine keeps only its layers' names, and no inspector tells what they compute in.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if config.profiling_verbosity != trt.ProfilingVerbosity.DETAILED:
        refused.append(f"the profiling verbosity is {config.profiling_verbosity}")
    if settings.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_bytes)
        found = config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE)
        if found != settings.workspace_bytes:
            refused.append(f"the workspace limit is {found}, not {settings.workspace_bytes}")
    if settings.optimization_level is not None:
        config.builder_optimization_level = settings.optimization_level
        if config.builder_optimization_level != settings.optimization_level:
            refused.append(f"the optimization level is {config.builder_optimization_level}")
    return refused + library.configure(config, capability, settings)


def _require_one_version(package: _Package, version: str) -> None:
    """Packages of one library that were installed at different times load, and crash later."""
    for name in package.distributions:
        for part in (name, f"{name}_bindings", f"{name}_libs"):
            try:
                found = metadata.version(part)
            except metadata.PackageNotFoundError:
                continue
            if found != version:
                raise HostError(
                    f"{package.module} is version {version}, but its package {part} is {found}",
                    hint=f"install one version of all: pip install --force-reinstall {name}=={version} "
                    f"{name}_bindings=={version} {name}_libs=={version}",
                )
