"""Effect of SmoothQuant before FP8: inputs of a linear layer divided by s per channel, weights times s, then rounded.

SmoothQuant (Xiao et al. 2022, equation 4) moves s = amax(x)^a / amax(w)^(1 - a) of each channel from the inputs into
the layer before. This script measures it in torch on a bundle of the demo, on noisy renders of the small world.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from l2p_calib.fp8 import FP8_MAX
from l2p_export.evaluation.scores import world_prompts
from l2p_export.graphs.stored import bundle_model, float32_plan
from l2p_export.precision.torch_backend import TorchNetworks
from l2p_export.proof.cases import network_inputs
from l2p_export.proof.compare import run_engine
from l2p_export.world.render import render
from l2p_export.world.scenes import place
from l2p_runtime import Pipeline
from l2p_runtime.bundle import open_bundle
from l2p_runtime.contract import NETWORKS
from l2p_runtime.networks import load_network
from l2p_runtime.noise import normal_noise
from l2p_runtime.positions import rope_tables

SIZE_PX = 128
TIMES = (0.1, 0.4, 0.7, 0.95)
ALPHAS = (None, 0.25, 0.5, 0.75)
KINDS = ("to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3")

Case: TypeAlias = dict[str, NDArray[Any]]


def main() -> None:
    """Print the error of the prediction, and of each kind of linear layer, with and without smoothing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument(
        "--count", type=int, default=8, help="captions to measure on; the same number of others sets the scales"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    bundle = open_bundle(options.bundle)
    model = bundle_model(bundle)
    networks = TorchNetworks(model)
    backend = networks.backend()
    for name in NETWORKS:
        load_network(bundle, backend, name, float32_plan(bundle))
    linears: dict[str, nn.Linear] = {}
    for name in NETWORKS:
        module = networks.engines[name].module
        linears |= {p.layer: module.get_submodule(p.layer) for p in model.layout(name).linear_layers}  # type: ignore[misc]
    with Pipeline.open(options.bundle, plan=float32_plan(bundle)) as pipe:
        cases = list(_cases(pipe, options.count * 2))
    half = len(cases) // 2
    run = partial(_run, networks, backend.device)
    peaks = _peaks(linears, cases[:half], run)
    wanted = [run(case) for case in cases[half:]]
    print(f"{len(linears)} linear layers, {half} calls at {SIZE_PX}x{SIZE_PX}; relative errors, mean over layers")
    for alpha in ALPHAS:
        with _rounding(linears, peaks, alpha) as errors:
            found = [run(case) for case in cases[half:]]
        prediction = float(np.linalg.norm(np.subtract(found, wanted)) / np.linalg.norm(wanted))
        parts = {
            kind: np.mean([np.mean(values) for layer, values in errors.items() if layer.endswith(f".{kind}")])
            for kind in KINDS
        }
        text = ", ".join(f"{kind} {value:.2%}" for kind, value in parts.items())
        print(f"{'none' if alpha is None else alpha}: prediction {prediction:.3%}; {text}", flush=True)


def _cases(pipe: Pipeline, count: int) -> Iterator[Case]:
    spec, random = pipe.bundle.manifest.model, np.random.default_rng(0)
    rows = SIZE_PX // spec.patch_px
    for index, prompt in enumerate(world_prompts(count, 0, held_out=False)):
        embeds = pipe.encode([prompt.text])[0]
        padded = np.zeros((1, spec.padded(len(embeds)), spec.caption_width), np.float32)
        padded[0, : len(embeds)] = embeds
        pixels = render(place(prompt.description, random), SIZE_PX, SIZE_PX).transpose(2, 0, 1) / 127.5 - 1
        cosine, sine = rope_tables(spec, rows, rows, padded.shape[1])
        for time in TIMES:
            noise = normal_noise(index, rows=(0, SIZE_PX), cols=(0, SIZE_PX))
            yield {
                "image": (time * pixels + (1 - time) * noise)[np.newaxis].astype(np.float32),
                "time": np.asarray([time], np.float32),
                "prompt_embeds": padded,
                "caption_mask": np.arange(padded.shape[1])[np.newaxis] < len(embeds),
                "rope_cos": cosine,
                "rope_sin": sine,
                "grid": np.asarray([rows, rows], np.int64),
            }


def _run(networks: TorchNetworks, device: Any, case: Case) -> NDArray[np.float64]:
    made: Case = {}
    for name in NETWORKS:
        out = run_engine(networks.engines[name], device, network_inputs(name, case, made))
        made |= {f"{name}.{output}": value for output, value in out.items()}
    return made["head.prediction"].astype(np.float64)


def _peaks(linears: Mapping[str, nn.Linear], cases: list[Case], run: Any) -> dict[str, Tensor]:
    """Layer to the maximum magnitude of each of its input channels."""
    peaks: dict[str, Tensor] = {}

    def look(layer: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        del module
        found = inputs[0].detach().abs().flatten(0, -2).amax(dim=0)
        peaks[layer] = torch.maximum(peaks[layer], found) if layer in peaks else found

    with ExitStack() as stack:
        for layer, linear in linears.items():
            stack.callback(linear.register_forward_pre_hook(partial(look, layer)).remove)
        for case in cases:
            run(case)
    return peaks


@contextmanager
def _rounding(
    linears: Mapping[str, nn.Linear], peaks: Mapping[str, Tensor], alpha: float | None
) -> Iterator[dict[str, list[float]]]:
    """Context with all linear layers in FP8; yields layer to the relative errors of its output for its own inputs."""
    errors: dict[str, list[float]] = {layer: [] for layer in linears}

    def product(layer: str, smooth: Tensor, module: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        weight = module.weight.detach() * smooth
        rows = weight.abs().amax(dim=1, keepdim=True) / FP8_MAX
        scale = (peaks[layer] / smooth).max() / FP8_MAX
        found = F.linear(_rounded(inputs[0] / smooth, scale), _rounded(weight, rows), module.bias)
        errors[layer].append(float((found - output).norm() / output.norm()))
        return found

    with ExitStack() as stack:
        for layer, linear in linears.items():
            smooth = torch.ones_like(peaks[layer])
            if alpha is not None:
                columns = linear.weight.detach().abs().amax(dim=0)
                smooth = peaks[layer].clamp_min(1e-6) ** alpha / columns.clamp_min(1e-6) ** (1 - alpha)
            stack.callback(linear.register_forward_hook(partial(product, layer, smooth)).remove)
        yield errors


def _rounded(values: Tensor, scale: Tensor) -> Tensor:
    return (values / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).to(torch.float32) * scale


if __name__ == "__main__":
    main()
