"""Measures the image writers: CPU seconds, file size, and memory beside the pixels.

    python benchmarks/image_writers.py [SIDE_PX ...]

The pixels are a photograph's stand-in: gradients, edges and noise. Each file is written in a process of its own.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from measure import anonymous_bytes

from l2p_runtime.images import image_format, write_image

FORMATS = (
    ("x.png", "8", None),
    ("x.png", "16", None),
    ("x.tif", "8", None),
    ("x.tif", "16", None),
    ("x.exr", "half", "zip"),
    ("x.exr", "half", "piz"),
    ("x.exr", "half", "dwaa"),
    ("x.exr", "float", "zip"),
)


def main() -> None:
    """Print a table."""
    print("| format | side, px | CPU s | MB | MiB beside the pixels |\n| --- | --- | --- | --- | --- |")
    for side_px in map(int, sys.argv[1:] or ("4096", "8192")):
        for name, bits, compression in FORMATS:
            command = [sys.executable, __file__, "--write", str(side_px), name, bits, compression or ""]
            print(subprocess.run(command, capture_output=True, text=True, check=True).stdout, end="", flush=True)


def _write(side_px: int, name: str, bits: str, compression: str | None) -> None:
    form = image_format(name, bits=bits, compression=compression)
    pixels = _photograph(side_px, form.dtype)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        write_image(Path(folder, f"first-{name}"), pixels[:64], {}, form)
        before, peak, done = anonymous_bytes(), [0], threading.Event()

        def watch() -> None:
            while not done.wait(0.002):
                peak[0] = max(peak[0], anonymous_bytes())

        thread = threading.Thread(target=watch)
        thread.start()
        seconds = time.process_time()
        write_image(path, pixels, {"prompt": "a photograph"}, form)
        seconds = time.process_time() - seconds
        done.set()
        thread.join()
        size_mb = path.stat().st_size / 1e6
        extra = max(peak[0] - before, 0) / 2**20
        told = f"{form.kind} {bits} {form.compression}"
        print(f"| {told} | {side_px} | {seconds:.2f} | {size_mb:.1f} | {extra:.0f} |")


def _photograph(side_px: int, dtype: str) -> np.ndarray[tuple[int, ...], np.dtype[np.uint16]]:
    rng, top = np.random.default_rng(0), np.iinfo(dtype).max
    out = np.empty((side_px, side_px, 3), dtype)
    across = np.linspace(0, 1, side_px, dtype=np.float32)
    for first in range(0, side_px, 256):
        rows = np.linspace(first, first + 256, 256, endpoint=False, dtype=np.float32)[:, None] / side_px
        base = 0.2 + 0.3 * across + 0.3 * rows + 0.1 * ((across * 40).astype(int) % 2) * ((rows * 30).astype(int) % 2)
        noise = rng.standard_normal((256, side_px, 3), dtype=np.float32) * 0.006
        out[first : first + 256] = np.clip((base[..., None] + noise) * top, 0, top)
    return out


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"]:
        _write(int(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5] or None)
    else:
        main()
