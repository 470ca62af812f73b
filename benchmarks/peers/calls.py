"""Shared parts of the scripts that compare FP8 of other tools with ours, on the same small model.

`make bench-peers` runs all of it. By hand, each tool in an environment of its own:

    python benchmarks/peers/prepare.py FOLDER                                  the project's environment
    PYTHONPATH=$OURS MODELOPT/bin/python benchmarks/peers/modelopt_peer.py FOLDER
    PYTHONPATH=$OURS TORCHAO/bin/python benchmarks/peers/torchao_peer.py FOLDER
    python benchmarks/peers/compare.py FOLDER                                  the project's environment; the tables

with OURS=export:runtime:calib:engines; the Makefile lists the packages of the other two environments. The error is the
relative error of our ledger, against float32 on the same inputs: each network by itself, and all in sequence. This
module needs only NumPy.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l2p_export.proof.compare import compare_networks
from l2p_runtime.backends import Engine
from l2p_runtime.backends.host import HostDevice
from l2p_runtime.bundle import Bundle
from l2p_runtime.contract import NETWORKS
from l2p_runtime.contract.codec import from_json, to_json
from l2p_runtime.errors import ParityError
from l2p_runtime.tensorfile import open_tensorfile

BUNDLE, GRAPHS, CALIBRATION, TEST = "demo.bundle", "graphs", "calibration", "test"
OURS, MODELOPT, RESULTS = "ours", "modelopt", "results"
OUR_PLANS = ("fp16", "fp8", "fp8-plain")

Call = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Stored:
    """Storage of the weights of one network.

    Attributes:
        network: its name.
        size_bytes: of all its tensors, including scales.
        linear: number of weights of linear layers.
        linear_eighths: of these, weights quantized to 8 bits.
        linear_stored: of these, weights stored in 8 bits; the others are quantized when an ONNX graph is loaded.
        convolution: number of weights of convolutions.
        convolution_eighths: of these, weights quantized to 8 bits.
        products_eighths: matrix products of two activations, as in attention, with 8-bit inputs.
    """

    network: str
    size_bytes: int
    linear: int
    linear_eighths: int
    linear_stored: int
    convolution: int
    convolution_eighths: int
    products_eighths: int = 0


@dataclass(frozen=True, slots=True)
class Errors:
    """The relative errors of one network, or of the whole prediction, on all calls."""

    network: str
    relative: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Result:
    """Errors and storage of all networks for one tool in one setting."""

    tool: str
    errors: tuple[Errors, ...]
    stored: tuple[Stored, ...]


def read_calls(folder: Path) -> dict[str, Call]:
    """Read all calls of a folder: inputs of the networks and, as `network.output`, their float32 outputs."""
    paths = sorted(folder.glob("*.safetensors"), key=lambda path: int(path.stem))
    files = {path.stem: open_tensorfile(path) for path in paths}
    return {name: {key: np.array(file.read(key)) for key in file.tensors} for name, file in files.items()}


def measure(bundle: Bundle, calls: Mapping[str, Call], load: Callable[[str], Engine]) -> tuple[Errors, ...]:
    """Run every call on the engines that `load` returns, and compare as a build's ledger does.

    Raises:
        ParityError: an output holds NaN or Inf, or has another shape.
    """
    specs = {network: bundle.manifest.network(network) for network in NETWORKS}
    # Only the figures are used; `fp8-plain` has no threshold that fails.
    entries = compare_networks("peers", "fp8-plain", specs, calls, load, HostDevice(), lambda done: None)
    found: dict[str, list[float]] = {}
    for entry in entries:
        if entry.relative is None:
            raise ParityError(f"{entry.network}, call {entry.case}: {entry.reason}")
        found.setdefault(entry.network, []).append(entry.relative)
    return tuple(Errors(network, tuple(values)) for network, values in found.items())


def write_result(folder: Path, result: Result) -> None:
    """Write the result of one tool, for `compare.py`."""
    path = folder / RESULTS / f"{result.tool.replace(' ', '-')}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(to_json(result)), encoding="utf-8")


def read_results(folder: Path) -> list[Result]:
    """Read the results of all tools, sorted by name."""
    paths = sorted((folder / RESULTS).glob("*.json"))
    return [from_json(Result, json.loads(path.read_bytes()), path.stem) for path in paths]
