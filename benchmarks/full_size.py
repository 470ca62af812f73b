"""Builds BF16 and FP16 ONNX graphs of a sparse, zero-filled checkpoint with the published 4k header.

Prints seconds and peak anonymous memory of every stage, the bytes written, and the same for a second build with
nothing to do. Goals: 2 GiB in all, 60 s and 1 GiB for tracing, 2 s for a build with nothing to do. Needs 26 GB of disk
in FOLDER, or in a temporary folder; the files are removed at the end.

    python benchmarks/full_size.py [FOLDER]
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from measure import Figures, Measured, run_measured

from l2p_export.families.z_image_l2p.dimensions import expected_shapes, published_dimensions
from l2p_runtime.tensorfile import header_bytes

VARIANT = "4k"


def main() -> None:
    """Build twice and print seconds and memory."""
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as name:
        checkpoint = write_sparse(Path(name) / "l2p_4k_sft.safetensors")
        out = Path(name) / "full.bundle"
        command = [sys.executable, "-m", "l2p_export", "build", str(checkpoint), "--profile", VARIANT]
        command += ["--precision", "bf16", "--precision", "fp16", "--backend", "onnx", "--out", str(out)]
        built = run_measured(command)
        _print(built)
        if built.code == 0:
            written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
            print(f"\nbundle: {written / 1e9:.2f} GB in {len(list((out / 'graphs').iterdir()))} graph files")
            again = run_measured(command)
            print(f"again: {again.whole.seconds:.2f} s, {again.whole.peak_bytes / 2**20:.0f} MiB, {again.stderr[-1:]}")
        shutil.rmtree(out, ignore_errors=True)


def write_sparse(path: Path) -> Path:
    """Write the published header and a hole of zeros: layers 5 to 24 in F32, the rest in BF16.

    Source: docs/model.md, "Checkpoints".
    """
    dimensions = published_dimensions(VARIANT)
    trunk = tuple(f"layers.{index}." for index in dimensions.trunk)
    shapes = expected_shapes(dimensions)
    header, places = header_bytes([(n, "F32" if n.startswith(trunk) else "BF16", s) for n, s in shapes.items()])
    with path.open("wb") as file:
        file.write(header)
        file.truncate(max(info.offset + info.size_bytes for info in places.values()))
    return path


def _print(built: Measured) -> None:
    print("| stage | seconds | peak anonymous MiB |\n| --- | --- | --- |")
    for title, figures in built.stages.items():
        print(_row(title, figures))
    traced = [figures for title, figures in built.stages.items() if title.startswith("tracing")]
    seconds, peak = sum(item.seconds for item in traced), max((item.peak_bytes for item in traced), default=0)
    print(_row("**all tracing**", Figures(seconds, peak)))
    print(_row(f"**whole build, exit code {built.code}**", built.whole))
    if built.code:
        print("\n".join(built.stderr[-5:]))


def _row(title: str, figures: Figures) -> str:
    return f"| {title} | {figures.seconds:.1f} | {figures.peak_bytes / 2**20:.0f} |"


if __name__ == "__main__":
    main()
