"""A model folder as a server reads it: its backend, versions and files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from l2p_export.serving.configs import IMAGE_MODELS, STREAMING
from l2p_export.serving.python_models import MODEL_FILE, code_faults
from l2p_export.serving.repository import template

Fault: TypeAlias = tuple[str, str]
"""The place in a model and what is wrong there."""

PLATFORMS: Mapping[str, str] = {
    "tensorrt_plan": "tensorrt",
    "onnxruntime_onnx": "onnxruntime",
    "pytorch_libtorch": "pytorch",
    "tensorflow_graphdef": "tensorflow",
    "tensorflow_savedmodel": "tensorflow",
    "ensemble": "ensemble",
}
"""Platform to backend."""

DEFAULT_FILES: Mapping[str, str] = {
    "python": MODEL_FILE,
    "tensorrt": "model.plan",
    "onnxruntime": "model.onnx",
    "pytorch": "model.pt",
    "tensorflow": "model.savedmodel",
}
"""Backend to the file that it loads; servers recognise a model without a backend by it."""

_MODULE_FILE = re.compile(r"[^.]+\.py")
_LEADING_NUMBER = re.compile(r"\s*([+-]?[0-9]+)", re.ASCII)
_GLUE_FILE = "glue.py"
_VERSION_MAX = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Model:
    """A model folder: its parsed `config.pbtxt`, and the backend that a server takes for it, empty for none."""

    folder: Path
    config: Any
    backend: str

    def served(self) -> list[int]:
        """Versions that the policy serves, in increasing order."""
        found, policy = sorted(number_to_name(self.folder)), self.config.version_policy
        match policy.WhichOneof("policy_choice"):
            case "all":
                return found
            case "specific":
                return [number for number in found if number in policy.specific.versions]
            case "latest":
                return found[-policy.latest.num_versions :] if policy.latest.num_versions else []
            case _:
                return found[-1:]


def number_to_name(folder: Path) -> dict[int, str]:
    """Versions that a server sees in a model folder, as number to folder name.

    A server reads the number that a name begins with, so `2.bak` is version 2. It ignores leading zeros.
    """
    found: dict[int, str] = {}
    for name in sorted(entry.name for entry in folder.iterdir() if entry.is_dir()):
        match = _LEADING_NUMBER.match(name)
        if match is not None and (name == "0" or not name.startswith("0")):
            number = int(match[1])
            found[number] = str(number) if found.get(number) == str(number) else name
    return found


def backend_of(folder: Path, config: Any) -> str:
    """The backend of a model: as configured, else by its platform, else by the files of its versions."""
    if config.backend or config.platform:
        return str(config.backend or PLATFORMS.get(config.platform, ""))
    if config.default_model_filename:
        names = {config.default_model_filename}
    else:
        names = {entry.name for number in number_to_name(folder).values() for entry in (folder / number).iterdir()}
    return next((backend for backend, file in DEFAULT_FILES.items() if file in names), "")


def check_versions(model: Model) -> Iterator[Fault]:
    """Version folders that there are not, that no server loads, or that it takes for another version."""
    found = number_to_name(model.folder)
    for number, name in found.items():
        if not -_VERSION_MAX <= number <= _VERSION_MAX:
            yield "versions", f"`{name}` is beyond {_VERSION_MAX}, the largest version"
        elif number in model.served() and (name != str(number) or number < 0):
            text = f"`{name}` is version {number} to the server, which then waits for its files for ever"
            yield "versions", f"{text}: move it out of the model folder"
    if model.served():
        return
    if found:
        yield "version_policy", f"serves none of the versions that are there ({', '.join(map(str, sorted(found)))})"
        return
    zeros = sorted(entry.name for entry in model.folder.glob("0*") if entry.is_dir())
    ignored = f"; the server ignores `{zeros[0]}` because it begins with 0" if zeros else ""
    yield "versions", f"there is none; at least one folder called 1, 2, ... must be there{ignored}"


def check_files(model: Model) -> Iterator[Fault]:
    """Files that the served versions lack, and code that a server could not start."""
    names = _files(model)
    for number in model.served():
        version = model.folder / str(number)
        if not version.is_dir():
            continue
        for name in names:
            if (version / name).is_file():
                continue
            hang = "; the server would wait for it for ever" if model.backend == "python" else ""
            yield f"{number}/{name}", f"is missing{hang}"
        if model.backend == "python" and (version / names[0]).is_file():
            yield from ((f"{number}/{place}", text) for place, text in _check_code(model, version, names[0]))


def _check_code(model: Model, version: Path, file: str) -> Iterator[Fault]:
    if not _MODULE_FILE.fullmatch(file):
        yield file, "is no name of a Python module: expected `.py` at its end, and no other dot"
    for fault in code_faults(version, model.folder, file):
        yield fault.file, fault.text
    if model.folder.name not in IMAGE_MODELS:
        return
    if not any((folder / _GLUE_FILE).is_file() for folder in (version, model.folder)):
        yield _GLUE_FILE, "is missing"
    for other in ("l2p", *STREAMING):
        streams = model.folder.name in STREAMING
        if (other in STREAMING) != streams and (version / file).read_bytes() == template(f"{other}/{MODEL_FILE}"):
            yield file, f"is that of `{other}`; the server would wait for its answers for ever"


def _files(model: Model) -> list[str]:
    default = model.config.default_model_filename or DEFAULT_FILES.get(model.backend, "")
    if model.backend == "tensorrt":
        return list(model.config.cc_model_filenames.values()) or [default]
    return [default] if model.backend in ("python", "onnxruntime") else []
