"""Times nearest x2 upsampling with a 3x3 convolution against equal forms with convolutions at the lower resolution.

    python benchmarks/upsampling.py stages VARIANT                    each level of a pixel head, float32
    python benchmarks/upsampling.py head VARIANT PLAN HEIGHTxWIDTH    the whole head
    python benchmarks/upsampling.py engine VARIANT PLAN               the head as an engine for sm89; needs no GPU

A variant is `1k` or `4k`, at the published widths, or `demo-1k` or `demo-4k`, at a quarter of them; weights are seeded.
A plan is `fp32` or `fp16`. `--graphs FOLDER` caches ONNX graphs, since a trace takes a minute.

Calls run on one thread, with all forms in turn in each round. Milliseconds are CPU time of the process, which other
work on the machine affects less than wall time. MiB are the peak of anonymous memory that the first call adds, in a
process of its own. Every run first compares the forms on numbers that need no rounding.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from measure import anonymous_bytes
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from upsampling_forms import FORMS, four_kernels, rewrite, stacked_kernel, stage_model, transposed_kernel

from l2p_engines.builders.builder import build_engine
from l2p_engines.builders.request import EngineRequest, EngineSpec
from l2p_engines.builders.shapes import engine_profiles
from l2p_engines.profiles import load_profile
from l2p_export.checkpoint.demo import demo_dimensions
from l2p_export.families.z_image_l2p import Z_IMAGE_L2P
from l2p_export.families.z_image_l2p.dimensions import (
    VARIANTS,
    Dimensions,
    expected_shapes,
    network_shapes,
    published_dimensions,
)
from l2p_export.families.z_image_l2p.head import PixelHead
from l2p_export.graphs.export import export_graph
from l2p_export.precision.plans import plain_plan
from l2p_export.tensors.sources import ArrayTensor, TensorSource, read_tensor
from l2p_runtime.backends.onnx import make_options
from l2p_runtime.contract import Target
from l2p_runtime.onnx_library import import_onnxruntime

Array = NDArray[Any]
Call = Callable[[], Array]

LIBRARIES = ("onnx", "torch")
STAGE_SIDE_PX = 1024
COLUMNS = "| form | minimum ms | median ms | of the original | MiB | relative error |\n|" + " --- |" * 6


def main() -> None:
    """Compare the forms, then run one benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("stages", "head", "engine"))
    parser.add_argument("variant", choices=("1k", "4k", "demo-1k", "demo-4k"))
    parser.add_argument("plan", nargs="?", choices=("fp32", "fp16"), default="fp32")
    parser.add_argument("size", nargs="?", default="1024x1024")
    parser.add_argument("--graphs", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=LIBRARIES)
    options = parser.parse_args()
    check_equal()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        options.graphs = options.graphs or scratch
        {"stages": stages, "head": head, "engine": engine}[options.what](options, scratch)


def check_equal() -> None:
    """Check that all forms give equal bits on small integers, whose sums are exact, including borders and odd sizes.

    Raises:
        AssertionError: a form differs.
    """
    random = np.random.default_rng(0)
    for channels, up, height, width in ((32, 16, 3, 5), (16, 32, 4, 1), (3, 5, 1, 2), (8, 8, 6, 7)):
        weight = random.integers(-4, 5, (up, channels, 3, 3)).astype(np.float32)
        bias, x = (random.integers(-4, 5, shape).astype(np.float32) for shape in (up, (1, channels, height, width)))
        model = stage_model(weight, bias)
        made = {form: _session(rewrite(model, form).SerializeToString()).run(None, {"x": x})[0] for form in FORMS}
        for form in FORMS:
            made[f"torch {form}"] = _torch_stage(form, weight.astype(np.float64), bias, x.astype(np.float64))()
        for form, y in made.items():
            if not np.array_equal(y, made["original"]):
                raise AssertionError(f"`{form}` differs: {channels} to {up} channels, {height} x {width}")


def stages(options: argparse.Namespace, scratch: Path) -> None:
    """Measure each level by itself, at its size in an image of 1024 x 1024."""
    d = _dimensions(options.variant)
    side, channels = STAGE_SIDE_PX >> len(d.levels), d.bottleneck
    for level in reversed(d.levels):
        random = np.random.default_rng(zlib.crc32(level.name.encode()))
        weight = _normal(random, level.up, channels, 3, 3) / np.float32(3 * channels**0.5)
        bias, x = _normal(random, level.up), _normal(random, 1, channels, side, side)
        for library in options.libraries:
            print(f"\n{library}, {channels} to {level.up} channels, {side} to {2 * side} px\n", flush=True)
            makers: dict[str, Callable[[], Call]] = {}
            for form in options.forms:
                makers[form] = partial(_torch_stage, form, weight, bias, x)
                if library == "onnx":
                    path = scratch / f"{form}.onnx"
                    onnx.save(rewrite(stage_model(weight, bias), form), path)
                    makers[form] = partial(_onnx_call, path, {"x": x})
            _measure(makers, options.rounds, None)
        side, channels = 2 * side, level.decoder


