"""Times the import of the runtime and `--help` in fresh processes. Goals: 0.10 and 0.15 s."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

RUNS = 9


def main() -> None:
    """Print the median and the spread of each."""
    cases = {
        "import l2p_runtime": [sys.executable, "-c", "import l2p_runtime"],
        "l2p-export --help": [sys.executable, "-m", "l2p_export", "--help"],
        "python -c pass": [sys.executable, "-c", "pass"],
    }
    for name, command in cases.items():
        seconds = sorted(_seconds(command) for _ in range(RUNS + 1))[:RUNS]
        print(f"{name:<20} median {statistics.median(seconds):.3f} s, {seconds[0]:.3f} to {seconds[-1]:.3f} s")


def _seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
