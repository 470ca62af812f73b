"""Measures whether `Pipeline` keeps its memory budget: the peak over what the process held before, per size and budget.

    python benchmarks/memory_budget.py [BUNDLE]

BUNDLE is one of a 4k model, `demo/demo-4k.bundle` by default. Each image is drawn in a process of its own, with
guidance and two steps. A budget that is too small must be refused, with the least that is enough; the image is drawn
with that one too. It fails where a peak is more than 5 % over its budget.
"""

from __future__ import annotations

import re
import subprocess
import sys
import threading

from measure import anonymous_bytes

CASES = (
    (256, "72MiB"),
    (512, "80MiB"),
    (512, "120MiB"),
    (512, "160MiB"),
    (1024, "200MiB"),
    (1024, "300MiB"),
    (1024, "450MiB"),
    (2048, "500MiB"),
    (2048, "560MiB"),
    (2048, "1GiB"),
)
"""Pixels of a side, and the budget."""

OVER_MAX = 1.05
_REFUSED = re.compile(r"to ([0-9,]+) bytes or more")


def main() -> int:
    """Draw every case; the exit code is 1 where a budget was not kept."""
    bundle = sys.argv[1] if len(sys.argv) > 1 else "demo/demo-4k.bundle"
    print("| size, px | budget, MiB | peak, MiB | share |\n| --- | --- | --- | --- |")
    return max(_case(bundle, size_px, budget) for size_px, budget in CASES)


def _case(bundle: str, size_px: int, budget: str) -> int:
    command = [sys.executable, __file__, "--draw", bundle, str(size_px), budget]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split(maxsplit=2)
    if told[0] == "refused":
        least = _REFUSED.search(told[2])
        if least is None:
            print(f"| {size_px} | {budget} | refused without the least: {told[2]} | |")
            return 1
        print(f"| {size_px} | {budget} | refused: {least[1]} bytes are the least | |")
        return _case(bundle, size_px, least[1].replace(",", ""))
    peak_bytes, budget_bytes = int(told[0]), int(told[1])
    share = peak_bytes / budget_bytes
    print(f"| {size_px} | {budget_bytes / 2**20:.0f} | {peak_bytes / 2**20:.0f} | {share:.0%} |", flush=True)
    return int(share > OVER_MAX)


def _draw(bundle: str, size_px: int, budget: str) -> None:
    """Print the peak and the budget in bytes; or that it is refused, and the hint."""
    import numpy as np

    from l2p_runtime import HostError, Pipeline
    from l2p_runtime.memory import parse_bytes

    np.zeros(1)
    before, peak, done = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        with Pipeline.open(bundle, memory_budget=budget) as pipe:
            pipe.generate("a red circle", height=size_px, width=size_px, steps=2, guidance=2.0)
    except HostError as error:
        print(f"refused - {error.hint}")
        return
    finally:
        done.set()
        thread.join()
    print(peak[0] - before, parse_bytes(budget))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--draw"]:
        _draw(sys.argv[2], int(sys.argv[3]), sys.argv[4])
    else:
        sys.exit(main())
