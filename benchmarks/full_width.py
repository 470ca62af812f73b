"""Cost and error of FP16 or FP8 at the published size: 6.21 billion random weights, each network against torch.

Writes a 4k checkpoint of seeded random weights in BF16 (12.4 GB) and builds its ONNX graphs in one precision (12.4 GB
in FP16). Prints seconds and peak anonymous memory of every stage, and the build's ledger at 1024 x 1024: torch float32
block by block, ONNX Runtime network by network. Then runs one denoising call of `Pipeline` with a memory budget that
does not hold all networks, against the same reference. Goal: 3 GiB for statistics, plan and ONNX graphs of FP8.

    python benchmarks/full_width.py [--precision fp8] [FOLDER]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
import zlib
from pathlib import Path

import numpy as np
from measure import anonymous_bytes, run_measured

from l2p_export.checkpoint.loading import load_model
from l2p_export.families.z_image_l2p.dimensions import expected_shapes, published_dimensions
from l2p_export.proof.cases import Case, case_inputs
from l2p_export.proof.reference import run_reference
from l2p_runtime import Pipeline
from l2p_runtime.bundle import open_bundle
from l2p_runtime.tensorfile import header_bytes

CASE = Case("1024x1024", 16, 16, 128, stored=False)
"""256 image tokens of 64 px patches: the minimum corner of the 4k profile."""
BUDGET = "9GiB"
CHUNK_VALUES = 1 << 24


def main() -> None:
    """Write the checkpoint, build it, and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--precision", default="fp16")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        started = time.perf_counter()
        checkpoint = write_random(Path(name) / "random_4k.safetensors")
        print(
            f"checkpoint: {checkpoint.stat().st_size / 1e9:.2f} GB in {time.perf_counter() - started:.0f} s", flush=True
        )
        out = Path(name) / "random.bundle"
        command = [sys.executable, "-m", "l2p_export", "build", str(checkpoint), "--profile", "4k"]
        built = run_measured([*command, "--precision", asked.precision, "--backend", "onnx", "--out", str(out)])
        peak = built.whole.peak_bytes / 2**30
        print(
            f"build: exit code {built.code}, {built.whole.seconds:.0f} s, peak anonymous {peak:.2f} GiB\n", flush=True
        )
        print("| stage | seconds | peak anonymous MiB |\n| --- | --- | --- |")
        for title, figures in built.stages.items():
            print(f"| {title} | {figures.seconds:.1f} | {figures.peak_bytes / 2**20:.0f} |", flush=True)
        if built.code:
            print("\n".join(built.stderr[-5:]))
            return
        _print_ledger(out)
        _print_pipeline(checkpoint, out)


def write_random(path: Path) -> Path:
    """Write weights that keep the variance of activations, gains near 1 and small biases."""
    shapes = expected_shapes(published_dimensions("4k"))
    header, _ = header_bytes([(name, "BF16", shape) for name, shape in shapes.items()])
    with path.open("wb") as file:
        file.write(header)
        for name, shape in shapes.items():
            random = np.random.default_rng(zlib.crc32(name.encode()))
            left = int(np.prod(shape))
            while left:
                values = random.standard_normal(min(left, CHUNK_VALUES), dtype=np.float32)
                if len(shape) == 1 and name.endswith("weight"):
                    values = np.float32(1) + np.float32(0.1) * values
                elif name.endswith(("bias", "pad_token")):
                    values *= np.float32(0.1)
                else:
                    values *= np.float32(np.sqrt(1.5 / np.prod(shape[1:])))
                file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
                left -= values.size
    return path


def _print_ledger(out: Path) -> None:
    print("| case | network | relative | max abs | PSNR dB |\n| --- | --- | --- | --- | --- |")
    for entry in open_bundle(out).manifest.ledger:
        if entry.relative is None:
            print(f"| {entry.case} | {entry.network} | {entry.status}: {entry.reason} | | |")
        else:
            print(
                f"| {entry.case} | {entry.network} | {entry.relative:.1e} | {entry.max_abs:.1e} | {entry.psnr_db:.1f} |"
            )


def _print_pipeline(checkpoint: Path, out: Path) -> None:
    loaded = load_model(checkpoint)
    inputs = case_inputs(loaded.model.spec, CASE, seed=0)
    expected = run_reference(loaded, {CASE.name: inputs}, lambda done: None)[CASE.name]["head.prediction"]
    peak, done = [0], threading.Event()
    watch = threading.Thread(target=_watch, args=(peak, done))
    before = anonymous_bytes()
    watch.start()
    started = time.perf_counter()
    embeds = inputs["prompt_embeds"][:, : CASE.caption_tokens]
    with Pipeline.open(out, memory_budget=BUDGET) as pipe:
        made = pipe.denoise(inputs["image"], inputs["time"], embeds)
    seconds = time.perf_counter() - started
    done.set()
    watch.join()
    error = float(np.linalg.norm(made - expected) / np.linalg.norm(expected))
    print(
        f"\nPipeline.denoise at {CASE.name} within {BUDGET}: relative error {error:.1e}, {seconds:.0f} s, "
        f"{(peak[0] - before) / 2**30:.2f} GiB of anonymous memory"
    )


def _watch(peak: list[int], done: threading.Event) -> None:
    while not done.wait(0.01):
        peak[0] = max(peak[0], anonymous_bytes())


if __name__ == "__main__":
    main()
