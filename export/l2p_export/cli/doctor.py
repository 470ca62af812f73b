"""`l2p-export doctor`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import click

from l2p_export.cli.console import example, format_bytes, json_option, print_json
from l2p_runtime import L2PError, __version__

_LIBRARIES = {
    "numpy": "runtime",
    "onnxruntime": "backend onnx; extra [cpu]",
    "onnxruntime-gpu": "backend onnx-cuda; extra [gpu]",
    "tensorrt_rtx_cu13": "engines of rtx; extra [rtx]",
    "tensorrt_cu13": "engines of tensorrt; extra [tensorrt]",
    "cuda-bindings": "every GPU; extras [rtx], [tensorrt], [gpu]",
    "nvidia-cuda-nvrtc": "every GPU; the same extras",
    "tokenizers": "prompts; extra [text]",
    "torch": "build; extra [export]",
    "onnx": "build; extra [export]",
    "onnxscript": "build; extra [export]",
    "safetensors": "train; extra [export]",
}


@click.command("doctor", epilog=example("doctor --json"))
@json_option
def command(*, as_json: bool) -> None:
    """Report what this machine can and cannot do. Exit code 3 when no backend can draw."""
    facts = _facts()
    if as_json:
        print_json(facts)
    else:
        for section, values in facts.items():
            click.echo(f"{section}:")
            for name, value in values.items():
                click.echo(f"  {name}: {value}")
    if facts["can"]["draw"] is not True:
        from l2p_runtime import HostError

        raise HostError("this machine cannot draw: no backend runs here", hint="pip install 'l2p-export[cpu]'")


def _facts() -> dict[str, dict[str, Any]]:
    from l2p_engines.builders.gpus import gpus
    from l2p_runtime.backends import open_backend
    from l2p_runtime.memory import available_host_bytes
    from l2p_runtime.native import SLOWER, native_status

    libraries = {name: f"{_version(name) or 'missing'} ({use})" for name, use in _LIBRARIES.items()}
    native = native_status()
    try:
        backend = open_backend("auto").name
        can_draw: bool | str = True
    except L2PError as error:
        backend, can_draw = f"none: {error}", False
    missing = [name for name in ("torch", "onnx", "onnxscript") if _version(name) is None]
    return {
        "l2p-export": {"version": __version__, "python": platform.python_version(), "system": platform.platform()},
        "libraries": libraries,
        "native kernels": {
            "loaded": native.available,
            "path": native.path or "none",
            "note": "ok" if native.available else f"{native.reason}; {SLOWER}",
        },
        "machine": {
            "processors": os.cpu_count() or 0,
            "memory_free": format_bytes(available_host_bytes()),
            "disk_free_here": format_bytes(shutil.disk_usage(Path.cwd()).free),
            "gpus": ", ".join(f"{gpu.name} ({gpu.capability})" for gpu in gpus()) or "none that a driver shows",
        },
        "can": {
            "draw": can_draw,
            "backend": backend,
            "build": True if not missing else f"no: {', '.join(missing)} missing, pip install 'l2p-export[export,cpu]'",
            "build engines": _engine_builders(),
        },
    }


def _engine_builders() -> str:
    """Engine builders of this machine: library version and targets, or why there is none."""
    from l2p_engines.builders.trt import library_version
    from l2p_runtime.contract import CAPABILITIES, ENGINE_BACKENDS

    found = []
    for backend in ENGINE_BACKENDS:
        try:
            version = library_version(backend)
        except L2PError as error:
            found.append(f"{backend}: no, {error}")
        else:
            where = "anywhere" if backend == "rtx" else "on its own GPU"
            found.append(f"{backend} {version}, {where}: {', '.join(CAPABILITIES[backend])}")
    return "; ".join(found)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
