"""Draws images with a bundle or a latent source. Both are checked first and loaded only when they draw.

The runtime draws with a bundle, so torch is not imported for it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from l2p_runtime.bundle import open_bundle
from l2p_runtime.contract import MANIFEST_NAME
from l2p_runtime.errors import ArtifactError, HostError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from l2p_runtime.coarse import Coarse
    from l2p_runtime.contract import Grid

    Draw: TypeAlias = Callable[[Sequence[str], Sequence[int]], Iterator[NDArray[np.uint8]]]
    """Prompts and their seeds to images [H,W,3], one at a time and in order."""

SOURCE_STEPS, SOURCE_GUIDANCE = 30, 3.0
"""Defaults for a source, those of `train corpus`; its folder states neither."""

PROMPTS_AT_ONCE = 32
"""Prompts that a bundle's text encoder encodes each time it is loaded."""

_INDEX_NAME = "model_index.json"


@dataclass(frozen=True, slots=True)
class DrawOptions:
    """Options of drawing; None is the model's default.

    Attributes:
        size_px: height and width.
        backend: backend of the runtime, for a bundle.
        plan: precision plan of a bundle.
        store: folder of a bundle's shared files.
        positions: position policy, for a bundle.
        base_grid: trained grid, token rows and columns, for a bundle.
        coarse: how to draw coarse to fine, for a bundle; None to draw at the full size from the start.
    """

    size_px: tuple[int, int] | None = None
    steps: int | None = None
    guidance: float | None = None
    shift: float | None = None
    backend: str = "auto"
    plan: str | None = None
    store: Path | None = None
    positions: str | None = None
    base_grid: Grid | None = None
    coarse: Coarse | None = None


@dataclass(frozen=True, slots=True)
class Drawer:
    """A model that is ready to draw.

    Attributes:
        settings: JSON values that decide its images: the model's digest, size and sampling.
        check: raises UsageError for a prompt that the model cannot read.
        draw: loads the model and draws; the model is closed after the last image.
        note: a remark about the images for the user; may be empty.
    """

    height_px: int
    width_px: int
    settings: Mapping[str, object]
    check: Callable[[str], object]
    draw: Draw
    note: str = ""


def open_drawer(model: Path, options: DrawOptions) -> Drawer:
    """Check that a bundle or a latent source can draw as asked.

    Args:
        model: a bundle, or a pipeline folder that `train source` wrote or that holds a published Z-Image.
        options: how to draw.

    Raises:
        UsageError: neither a bundle nor a pipeline folder, a bundle without a text encoder, or a value that the model
            does not take.
        ArtifactError: the model is damaged.
        HostError: a library that it needs is not installed, or no backend runs here.
    """
    if (model / MANIFEST_NAME).is_file():
        return _bundle_drawer(model, options)
    if (model / _INDEX_NAME).is_file():
        return _source_drawer(model, options)
    raise UsageError(
        f"`{model}` is neither a bundle ({MANIFEST_NAME}) nor a pipeline folder ({_INDEX_NAME})",
        hint="give what `build` or `train source` wrote",
    )


def check_prompts(drawer: Drawer, prompts: Sequence[tuple[str, str]]) -> None:
    """Refuse prompts that a model cannot read, before anything is loaded or written.

    Args:
        drawer: the model.
        prompts: source of each for error messages, and its text.

    Raises:
        UsageError: names the first such prompt.
    """
    for place, text in prompts:
        try:
            drawer.check(text)
        except UsageError as error:
            raise UsageError(f"{place}: {error}", hint="shorten it") from error


