"""What precision plans do to the pictures of a demo's bundle: PSNR to the first plan's, and the judge's score."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from l2p_export.training.evaluation.drawers import DrawOptions, open_drawer
from l2p_export.training.evaluation.scores import Prompt, Score, world_prompts
from l2p_export.training.world.judge import judge
from l2p_runtime.bundle import open_bundle


def main() -> None:
    """Draw the same prompts and seeds under each plan, and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--size", type=int, default=128)
    options = parser.parse_args()
    manifest = open_bundle(options.bundle).manifest
    prompts = world_prompts(options.count, 0, held_out=True)
    print(f"{options.count} held-out captions at {options.size}x{options.size}, one picture each")
    print("plan            MiB  right  95 % interval as first   least  median  PSNR in dB")
    first: tuple[NDArray[np.uint8], list[bool]] | None = None
    for plan in manifest.plans:
        started = time.perf_counter()
        images = _draw(options.bundle, plan.name, options.size, prompts)
        passed = [judge(image, prompt.description).passed for image, prompt in zip(images, prompts, strict=True)]
        first = first or (images, passed)
        decibels = [_psnr_db(image, wanted) for image, wanted in zip(images, first[0], strict=True)]
        alike = sum(a == b for a, b in zip(passed, first[1], strict=True))
        low, high = Score(sum(passed), len(passed)).interval or (0.0, 0.0)
        size = sum(
            r.size_bytes for r in manifest.files if f".{plan.name}." in r.path and r.path.endswith(".safetensors")
        )
        print(
            f"{plan.name:12} {size / 2**20:6.1f} {sum(passed):6d} {low:7.1%}{high:7.1%} {alike:8d} "
            f"{min(decibels):7.1f} {np.median(decibels):7.1f}  {time.perf_counter() - started:.0f} s",
            flush=True,
        )


def _draw(bundle: Path, plan: str, size_px: int, prompts: tuple[Prompt, ...]) -> NDArray[np.uint8]:
    drawer = open_drawer(bundle, DrawOptions((size_px, size_px), plan=plan))
    return np.stack(list(drawer.draw([prompt.text for prompt in prompts], [prompt.seed for prompt in prompts])))


def _psnr_db(found: NDArray[np.uint8], wanted: NDArray[np.uint8]) -> float:
    error = float(np.mean((found.astype(np.float64) - wanted) ** 2))
    return float("inf") if error == 0.0 else 10.0 * float(np.log10(255.0**2 / error))


if __name__ == "__main__":
    main()
