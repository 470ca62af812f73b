"""Peak anonymous memory and seconds of `l2p-export import` on a sparse checkpoint of 2 GB. Goal: under 300 MB.

Anonymous memory is not backed by files. Mapped pages of the checkpoint do not count, because the kernel can drop them.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from measure import run_measured

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
    measured = run_measured(command)
    print(
        f"{what}: {out.stat().st_size / 1e9:.2f} GB in {measured.whole.seconds:.1f} s, "
        f"peak anonymous {measured.whole.peak_bytes / 1e6:.0f} MB, exit code {measured.code}"
    )


def _write_sparse(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    header, places = header_bytes([(name, "F32", shape) for name, shape in shapes.items()])
    with path.open("wb") as file:
        file.write(header)
        file.truncate(max(info.offset + info.size_bytes for info in places.values()))
    return path


if __name__ == "__main__":
    main()
