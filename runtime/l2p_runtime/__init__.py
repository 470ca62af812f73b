"""Lean runtime of l2p-export: opens a bundle and draws, without torch or onnx.

    from l2p_runtime import Pipeline, write_png

    with Pipeline.open("bundle") as pipe:
        image = pipe.generate(prompt_embeds=embeds, height=1024, width=1024, seed=7)
    write_png("picture.png", image)

Importing this package loads nothing but the standard library; `Pipeline` loads NumPy when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from l2p_runtime.errors import (
    ArtifactError,
    CancelledError,
    FramesError,
    HostError,
    InternalError,
    L2PError,
    ParityError,
    UsageError,
)

if TYPE_CHECKING:
    from l2p_runtime.coarse import Coarse as Coarse
    from l2p_runtime.images.png import write_png as write_png
    from l2p_runtime.pipeline import Pipeline as Pipeline
    from l2p_runtime.policies import TimeDependent as TimeDependent

__version__ = "0.1.0"

__all__ = [
    "ArtifactError",
    "CancelledError",
    "Coarse",
    "FramesError",
    "HostError",
    "InternalError",
    "L2PError",
    "ParityError",
    "Pipeline",
    "TimeDependent",
    "UsageError",
    "__version__",
    "write_png",
]


def __getattr__(name: str) -> Any:
    if name == "Pipeline":
        from l2p_runtime.pipeline import Pipeline

        return Pipeline
    if name == "Coarse":
        from l2p_runtime.coarse import Coarse

        return Coarse
    if name == "TimeDependent":
        from l2p_runtime.policies import TimeDependent

        return TimeDependent
    if name == "write_png":
        from l2p_runtime.images.png import write_png

        return write_png
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
