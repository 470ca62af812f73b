"""Prepares the inputs of all tools: a bundle of the demo's 1k variant, denoising calls, and float32 ONNX graphs.

    python benchmarks/peers/prepare.py FOLDER

Runs in the project's environment and writes

    FOLDER/demo.bundle            the plan `fp32`
    FOLDER/calibration, test      `N.safetensors`, one per call: inputs, and outputs of each float32 ONNX graph
    FOLDER/graphs/NETWORK.onnx    the `fp32` plan's ONNX graph with its weights inside
    FOLDER/ours/PLAN/NETWORK      ONNX graph and weights under `fp16`, `fp8` and `fp8-plain`

All tools choose their scales from the calls in `calibration` and are measured on those in `test`, which have other
prompts and noise. `calls.py` says how to run the other scripts.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from calls import BUNDLE, CALIBRATION, GRAPHS, OUR_PLANS, OURS, TEST

from l2p_calib.plans.float8 import float8_plan
from l2p_calib.plans.float16 import Measurement, measured_plan
from l2p_calib.plans.plan import FLOAT8, PLANS
from l2p_calib.statistics.ranges import Statistics, read_statistics
from l2p_export.checkpoint.demo import demo_model
from l2p_export.checkpoint.loading import load_model
from l2p_export.graphs.export import export_graph
from l2p_export.precision.calibrate import TIMES_A_PICTURE, calibrate, check_calibration, sample_values
from l2p_export.precision.plans import weight_peaks
from l2p_runtime.bundle import Bundle, open_bundle
from l2p_runtime.contract import NETWORKS
from l2p_runtime.progress import Silent
from l2p_runtime.tensorfile import write_tensorfile

PROMPTS = {
    CALIBRATION: (
        "a red circle to the left of a blue square",
        "a green triangle above a yellow circle on a black background",
        "a blue circle",
        "a yellow square to the right of a green circle on a grey background",
        "a red triangle below a green square",
        "a yellow triangle on a white background",
        "a blue triangle to the left of a red square on a grey background",
        "a green circle below a yellow square on a black background",
    ),
    TEST: (
        "a green square to the right of a red circle",
        "a blue triangle below a yellow square on a black background",
        "a red triangle on a grey background",
        "a yellow circle above a blue circle on a white background",
    ),
}
"""Each gives four calls at different timesteps."""

SEEDS = {CALIBRATION: 0, TEST: 1000}
SIZE = (128, 128)

PROFILE = """name = "128px"
patch_px = 16
height_px = { min = 128, opt = 128, max = 256 }
width_px = { min = 128, opt = 128, max = 256 }
caption_tokens = { min = 32, opt = 32, max = 64 }
batch = { min = 1, opt = 1, max = 1 }
positions = "native"
sampling = { steps = 20, guidance = 2.0, shift = 3.0 }
"""
"""ONNX graphs do not depend on the profile, and a build verifies them at its corners; these are smaller than `1k`'s."""


def main() -> None:
    """Write the work folder."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    bundle = _built(folder)
    _write_graphs(bundle, folder / GRAPHS)
    for kind in (CALIBRATION, TEST):
        _write_calls(bundle, folder, kind)
    _write_ours(bundle, read_statistics(_statistics(folder, CALIBRATION)), folder / OURS)


def _built(folder: Path) -> Bundle:
    profile, out = folder / "128px.toml", folder / BUNDLE
    profile.write_text(PROFILE, encoding="utf-8")
    command = [sys.executable, "-m", "l2p_export", "build", "--profile", str(profile), "--out", str(out)]
    subprocess.run(command, check=True)
    return open_bundle(out)


def _write_calls(bundle: Bundle, folder: Path, kind: str) -> None:
    """Draw with the float32 ONNX graphs, and store their inputs, outputs and statistics."""
    prompts, to = folder / f"{kind}.txt", folder / kind
    prompts.write_text("\n".join(PROMPTS[kind]) + "\n", encoding="utf-8")
    to.mkdir(exist_ok=True)
    count = TIMES_A_PICTURE * len(PROMPTS[kind])

    def keep(samples: Path, found: Statistics) -> None:
        del found
        for index in range(count):
            values = {name: np.array(value) for name, value in sample_values(samples, index).items()}
            write_tensorfile(to / f"{index}.safetensors", values)

    out = _statistics(folder, kind)
    planned = check_calibration(bundle, out, prompts=prompts, samples=count, sizes=[SIZE], seed=SEEDS[kind])
    calibrate(planned, Silent(), keep)


def _write_ours(bundle: Bundle, statistics: Statistics, folder: Path) -> None:
    """Export as a build does, but with statistics of only these calls; a build adds the cases of its proof."""
    with tempfile.TemporaryDirectory() as scratch:
        demo = demo_model(bundle.manifest.model.patch_px, Path(scratch))
        loaded = load_model(demo.checkpoint, demo.source)
        model, tensors = loaded.model, loaded.checkpoint.tensors
        measured = []
        for found in statistics.networks:
            peaks = weight_peaks(tensors, tuple(model.network_shapes(found.network)))
            measured.append(Measurement(model.layout(found.network), found.sha256, peaks, found))
        for name in OUR_PLANS:
            complete = float8_plan if FLOAT8 in PLANS[name].dtypes else measured_plan
            plan = complete(PLANS[name], measured).plan
            for spec in model.networks:
                out = folder / name / spec.name
                shutil.rmtree(out, ignore_errors=True)
                out.mkdir(parents=True)
                export_graph(model, tensors, spec, plan, out, lambda done: None)


def _statistics(folder: Path, kind: str) -> Path:
    return folder / f"{kind}.json"


def _write_graphs(bundle: Bundle, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for network in NETWORKS:
        model = onnx.load(bundle.path(bundle.manifest.graph(network, "fp32").graph))
        onnx.save(model, folder / f"{network}.onnx")


if __name__ == "__main__":
    main()