def head(options: argparse.Namespace, scratch: Path) -> None:
    """Measure the whole head; errors are against the unchanged float32 ONNX graph."""
    d = _dimensions(options.variant)
    height, width = map(int, options.size.split("x"))
    random = np.random.default_rng(1)
    feeds = {"image": _normal(random, 1, 3, height, width)}
    feeds["tokens"] = _normal(random, 1, height // d.patch_px, width // d.patch_px, d.width)
    expected = _onnx_call(_graph(options.variant, "fp32", options.graphs), feeds)()
    for library in options.libraries if options.plan == "fp32" else ("onnx",):
        print(f"\n{library}, head of {options.variant} in {options.plan}, {height} x {width} px\n", flush=True)
        makers: dict[str, Callable[[], Call]] = {}
        for form in options.forms:
            makers[form] = partial(_torch_head, options.variant, form, feeds)
            if library == "onnx":
                makers[form] = partial(_onnx_call, _form_of_graph(options, form, scratch), feeds)
        _measure(makers, options.rounds, expected)


def engine(options: argparse.Namespace, scratch: Path) -> None:
    """Build the head of each form as a TensorRT for RTX engine."""
    model = Z_IMAGE_L2P.model(expected_shapes(_dimensions(options.variant)))
    spec = next(spec for spec in model.networks if spec.name == "head")
    shapes = engine_profiles(spec, model.spec, [load_profile(options.variant.removeprefix("demo-"))])
    print("| form | graph, bytes | engine, bytes | s | peak anonymous MiB |\n|" + " --- |" * 5)
    for form in options.forms:
        path = _form_of_graph(options, form, scratch)
        wanted = EngineSpec(spec, options.plan, Target("rtx", "1.7", "sm89"), shapes)
        built = build_engine(EngineRequest(wanted, path, path.stat().st_size), scratch / "engine")
        print(
            f"| {form} | {path.stat().st_size:,} | {built.size_bytes:,} | {built.seconds:.1f} "
            f"| {built.peak_memory_bytes / 2**20:.0f} |",
            flush=True,
        )


def _measure(makers: Mapping[str, Callable[[], Call]], rounds: int, expected: Array | None) -> None:
    peaks = {form: _in_new_process(_peak_of, make) for form, make in makers.items()}
    torch.set_num_threads(1)
    calls = {form: make() for form, make in makers.items()}
    errors, times = {}, dict[str, list[float]]({form: [] for form in calls})
    for form, call in calls.items():
        made = call()
        expected = made if expected is None else expected
        errors[form] = float(np.linalg.norm(made.astype(np.float32) - expected) / np.linalg.norm(expected))
    for _ in range(rounds):
        for form, call in calls.items():
            started = time.process_time()
            call()
            times[form].append(1e3 * (time.process_time() - started))
    least = {form: min(values) for form, values in times.items()}
    first = next(iter(least.values()))
    print(COLUMNS)
    for form, values in times.items():
        print(
            f"| {form} | {least[form]:.1f} | {statistics.median(values):.1f} | {least[form] / first:.2f} "
            f"| {peaks[form] / 2**20:.0f} | {errors[form]:.1e} |",
            flush=True,
        )


def _in_new_process(work: Callable[..., int], *arguments: object) -> int:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        peak: int = pool.submit(work, *arguments).result()
    return peak


def _peak_of(make: Callable[[], Call]) -> int:
    torch.set_num_threads(1)
    call, peak, done = make(), [0], threading.Event()
    before = anonymous_bytes()
    watch = threading.Thread(target=_watch, args=(peak, done))
    watch.start()
    call()
    done.set()
    watch.join()
    return max(0, peak[0] - before)


def _watch(peak: list[int], done: threading.Event) -> None:
    while not done.wait(0.001):
        peak[0] = max(peak[0], anonymous_bytes())


def _session(model: bytes | str) -> Any:
    """An ONNX Runtime session with the runtime's options for small ONNX graphs, on one thread."""
    ort = import_onnxruntime()
    options = make_options(ort)
    options.enable_cpu_mem_arena = False
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _onnx_call(path: Path, feeds: Mapping[str, Array]) -> Call:
    session = _session(str(path))

    def call() -> Array:
        made: Array = session.run(None, dict(feeds))[0]
        return made

    return call


def _torch_stage(form: str, weight: Array, bias: Array, x: Array) -> Call:
    module, image = _Upsampling(form, weight, bias.astype(weight.dtype)), torch.as_tensor(x)
    return partial(_run_torch, module, [image])


def _torch_head(variant: str, form: str, feeds: Mapping[str, Array]) -> Call:
    d = _dimensions(variant)
    module = PixelHead(d, torch.float32)
    state = {name.removeprefix("local_decoder."): read_tensor(source) for name, source in _tensors(variant).items()}
    module.load_state_dict({name: torch.as_tensor(values) for name, values in state.items()})
    for level in d.levels if form != "original" else ():
        weight, bias = (state[f"up{level.name}.1.{part}"] for part in ("weight", "bias"))
        setattr(module, f"up{level.name}", _Upsampling(form, weight, bias))
    return partial(_run_torch, module, [torch.as_tensor(feeds["image"]), torch.as_tensor(feeds["tokens"])])


@torch.no_grad()
def _run_torch(module: nn.Module, inputs: list[Tensor]) -> Array:
    made: Array = module(*inputs).numpy()
    return made


class _Upsampling(nn.Module):
    """[B,in,h,w] to [B,out,2h,2w] by one of the forms."""

    def __init__(self, form: str, weight: Array, bias: Array) -> None:
        super().__init__()
        self.form, self.bias = form, torch.as_tensor(bias)
        kernels = four_kernels(weight)
        if form == "stacked":
            # `pixel_shuffle` expects the four kernels of a channel next to each other.
            kernels = stacked_kernel(weight).transpose(2, 0, 1, 3, 4, 5).reshape(-1, weight.shape[1], 2, 2)
            self.bias = self.bias.repeat_interleave(4)
        made = {"original": weight, "transposed": transposed_kernel(weight)}.get(form, kernels)
        self.weight = torch.as_tensor(np.ascontiguousarray(made))

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "original":
            return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), self.weight, self.bias, padding=1)
        if self.form == "stacked":
            return F.pixel_shuffle(F.conv2d(x, self.weight, self.bias, padding=1), 2)[:, :, 1:-1, 1:-1]
        if self.form == "transposed":
            return F.conv_transpose2d(x, self.weight, self.bias, stride=2, padding=1)
        made = x.new_empty(len(x), len(self.bias), 2 * x.shape[2], 2 * x.shape[3])
        for row in (0, 1):
            for column in (0, 1):
                wide = F.pad(x, (1 - column, column, 1 - row, row))
                made[:, :, row::2, column::2] = F.conv2d(wide, self.weight[row, column], self.bias)
        return made


