"""Demo checkpoints, which `build` uses if none is given: a trained one for 16 and 64 px patches, else a seeded one.

The trained demo is a source and the adapters of two variants, which share one trunk; it is in `data/demo` with a model
card. The seeded demo has the published layout, is untrained and draws noise; tests use it too.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from l2p_export.families.z_image_l2p.dimensions import (
    VARIANTS,
    Dimensions,
    UNetLevel,
    expected_shapes,
    published_dimensions,
)
from l2p_runtime.errors import UsageError
from l2p_runtime.tensorfile import write_tensorfile

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

DEMO = Path(__file__).parents[1] / "data" / "demo"
UNTRAINED = "the demo checkpoint is untrained: its pictures are noise, whatever the prompt"


@dataclass(frozen=True, slots=True)
class DemoModel:
    """Paths of a demo: its checkpoint, the latent source that completes it, and the folder of a text encoder."""

    checkpoint: Path
    source: Path | None = None
    text_encoder: Path | None = None


def demo_model(patch_px: int, scratch: Path) -> DemoModel:
    """The demo for a patch size.

    Args:
        patch_px: side of a patch.
        scratch: folder to write a seeded checkpoint into.

    Raises:
        UsageError: no variant has that patch size.
    """
    if patch_px not in VARIANTS:
        raise UsageError(
            f"there is no demo checkpoint for {patch_px} px patches",
            hint=f"the profile's patch_px must be one of {', '.join(map(str, VARIANTS))}; or give a CHECKPOINT",
        )
    trained = DEMO / f"demo-{VARIANTS[patch_px]}.safetensors"
    if trained.is_file():
        return DemoModel(trained, DEMO / "source", DEMO / "source")
    seeded = scratch / "demo.safetensors"
    write_demo_checkpoint(seeded, patch_px)
    return DemoModel(seeded)


def write_demo_checkpoint(path: Path, patch_px: int) -> None:
    """Write the seeded checkpoint for the patch size of a variant: the same bytes on every machine."""
    shapes = expected_shapes(demo_dimensions(patch_px))
    metadata = {"l2p.trained": "false", "l2p.steps": "4", "l2p.guidance": "1.0", "license": "Apache-2.0"}
    write_tensorfile(path, {name: _values(name, shape) for name, shape in shapes.items()}, metadata)


def demo_dimensions(patch_px: int) -> Dimensions:
    """Dimensions of the demo: width 96, three heads of 32, six layers, a quarter of the published U-Net's channels."""
    published = published_dimensions(VARIANTS[patch_px])
    return replace(
        published,
        width=96,
        head_width=32,
        ffn_width=256,
        caption_width=64,
        time_width=64,
        time_hidden=128,
        layers=6,
        noise_refiners=1,
        context_refiners=1,
        levels=tuple(
            UNetLevel(s.name, _quarter(s.encoder), _quarter(s.up), _quarter(s.decoder)) for s in published.levels
        ),
        bottleneck=_quarter(published.bottleneck),
    )


def _quarter(channels: int) -> int:
    return channels if channels == 3 else max(channels // 4, 8)


def _values(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """One tensor from noise seeded by its name: gains near 1, small biases, weights that keep the variance."""
    import numpy as np

    from l2p_runtime.noise import normal_noise

    count = int(np.prod(shape))
    values = normal_noise(zlib.crc32(name.encode()), channels=1, rows=(0, 1), cols=(0, count)).reshape(shape)
    if len(shape) == 1 and name.endswith("weight"):
        return np.float32(1.0) + np.float32(0.1) * values
    if name.endswith(("bias", "pad_token")):
        return np.float32(0.1) * values
    return values * np.float32(np.sqrt(1.5 / np.prod(shape[1:])))