def _bundle_drawer(folder: Path, options: DrawOptions) -> Drawer:
    from l2p_runtime.coarse import check_coarse
    from l2p_runtime.networks import open_plan
    from l2p_runtime.requests import check_size, image_request
    from l2p_runtime.text import bundle_tokenizer

    bundle = open_bundle(folder, options.store)
    manifest = bundle.manifest
    if manifest.text is None:
        raise UsageError(
            f"the bundle `{folder}` has no text encoder, so it cannot read prompts",
            hint="build it with one: l2p-export build CHECKPOINT --text-encoder DIR --profile NAME --out BUNDLE",
        )
    profile = manifest.profiles[0]
    height, width = options.size_px or (profile.height_px.opt, profile.width_px.opt)
    sampling: dict[str, float | None] = {
        "steps": options.steps,
        "guidance": options.guidance,
        "shift": options.shift,
    }
    coarse = options.coarse
    model = manifest.model_on(options.base_grid)
    if coarse is not None:
        check_size(model, coarse.height, coarse.width)
        check_coarse(coarse, height, width)
    chosen = image_request(
        manifest,
        prompt="",
        negative_prompt=None,
        prompt_embeds=None,
        negative_embeds=None,
        height=height,
        width=width,
        seed=0,
        sampling=sampling,
        fine_guidance=1.0 if coarse is None else coarse.guidance,
        rng="philox",
        dtype="uint8",
    ).sampling
    opened = open_plan(bundle, options.backend, 0, options.plan)
    opened.backend.device.close()
    tokenizer = bundle_tokenizer(bundle)

    def draw(texts: Sequence[str], seeds: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        from l2p_runtime import Pipeline

        with Pipeline.open(folder, options.backend, plan=opened.plan, store=options.store) as pipe:
            for start in range(0, len(texts), PROMPTS_AT_ONCE):
                *embeds, empty = pipe.encode([*texts[start : start + PROMPTS_AT_ONCE], ""])
                for offset, values in enumerate(embeds):
                    yield pipe.generate(
                        prompt_embeds=values,
                        negative_embeds=empty,
                        height=height,
                        width=width,
                        seed=seeds[start + offset],
                        steps=chosen.steps,
                        guidance=chosen.guidance,
                        shift=chosen.shift,
                        positions=options.positions,
                        base_grid=options.base_grid,
                        coarse=coarse,
                    )

    settings = {
        "model_sha256": bundle.digest,
        "plan": opened.plan,
        **_sampling_settings((height, width), chosen.steps, chosen.guidance, chosen.shift),
        "positions": options.positions or profile.positions,
        "base_grid": list(model.rotary.base_grid),
        "coarse": None if coarse is None else asdict(coarse),
    }
    note = "" if manifest.checkpoint.trained else "the bundle's weights are untrained: its pictures are noise"
    return Drawer(height, width, settings, tokenizer.tokens, draw, note)


def _source_drawer(folder: Path, options: DrawOptions) -> Drawer:
    for_bundles = (options.plan, options.positions, options.base_grid, options.coarse)
    if options.backend != "auto" or any(value is not None for value in for_bundles):
        raise UsageError(
            f"`{folder}` is a pipeline folder, which torch draws; --backend, --plan, --positions, --base-grid and "
            "--coarse are for bundles",
            hint="leave them out",
        )
    try:
        from l2p_export.families.z_image_l2p.latent import LATENT_PATCH
        from l2p_export.training.source.draw import DrawSpec, draw_images, load_artist
        from l2p_export.training.source.folder import folder_digest, open_source
    except ModuleNotFoundError as error:
        raise HostError(
            f"a pipeline folder needs `{error.name}`, which is not installed", hint="pip install 'l2p-export[export]'"
        ) from error

    px_per_latent, default_px = _autoencoder_sizes(folder / "vae" / "config.json")
    height, width = options.size_px or (default_px, default_px)
    side_px = px_per_latent * LATENT_PATCH
    if height % side_px or width % side_px or min(height, width) < side_px:
        raise UsageError(
            f"size {width}x{height} does not divide by {side_px} px, which the tokens of `{folder}` have",
            hint=f"the nearest size that does is {_nearest(width, side_px)}x{_nearest(height, side_px)}",
        )
    source = open_source(folder)
    spec = DrawSpec(
        height,
        width,
        SOURCE_STEPS if options.steps is None else options.steps,
        SOURCE_GUIDANCE if options.guidance is None else options.guidance,
        source.shift if options.shift is None else options.shift,
    )

    def draw(texts: Sequence[str], seeds: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        artist = load_artist(source)
        for start in range(0, len(texts), spec.batch):
            part = slice(start, start + spec.batch)
            yield from draw_images(artist, texts[part], seeds[part], spec)

    settings = {
        "model_sha256": folder_digest(folder),
        **_sampling_settings((height, width), spec.steps, spec.guidance, spec.shift),
    }
    return Drawer(height, width, settings, source.tokenizer.tokens, draw)


def _sampling_settings(size_px: tuple[int, int], steps: int, guidance: float, shift: float) -> dict[str, object]:
    height, width = size_px
    return {"size": f"{width}x{height}", "steps": steps, "guidance": float(guidance), "shift": float(shift)}


def _autoencoder_sizes(path: Path) -> tuple[int, int]:
    """Pixels per latent along a side, and the side of the images that the autoencoder was made for."""
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
        blocks, size = len(config["block_out_channels"]), config.get("sample_size", 0)
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"`{path}` is no autoencoder's configuration: {error}", hint="fetch the folder again"
        ) from error
    if not 1 <= blocks <= 8 or not isinstance(size, int) or not 1 <= size <= 1 << 16:
        raise ArtifactError(
            f"`{path}` has {blocks} block_out_channels and sample_size {size!r}, expected 1 to 8 and a size in pixels"
        )
    return 1 << (blocks - 1), size


def _nearest(size: int, multiple: int) -> int:
    return max(1, round(size / multiple)) * multiple
