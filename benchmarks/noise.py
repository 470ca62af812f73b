"""Times the noise of one 4096 x 4096 image: the native kernel with one and two threads, and NumPy.

Run `python benchmarks/noise.py`; it prints a Markdown table of the minimum of three runs each.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from l2p_runtime.native import native_status
from l2p_runtime.noise import normal_noise, normal_noise_numpy

if TYPE_CHECKING:
    from collections.abc import Callable

SIDE = 4096
RUNS = 3


def main() -> int:
    """Print the table."""
    # Written once before timing, so that page faults are not timed.
    out = np.zeros((3, SIDE, SIDE), np.float32)
    out.fill(1)
    window: dict[str, Any] = {"rows": (0, SIDE), "cols": (0, SIDE), "out": out}
    cases: dict[str, Callable[..., object]] = {"NumPy": partial(normal_noise_numpy, 7, **window)}
    status = native_status()
    if status.available:
        cases = {f"native, threads {n}": partial(normal_noise, 7, threads=n, **window) for n in (1, 2)} | cases
    else:
        print(f"no native kernel: {status.reason}\n")
    print(f"| {SIDE} x {SIDE} x 3 | seconds | ns per value |\n| --- | ---: | ---: |")
    for name, call in cases.items():
        seconds = min(_seconds(call) for _ in range(RUNS))
        print(f"| {name} | {seconds:.3f} | {seconds / out.size * 1e9:.1f} |")
    return 0


def _seconds(call: Callable[..., object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
