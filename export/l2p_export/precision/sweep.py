"""Sensitivity sweep: puts one group of linear layers at a time in FP8, in torch, and compares it with float32.

It runs on the samples that calibration drew. Each measurement is written to a file that is named by everything that
decides it. So a sweep that was stopped resumes, and a sweep with another gate measures only what is new.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2p_calib.fp8 import FP8_MAX, channel_scales, float16_scale
from l2p_calib.ledger import psnr_db
from l2p_calib.plans.file import PlanFile, plan_to_bytes
from l2p_calib.plans.float8 import float8_plan
from l2p_calib.plans.float16 import Measurement
from l2p_calib.plans.plan import PLANS
from l2p_calib.sensitivity import (
    Deviation,
    Sensitivity,
    relative_errors,
    require_gate,
    sensitivity_to_csv,
    sensitivity_to_json,
    sweep,
)
from l2p_engines.store.locks import locked
from l2p_export.graphs.stored import bundle_model, float32_plan
from l2p_export.precision.calibrate import STEPS_MAX, CalibrationJob, sample_values
from l2p_export.precision.sweep_plot import has_matplotlib, write_plot
from l2p_export.precision.torch_backend import TorchNetworks
from l2p_export.proof.cases import network_inputs
from l2p_export.proof.compare import run_engine
from l2p_runtime import Pipeline
from l2p_runtime.contract import NETWORKS, BasePrecision
from l2p_runtime.contract.codec import from_json, to_json
from l2p_runtime.errors import UsageError
from l2p_runtime.files import write_bytes, write_text
from l2p_runtime.networks import OpenedPlan, load_network

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from torch import nn

    from l2p_calib.layout import QuantizationLayout
    from l2p_calib.statistics.ranges import Statistics
    from l2p_export.world.scenes import Description
    from l2p_runtime.progress import Reporter

NAME = "fp8-swept"
"""Name of the plan that a sweep writes."""

_LOCK = ".writing.lock"

PICTURES_MAX = 8
"""Maximum pictures that are drawn and judged for each measurement, one per prompt. Without captions one is drawn."""


@dataclass(frozen=True, slots=True)
class SweepResult:
    """The result of a sweep: its figures, the plan that follows from them, and the files of both."""

    found: Sensitivity
    plan: PlanFile
    files: tuple[Path, ...]


def sweep_bundle(
    job: CalibrationJob,
    samples: Path,
    statistics: Statistics,
    out: Path,
    gate: float,
    reporter: Reporter,
    precision: BasePrecision = "fp8",
) -> SweepResult:
    """Sweep the layers that a plan has in FP8, and write table, plot and plan.

    Args:
        job: the calibration that drew the samples.
        samples: folder of the samples, with the outputs of each network.
        statistics: statistics that were measured on the samples.
        out: folder to write.
        gate: maximum relative error of the denoiser's output.
        reporter: shows the groups.
        precision: one of `SWEPT`, which decides the layers to sweep.

    Raises:
        UsageError: the gate is one that nothing or everything passes.
        HostError: another command writes to the folder, or the memory does not hold the networks in torch float32.
    """
    require_gate(gate)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / _LOCK, busy=f"another calibration is writing `{out}`"):
        return _sweep(job, samples, statistics, out, gate, reporter, precision)


def _sweep(
    job: CalibrationJob,
    samples: Path,
    statistics: Statistics,
    out: Path,
    gate: float,
    reporter: Reporter,
    precision: BasePrecision,
) -> SweepResult:
    cache = out / "measurements"
    cache.mkdir(parents=True, exist_ok=True)
    model = bundle_model(job.bundle)
    layouts = [model.layout(name) for name in NETWORKS]
    networks = TorchNetworks(model)
    sweeper = _Sweeper(job, samples, networks, cache)
    measurements = [_measurement(layout, statistics, sweeper.module(layout.network)) for layout in layouts]
    base = replace(PLANS[precision], name=NAME)
    sweeper.scales = {item.layer: item.scale for item in float8_plan(base, measurements).plan.inputs}
    groups = _groups(layouts, sweeper.scales)
    sweeper.network_of = {product.layer: layout.network for layout in layouts for product in layout.quantizable}
    exact = sweeper.exact()
    with reporter.task("sweeping linear layers in FP8", len(groups), "groups") as advance:
        found = sweep(groups, gate, job.source, sweeper.measure, advance, exact.right)
    found = replace(found, pictures=len(exact.images))
    chosen = float8_plan(base, measurements, kept=found.reasons)
    return SweepResult(found, chosen, tuple(_write_all(out, found, chosen, reporter)))


@contextmanager
def in_float8(module: nn.Module, input_scales: Mapping[str, float]) -> Iterator[None]:
    """Compute some layers of a float32 network as FP8 ONNX graphs do: inputs and weights are fake-quantized.

    Args:
        module: a network; its submodules carry published names.
        input_scales: linear layer to the scale of its inputs; query, key or value of attention to its own scale.
    """
    import numpy as np
    import torch

    handles = []
    try:
        for layer, scale in input_scales.items():
            part = module.get_submodule(layer)
            stored = torch.from_numpy(float16_scale(np.asarray(scale, np.float32)))
            hook: Callable[..., torch.Tensor] = partial(_input, stored)
            if isinstance(part, torch.nn.Linear):
                weight = part.weight.detach()
                of_rows = torch.from_numpy(channel_scales(weight.abs().amax(dim=1).numpy()))
                hook = partial(_product, stored, _rounded(weight, of_rows[:, None]))
            handles.append(part.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, slots=True)
class _Pictures:
    """Pictures of some samples.

    Attributes:
        images: float [H,W,3] from 0 to 1; 8 bits would hide small errors.
        right: number that show their prompts; None if the prompts are not captions of the small world.
    """

    images: tuple[NDArray[Any], ...]
    right: int | None


class _Sweeper:
    """Measures a denoiser with some linear layers, or inputs of attention, in FP8.

    Attributes:
        scales: layer to the scale of its inputs.
        network_of: layer to its network.
    """

    def __init__(self, job: CalibrationJob, samples: Path, networks: TorchNetworks, cache: Path) -> None:
        self._job, self._samples, self._networks, self._cache = job, samples, networks, cache
        self._opened = OpenedPlan(job.bundle, networks.backend(), float32_plan(job.bundle))
        self._descriptions = _descriptions(job)
        self._exact: _Pictures | None = None
        self.scales: Mapping[str, float] = {}
        self.network_of: Mapping[str, str] = {}

    def module(self, network: str) -> nn.Module:
        """A network in torch; it is loaded by the first call."""
        load_network(self._opened, network)
        return self._networks.engines[network].module

    def exact(self) -> _Pictures:
        """The pictures in float32; they are drawn by the first call."""
        if self._exact is None:
            self._exact = self._draw()
        return self._exact

    def measure(self, layers: Sequence[str]) -> Deviation:
        """Deviation from float32 with these layers in FP8; read from its file if it was measured before."""
        chosen = {layer: self.scales[layer] for layer in sorted(layers)}
        judged = sorted(self._descriptions)
        key = hashlib.sha256(json.dumps([self._job.settings, STEPS_MAX, judged, chosen]).encode()).hexdigest()
        path = self._cache / f"{key[:32]}.json"
        if path.is_file():
            return from_json(Deviation, json.loads(path.read_bytes()))
        with self._rounded(chosen):
            sums = [self._sample(index, chosen) for index in range(len(self._job.samples))]
            error, worst = relative_errors(sums)
            drawn = self._draw()
            found = Deviation(error, worst, min(map(_psnr_db, drawn.images, self.exact().images)), drawn.right)
        write_text(path, json.dumps(to_json(found), allow_nan=False))
        return found

    @contextmanager
    def _rounded(self, chosen: Mapping[str, float]) -> Iterator[None]:
        self.exact()
        with ExitStack() as stack:
            for network in NETWORKS:
                scales = {layer: scale for layer, scale in chosen.items() if self.network_of[layer] == network}
                stack.enter_context(in_float8(self.module(network), scales))
            yield

    def _sample(self, index: int, chosen: Mapping[str, float]) -> tuple[float, float]:
        """Sums of squares of the difference and of the float32 prediction; starts at the first network with FP8."""
        import numpy as np

        expected = sample_values(self._samples, index)
        made = dict(expected)
        first = min((NETWORKS.index(self.network_of[layer]) for layer in chosen), default=len(NETWORKS))
        for network in NETWORKS[first:]:
            engine = self._networks.engines[network]
            out = run_engine(engine, self._opened.backend.device, network_inputs(network, expected, made))
            made |= {f"{network}.{name}": value for name, value in out.items()}
        wanted = expected["head.prediction"].astype(np.float64)
        difference = made["head.prediction"] - wanted
        return float(np.square(difference).sum()), float(np.square(wanted).sum())

    def _draw(self) -> _Pictures:
        """The pictures of the samples that are judged, or of the first sample."""
        images = tuple(self._image(index) for index in self._descriptions or (0,))
        if not self._descriptions:
            return _Pictures(images, None)
        from l2p_export.world.judge import judge

        pixels = [(image * 255.0).round().astype("uint8") for image in images]
        pairs = zip(pixels, self._descriptions.values(), strict=True)
        return _Pictures(images, sum(judge(image, description).passed for image, description in pairs))

    def _image(self, index: int) -> NDArray[Any]:
        import numpy as np

        sample, case = self._job.samples[index], sample_values(self._samples, index)
        embeds = np.asarray(case["prompt_embeds"][0][case["caption_mask"][0]])
        pipe = Pipeline.on_backend(self._opened)
        pixels = pipe.generate(
            prompt_embeds=embeds,
            height=sample.height_px,
            width=sample.width_px,
            seed=sample.seed,
            steps=min(self._job.bundle.manifest.sampling.steps, STEPS_MAX),
            guidance=1.0,
            dtype="float16",
        )
        return pixels.astype(np.float64)


def _descriptions(job: CalibrationJob) -> dict[int, Description]:
    """The first sample of each prompt that is a caption of the small world, to the scene that the judge must find."""
    if not job.has_text or importlib.util.find_spec("skimage") is None:
        return {}
    from l2p_export.world.captions import describe

    found: dict[int, Description] = {}
    seen: set[int] = set()
    for index, sample in enumerate(job.samples):
        if sample.prompt in seen or len(found) == PICTURES_MAX:
            continue
        seen.add(sample.prompt)
        with suppress(UsageError):
            found[index] = describe(job.prompts[sample.prompt])
    return found


def _psnr_db(image: NDArray[Any], wanted: NDArray[Any]) -> float:
    return psnr_db(image - wanted, 1.0)


def _measurement(layout: QuantizationLayout, statistics: Statistics, module: nn.Module) -> Measurement:
    found = next(item for item in statistics.networks if item.network == layout.network)
    peaks = {name: float(value.abs().max()) for name, value in module.state_dict().items()}
    return Measurement(layout, found.sha256, peaks, found)


def _groups(layouts: Sequence[QuantizationLayout], scales: Mapping[str, float]) -> dict[str, list[str]]:
    """Group to its linear layers, or inputs of attention, that can be in FP8."""
    found: dict[str, list[str]] = {}
    for layout in layouts:
        for product in layout.quantizable:
            if product.layer in scales:
                found.setdefault(product.group, []).append(product.layer)
    return found


def _write_all(out: Path, found: Sensitivity, plan: PlanFile, reporter: Reporter) -> Iterator[Path]:
    files = {
        "sensitivity.json": sensitivity_to_json(found).encode(),
        "sensitivity.csv": sensitivity_to_csv(found).encode(),
        f"{NAME}.json": plan_to_bytes(plan),
    }
    for name, data in files.items():
        write_bytes(out / name, data)
        yield out / name
    if has_matplotlib():
        write_plot(out / "sensitivity.png", found)
        yield out / "sensitivity.png"
    else:
        reporter.note("matplotlib is not installed, so there is no plot: pip install 'l2p-export[train]'")


def _product(scale: torch.Tensor, weight: torch.Tensor, layer: Any, inputs: tuple[Any, ...], output: object) -> Any:
    from torch.nn import functional as F

    del output
    return F.linear(_rounded(inputs[0], scale), weight, layer.bias)


def _input(scale: torch.Tensor, layer: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    del layer, inputs
    return _rounded(output, scale)


def _rounded(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The same as `fp8.fake_quantize`, bit for bit."""
    import torch

    codes = (values / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return codes.to(torch.float32) * scale
