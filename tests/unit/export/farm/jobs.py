"""A job that the tests of all managers write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from l2p_export.farm import Argument, CueOptions, DrawJob, Needs
from l2p_runtime.frames.ranges import parse_frames

ODD_PROMPT = 'a "red" {{Param.Frames}} circle\'s }} left\nof ü 😀 $HOME `x` \\n --x  '


def make_job(prompt: str = "a red circle", frames: str = "1-40x2", **changes: Any) -> DrawJob:
    """A job on the CPU; a keyword replaces a field."""
    fields: dict[str, Any] = {
        "name": "sh010_draw",
        "program": "l2p-export",
        "bundle": Path("/shows/a show/demo.bundle"),
        "frames": parse_frames(frames),
        "chunk": 4,
        "folder": Path("/jobs/sh 010/frames"),
        "pattern": "shot.####.exr",
        "arguments": (
            Argument("--prompt", prompt, "text"),
            Argument("--steps", "4", "word"),
            Argument("--skip-existing", "", "flag"),
            Argument("--negative-embeddings", "/shows/negative.npy", "file"),
        ),
        "needs": Needs(123_456_789, 0, 2),
        "cue": CueOptions("show", "sh010", "artist", 1000, "l2p", ("gpu", "big")),
    }
    return DrawJob(**{**fields, **changes})
