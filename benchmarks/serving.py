"""Latency that a Triton server adds to the pipeline: one image over shared memory, gRPC and HTTP.

Run `python benchmarks/serving.py BUNDLE [--size 4096x4096] [--images 3] [--way shared] [--made-up]`; it starts a real
server on this machine and prints a Markdown table. `draw` is the pipeline's time as the server reports it. `added` is
the time that the client waited beyond it. The last column compares the server's metric of time in the model
(`nv_inference_compute_infer_duration_us`) with `draw`. With `--made-up`, models return stored noise instead of drawing:
the added time is the same, and a run measures more images.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from l2p_export.cli.console import parse_size
from l2p_export.serving.configs import Placement
from l2p_export.serving.repository import RepositorySpec, write_repository
from l2p_runtime.bundle import open_bundle
from l2p_runtime.client import Client
from l2p_runtime.progress import Silent
from tools.triton_server import Server, serve

MODEL = "l2p_embeddings"
WAYS = {"shared": "gRPC, shared memory", "grpc": "gRPC", "http": "HTTP"}
COUNTED_SECONDS = 0.3
"""Wait before reading metrics: the server counts a request after its response."""
BUSY = "nv_inference_compute_infer_duration_us"

MADE_UP = """
from l2p_runtime.serving import Drawn

def _made_up(service, values, **_):
    started, size = time.perf_counter(), (int(values["height"]), int(values["width"]), 3)
    if size not in _known:
        _known[size] = np.random.default_rng(7).integers(0, 256, size, np.uint8)
    pixels = _known[size].copy()
    report = {"width": size[1], "height": size[0], "seconds": {"text": 0.0, "draw": time.perf_counter() - started}}
    return Drawn(pixels, report, {})

_known = {}
Service.draw = _made_up
"""


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--size", default="4096x4096", help="WIDTHxHEIGHT")
    parser.add_argument("--images", type=int, default=3, help="timed images per transport, after one warm-up")
    parser.add_argument("--way", choices=WAYS, action="append", help="only this transport; repeatable")
    parser.add_argument("--made-up", action="store_true", help="return stored noise instead of drawing")
    options = parser.parse_args()
    height, width = parse_size(options.size)
    bundle = open_bundle(options.bundle)
    embeds = np.random.default_rng(7).standard_normal((8, bundle.manifest.model.caption_width)).astype(np.float32)
    asked = {"prompt_embeds": embeds, "height": height, "width": width, "steps": 1, "guidance": 1.0}
    print(
        f"| {width} x {height} uint8 | wait s | draw s | added ms, minimum | median | server's metric beyond draw, ms |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as work:
        repository = Path(work) / "repository"
        spec = RepositorySpec(models=(MODEL,), pixels=height * width, placement=Placement("cpu"))
        write_repository(bundle, repository, spec, Silent())
        if options.made_up:
            with (repository / MODEL / "1" / "glue.py").open("a") as glue:
                glue.write(MADE_UP)
        with serve(repository, Path(work)) as server:
            reason = server.load(MODEL)
            if reason:
                print(reason, file=sys.stderr)
                return 3
            for way in options.way or WAYS:
                url = server.http if way == "http" else server.grpc
                _print_row(WAYS[way], server, url, shared=way == "shared", images=options.images, asked=asked)
    copies = [_copy_ms(height, width) for _ in range(10)]
    print(f"\nOne copy of such an image takes {min(copies):.0f} ms (minimum), {np.median(copies):.0f} ms (median).")
    return 0


def _print_row(way: str, server: Server, url: str, *, shared: bool, images: int, asked: dict[str, Any]) -> None:
    rows = []
    with Client.open(url, shared_memory=shared) as client:
        for _ in range(images + 1):
            busy = server.metric(BUSY, model=MODEL)
            started = time.perf_counter()
            reply = client.generate(**asked)
            wait = time.perf_counter() - started
            time.sleep(COUNTED_SECONDS)
            counted = (server.metric(BUSY, model=MODEL) - busy) / 1e6
            draw = sum(reply.report["seconds"][stage] for stage in ("text", "draw"))
            rows.append((wait, draw, (wait - draw) * 1e3, (counted - draw) * 1e3))
    wait, draw, added, beyond = np.median(rows[1:], axis=0)
    least = min(row[2] for row in rows[1:])
    print(f"| {way} | {wait:.2f} | {draw:.2f} | {least:.0f} | {added:.0f} | {beyond:.0f} |", flush=True)


def _copy_ms(height: int, width: int) -> float:
    source, target = np.ones((2, height, width, 3), np.uint8)
    started = time.perf_counter()
    target[...] = source
    return (time.perf_counter() - started) * 1e3


if __name__ == "__main__":
    sys.exit(main())