def _form_of_graph(options: argparse.Namespace, form: str, scratch: Path) -> Path:
    path = scratch / f"head.{form}.onnx"
    onnx.save(rewrite(onnx.load(_graph(options.variant, options.plan, options.graphs)), form), path)
    return path


def _graph(variant: str, plan: str, folder: Path) -> Path:
    """The head's ONNX graph as a build writes it."""
    folder = folder / f"{variant}.{plan}"
    if not list(folder.glob("head.*.onnx")):
        folder.mkdir(parents=True, exist_ok=True)
        model = Z_IMAGE_L2P.model(expected_shapes(_dimensions(variant)))
        spec = next(spec for spec in model.networks if spec.name == "head")
        export_graph(model, _tensors(variant), spec, plain_plan(model, plan), folder, lambda done: None)
    return next(folder.glob("head.*.onnx"))


def _tensors(variant: str) -> Mapping[str, TensorSource]:
    """Seeded tensors of the head that keep the variance of activations."""
    tensors: dict[str, TensorSource] = {}
    for name, shape in network_shapes("head", _dimensions(variant)).items():
        values = _normal(np.random.default_rng(zlib.crc32(name.encode())), *shape)
        gain = 0.1 if len(shape) == 1 else float(np.sqrt(1.5 / np.prod(shape[1:])))
        tensors[name] = ArrayTensor(values * np.float32(gain))
    return tensors


def _dimensions(variant: str) -> Dimensions:
    name = variant.removeprefix("demo-")
    patch_px = next(patch for patch, known in VARIANTS.items() if known == name)
    return demo_dimensions(patch_px) if variant != name else published_dimensions(name)


def _normal(random: np.random.Generator, *shape: int) -> Array:
    return random.standard_normal(shape, np.float32)


if __name__ == "__main__":
    main()
