"""Measures the frames of a shot: memory over a long run, and what writing beside drawing saves.

    python benchmarks/frames.py soak [BUNDLE]       500 frames in one process: growth of its memory
    python benchmarks/frames.py overlap [BUNDLE]    frames per minute to EXR, written beside the drawing and after it

BUNDLE has a text encoder; `demo/demo-1k.bundle` by default. `soak` fails where memory grows by 2 % or more after the
first 50 frames. `overlap` draws 512 px in turns of both kinds, so that other work on the machine meets both alike, and
fails under a gain of 1.15. Options: `--frames N`, `--size-px N`, `--steps N`, `--suffix .exr`.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from measure import anonymous_bytes

from l2p_runtime import Pipeline
from l2p_runtime.frames.drawing import FrameEvent, draw_frames
from l2p_runtime.frames.names import parse_pattern
from l2p_runtime.frames.ranges import parse_frames
from l2p_runtime.frames.shot import FrameRequest, Shot
from l2p_runtime.images import image_format, write_image

GROWTH_MAX = 0.02
GAIN_MIN = 1.15
WARM_FRAMES = 50
TURNS = 5


def main() -> int:
    """Run one of the two; the exit code is 1 where its goal was missed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("soak", "overlap"))
    parser.add_argument("bundle", nargs="?", default="demo/demo-1k.bundle")
    parser.add_argument("--frames", type=int)
    parser.add_argument("--size-px", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--suffix", default=".exr")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Pipeline.open(options.bundle) as pipe:
        run = _soak if options.what == "soak" else _overlap
        return run(pipe, Path(folder), options)


def _soak(pipe: Pipeline, folder: Path, options: Any) -> int:
    shot = _shot(pipe, folder, options.frames or 500, options.size_px or 128, options.steps or 1, options.suffix)
    samples: list[int] = []

    def tell(event: FrameEvent) -> None:
        if event.state == "written":
            samples.append(anonymous_bytes())

    report = draw_frames(pipe, shot, _writer(shot), tell=tell)
    # Halves of what follows the warm-up: single samples hold an image more or less.
    early, late = np.array_split(samples[WARM_FRAMES:], 2)
    before, after = (statistics.median(part) for part in (early, late))
    growth = after / before - 1
    print(
        f"{report.written} frames, {len(report.failed)} failed; anonymous memory {samples[0] / 2**20:.1f} MiB at first,"
    )
    print(
        f"median {before / 2**20:.1f} MiB to frame {WARM_FRAMES + len(early)}, then {after / 2**20:.1f}: {growth:+.2%}"
    )
    return int(growth >= GROWTH_MAX or bool(report.failed))


def _overlap(pipe: Pipeline, folder: Path, options: Any) -> int:
    shot = _shot(pipe, folder, options.frames or 12, options.size_px or 512, options.steps or 1, options.suffix)
    write = _writer(shot)

    def beside() -> None:
        draw_frames(pipe, shot, write)

    def after() -> None:
        for request in shot:
            draw_frames(pipe, [request], write)

    rates: dict[str, list[float]] = {"beside": [], "after": []}
    beside()
    for _ in range(TURNS):
        for name, draw in (("beside", beside), ("after", after)):
            gc.collect()
            started = time.perf_counter()
            draw()
            rates[name].append(60 * len(shot) / (time.perf_counter() - started))
    for name, found in rates.items():
        spread = f"{min(found):.1f} to {max(found):.1f}"
        print(f"written {name} the drawing: median {statistics.median(found):.1f} frames a minute, {spread}")
    gains = [beside / after for beside, after in zip(rates["beside"], rates["after"], strict=True)]
    print(f"gain: median {statistics.median(gains):.2f}, {min(gains):.2f} to {max(gains):.2f}")
    return int(statistics.median(gains) < GAIN_MIN)


def _shot(pipe: Pipeline, folder: Path, frames: int, size_px: int, steps: int, suffix: str) -> Shot:
    pattern = parse_pattern(folder / f"s.####{suffix}")
    # Encoded here: calls of one frame each would load the text encoder each.
    (embeds,) = pipe.encode(["a red circle"])
    call: dict[str, Any] = {"height": size_px, "width": size_px, "steps": steps, "guidance": 1.0}
    call |= {"prompt_embeds": embeds, "dtype": image_format(pattern.path(1)).dtype}
    return Shot(parse_frames(f"1-{frames}"), pattern, call, seed_per_frame=True)


def _writer(shot: Shot) -> Any:
    form = image_format(shot.pattern.path(1))

    def write(request: FrameRequest, pixels: Any) -> None:
        write_image(request.path, pixels, {"prompt": "a red circle"}, form)

    return write


if __name__ == "__main__":
    raise SystemExit(main())
