"""FP8 of other tools beside ours, on the same small model: what the scripts of this folder share.

`make bench-peers` runs all of it. By hand, each tool in an environment of its own:

    python benchmarks/peers/prepare.py FOLDER                                  the project's environment
    PYTHONPATH=$OURS MODELOPT/bin/python benchmarks/peers/modelopt_peer.py FOLDER
    PYTHONPATH=$OURS TORCHAO/bin/python benchmarks/peers/torchao_peer.py FOLDER
    python benchmarks/peers/compare.py FOLDER                                  the project's environment; the tables

with OURS=export:runtime:calib:engines; the Makefile says what the other two environments hold. What is measured is the
relative error of our ledger, against float32 on the same inputs: each network alone, and all in a row. This module
needs nothing but NumPy.
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
    """How the weights of one network are stored.

    Attributes:
        network: its name.
        size_bytes: of all its tensors, scales included.
        linear: numbers in matrices that values are multiplied by.
        linear_eighths: those of them that are rounded to 8 bits.
        linear_stored: those of them that are stored so; others are rounded when a graph is loaded.
        convolution: numbers in the kernels of convolutions.
        convolution_eighths: those of them that are rounded to 8 bits.
        products_eighths: products of two values, as in attention, of numbers in 8 bits.
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
    """What one tool, in one setting, made of the networks."""

    tool: str
    errors: tuple[Errors, ...]
    stored: tuple[Stored, ...]


def read_calls(folder: Path) -> dict[str, Call]:
    """Every call of a folder: inputs of the networks and, as `network.output`, what float32 made of them."""
    paths = sorted(folder.glob("*.safetensors"), key=lambda path: int(path.stem))
    files = {path.stem: open_tensorfile(path) for path in paths}
    return {name: {key: np.array(file.read(key)) for key in file.tensors} for name, file in files.items()}


def measure(bundle: Bundle, calls: Mapping[str, Call], load: Callable[[str], Engine]) -> tuple[Errors, ...]:
    """Run every call on what `load` gives for each network, and compare as a build's ledger does.

    Raises:
        ParityError: an output holds NaN or Inf, or has another shape.
    """
    specs = {network: bundle.manifest.network(network) for network in NETWORKS}
    # Only the figures are wanted; the gate of `fp8-plain` lets everything through.
    entries = compare_networks("peers", "fp8-plain", specs, calls, load, HostDevice(), lambda done: None)
    found: dict[str, list[float]] = {}
    for entry in entries:
        if entry.relative is None:
            raise ParityError(f"{entry.network}, call {entry.case}: {entry.reason}")
        found.setdefault(entry.network, []).append(entry.relative)
    return tuple(Errors(network, tuple(values)) for network, values in found.items())


def write_result(folder: Path, result: Result) -> None:
    """Write what one tool did, for `compare.py`."""
    path = folder / RESULTS / f"{result.tool.replace(' ', '-')}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(to_json(result)), encoding="utf-8")


def read_results(folder: Path) -> list[Result]:
    """What all tools did, by name."""
    paths = sorted((folder / RESULTS).glob("*.json"))
    return [from_json(Result, json.loads(path.read_bytes()), path.stem) for path in paths]
