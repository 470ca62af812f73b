"""Quantizes the torch networks of a work folder with torchao, weights only; `calls.py` says how to run it.

    PYTHONPATH=export:runtime:calib:engines PYTHON benchmarks/peers/torchao_peer.py FOLDER

Runs the test calls and writes the results to FOLDER/results, for `compare.py`. Every `nn.Linear` is quantized, which is
torchao's default. Nothing is calibrated, because inputs are not quantized.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from calls import BUNDLE, TEST, Result, Stored, measure, read_calls, write_result
from torch import nn
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
from torchao.utils import TorchAOBaseTensor

from l2p_export.graphs.stored import bundle_model
from l2p_export.precision.torch_backend import TorchEngine, torch_module
from l2p_runtime.bundle import open_bundle

SETTINGS = {"float8": Float8WeightOnlyConfig, "int8": Int8WeightOnlyConfig}


def main() -> None:
    """Quantize and run every network in every setting."""
    folder = Path(sys.argv[1])
    bundle = open_bundle(folder / BUNDLE)
    model, calls = bundle_model(bundle), read_calls(folder / TEST)
    for setting, config in SETTINGS.items():
        stored = []

        def load(network: str) -> TorchEngine:
            weights = bundle.path(bundle.manifest.graph(network, "fp32").weights)
            module = torch_module(model, network, weights)
            quantize_(module, config())  # noqa: B023
            stored.append(_stored(network, module))  # noqa: B023
            return TorchEngine(module, bundle.manifest.network(network))

        errors = measure(bundle, calls, load)
        write_result(folder, Result(f"torchao {setting}", errors, tuple(stored)))
    print(f"torchao {version('torchao')}, torch {torch.__version__}")


def _stored(network: str, module: nn.Module) -> Stored:
    matrices = [part.weight for part in module.modules() if isinstance(part, nn.Linear)]
    kernels = [part.weight for part in module.modules() if isinstance(part, nn.Conv2d)]
    eighths = sum(value.numel() for value in matrices if isinstance(value, TorchAOBaseTensor))
    return Stored(
        network,
        size_bytes=sum(part.nbytes for value in module.state_dict().values() for part in _parts(value)),
        linear=sum(value.numel() for value in matrices),
        linear_eighths=eighths,
        linear_stored=eighths,
        convolution=sum(value.numel() for value in kernels),
        convolution_eighths=sum(value.numel() for value in kernels if isinstance(value, TorchAOBaseTensor)),
    )


def _parts(value: torch.Tensor) -> Iterator[torch.Tensor]:
    """The plain tensors of a quantized one: values and scales."""
    if not isinstance(value, TorchAOBaseTensor):
        yield value
        return
    names, _ = value.__tensor_flatten__()
    for name in names:
        yield from _parts(getattr(value, name))


if __name__ == "__main__":
    main()
