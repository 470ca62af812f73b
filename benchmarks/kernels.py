"""Times what runs between networks: native kernels, their NumPy forms, and torch or Pillow doing the same.

    python benchmarks/kernels.py [SIDE ...]

Sides are 4096 and 8192 px. Each cell is the minimum CPU time of three runs in one thread, the cases taken in turn. PNG
is of the picture of `docs/demo.png`, enlarged.
"""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from PIL import Image

from l2p_runtime.backends import host_kernels as kernels
from l2p_runtime.coarse import cubic_taps
from l2p_runtime.images.png import encode_png
from l2p_runtime.noise import normal_noise, normal_noise_numpy

RUNS = 3
PICTURE = Path(__file__).parents[1] / "docs" / "demo.png"
Case = Callable[[], object]


def main() -> int:
    """Print the table."""
    torch.set_num_threads(1)
    print("| | native | NumPy | torch | Pillow |\n| --- | ---: | ---: | ---: | ---: |")
    for side in map(int, sys.argv[1:] or ("4096", "8192")):
        for name, cases in _cases(side).items():
            best = dict.fromkeys(cases, float("inf"))
            for _ in range(RUNS):
                for peer, case in cases.items():
                    best[peer] = min(best[peer], _seconds(case))
            cells = (f"{best[peer]:.3f}" if peer in best else "" for peer in ("native", "NumPy", "torch", "Pillow"))
            print(f"| {name}, {side} px | {' | '.join(cells)} |", flush=True)
    return 0


def _cases(side: int) -> dict[str, dict[str, Case]]:
    rng = np.random.default_rng(0)
    image, prediction, negative = (rng.standard_normal((1, 3, side, side), np.float32) for _ in range(3))
    coarse = rng.standard_normal((3, side // 4, side // 4), np.float32)
    tables = [table for _ in range(2) for table in cubic_taps(side // 4, side)]
    tensor, positive, base = map(torch.from_numpy, (image, prediction, negative))
    pixels = np.asarray(Image.open(PICTURE).convert("RGB").resize((side, side), Image.Resampling.BICUBIC))
    picture = Image.fromarray(pixels)

    def torch_euler(guided: torch.Tensor) -> torch.Tensor:
        return tensor.sub_(guided, alpha=0.1)

    def torch_pixels(dtype: torch.dtype, top: float) -> torch.Tensor:
        unit = (tensor[0].clamp(-1, 1).permute(1, 2, 0) + 1) * (top / 2)
        return unit.to(dtype) if dtype == torch.float16 else unit.round().to(dtype)

    def torch_mix() -> torch.Tensor:
        size = (side, side)
        enlarged = torch.nn.functional.interpolate(torch.from_numpy(coarse)[None], size, mode="bicubic")
        return tensor.mul_(0.7).add_(enlarged, alpha=0.3)

    def formats(dtype: str, kind: torch.dtype, top: float) -> dict[str, Case]:
        out = np.ones((side, side, 3), dtype)
        return {
            "native": lambda: kernels.pixels(out, image[0]),
            "NumPy": lambda: kernels.pixels_numpy(out, image[0]),
            "torch": lambda: torch_pixels(kind, top),
        }

    return {
        "noise": {
            "native": lambda: normal_noise(7, rows=(0, side), cols=(0, side), out=image[0], threads=1),
            "NumPy": lambda: normal_noise_numpy(7, rows=(0, side), cols=(0, side), out=image[0]),
            "torch": tensor.normal_,
        },
        "Euler step": {
            "native": lambda: kernels.euler(image, prediction, None, 1.0, 0.1),
            "NumPy": lambda: kernels.euler_numpy(image, prediction, None, 1.0, 0.1),
            "torch": lambda: torch_euler(positive),
        },
        "Euler step with guidance": {
            "native": lambda: kernels.euler(image, prediction, negative, 2.0, 0.1),
            "NumPy": lambda: kernels.euler_numpy(image, prediction, negative, 2.0, 0.1),
            "torch": lambda: torch_euler(torch.lerp(base, positive, 2.0)),
        },
        "enlarging by 4 and mixing": {
            "native": lambda: kernels.mix_enlarged(image[0], coarse, *tables, 0.7),
            "NumPy": lambda: kernels.mix_enlarged_numpy(image[0], coarse, *tables, 0.7),
            "torch": torch_mix,
        },
        "8 bits": formats("uint8", torch.uint8, 255.0),
        "16 bits": formats("uint16", torch.uint16, 65535.0),
        "float16": formats("float16", torch.float16, 1.0),
        "PNG of 8 bits": {
            "NumPy": lambda: encode_png(pixels),
            "Pillow": lambda: picture.save(io.BytesIO(), "png", compress_level=1),
        },
    }


def _seconds(case: Case) -> float:
    start = time.process_time()
    case()
    return time.process_time() - start


if __name__ == "__main__":
    sys.exit(main())
