"""Peak anonymous memory and seconds of `l2p-export import` on a sparse checkpoint of 2 GB. Goal: under 300 MB.

Anonymous memory is what the process itself holds; mapped pages of the checkpoint can be dropped by the kernel at any
time and do not count.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from l2p_export.families.z_image_l2p.dimensions import expected_shapes, published_dimensions
from l2p_runtime.tensorfile import header_bytes


def main() -> None:
    """Print bytes, seconds and the peak."""
    dimensions = replace(published_dimensions("4k"), layers=1, noise_refiners=1, context_refiners=1)
    shapes = expected_shapes(dimensions)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = _write_sparse(folder / "whole.safetensors", shapes)
        _report("merged file", [whole], folder / "out.safetensors")


def _report(what: str, arguments: list[Path], out: Path) -> None:
    command = [sys.executable, "-m", "l2p_export", "import", *map(str, arguments), "--out", str(out), "--quiet"]
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        peak = 0
        while process.poll() is None:
            peak = max(peak, _anonymous_bytes(process.pid))
            time.sleep(0.005)
    seconds = time.perf_counter() - started
    print(
        f"{what}: {out.stat().st_size / 1e9:.2f} GB in {seconds:.1f} s, "
        f"peak anonymous {peak / 1e6:.0f} MB, exit code {process.returncode}"
    )


def _anonymous_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return 0
    match = re.search(r"RssAnon:\s+(\d+) kB", status)
    return int(match[1]) * 1024 if match else 0


def _write_sparse(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    header, places = header_bytes([(name, "F32", shape) for name, shape in shapes.items()])
    with path.open("wb") as file:
        file.write(header)
        file.truncate(max(info.offset + info.size_bytes for info in places.values()))
    return path


if __name__ == "__main__":
    main()
