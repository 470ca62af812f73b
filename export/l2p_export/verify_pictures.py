"""What precision plans do to pictures: those of each plan beside the float32 plan's, or the first's, and a judge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from l2p_calib.ledger import END_TO_END, EQUAL_PSNR_DB
from l2p_export.training.evaluation.drawers import DrawOptions, open_drawer
from l2p_export.training.evaluation.scores import Prompt, world_prompts
from l2p_export.training.world.judge import judge, require_judge
from l2p_runtime.contract import LedgerEntry
from l2p_runtime.errors import UsageError
from l2p_runtime.networks import open_for, runnable_plans

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from l2p_export.progress import Reporter
    from l2p_runtime.bundle import Bundle

FLOAT32 = "fp32"
"""The plan that others are compared with where a bundle has it."""

SCORE_KEPT = 0.98
"""Of the pictures that are right under the first plan (issue 7); one of few may fall to the other side of a bound."""


@dataclass(frozen=True, slots=True)
class Pictures:
    """What was drawn under one plan.

    Attributes:
        images: uint8 [H,W,3], one a prompt.
        right: how many of them show their prompts.
    """

    images: tuple[NDArray[np.uint8], ...]
    right: int


def plans_of_pictures(
    bundle: Bundle, backend: str, plan: str | None, size_px: tuple[int, int] | None
) -> tuple[str, ...]:
    """The plan whose pictures others are compared with, and those others; draws nothing.

    Args:
        bundle: the bundle.
        backend: a backend by name, or `auto`.
        plan: only this one, beside the plan it is compared with; None for all that the backend has files for.
        size_px: as of `compare_pictures`.

    Raises:
        UsageError: no text encoder, no such plan, no other plan, or a size that the model does not take.
        HostError: scikit-image is not installed, or no backend runs here.
    """
    require_judge()
    names = runnable_plans(bundle.manifest, open_for(bundle, backend, 0, plan)[0])
    first = FLOAT32 if FLOAT32 in names else names[0]
    others = [name for name in names if name != first and plan in (None, name)]
    if not others:
        raise UsageError(
            f"pictures are compared with those of plan `{first}`, and there is no other", hint="leave --pictures out"
        )
    for name in (first, *others):
        open_drawer(bundle.root, DrawOptions(size_px, backend=backend, plan=name, store=bundle.store))
    return (first, *others)


def compare_pictures(
    bundle: Bundle, backend: str, plans: Sequence[str], count: int, size_px: tuple[int, int] | None, reporter: Reporter
) -> list[LedgerEntry]:
    """Draw held-out captions of the small world under each plan, with the same seeds, and judge them.

    Args:
        bundle: with a text encoder.
        backend: a backend by name, or `auto`.
        plans: of `plans_of_pictures`.
        count: captions, one picture each.
        size_px: height and width; None for the model's preferred size.
        reporter: shows the pictures.
    """
    prompts = world_prompts(count, 0, held_out=True)

    def drawn(name: str) -> Pictures:
        options = DrawOptions(size_px, backend=backend, plan=name, store=bundle.store)
        drawer = open_drawer(bundle.root, options)
        images = []
        with reporter.stage(f"pictures under {name}", count, "images") as advance:
            for image in drawer.draw([prompt.text for prompt in prompts], [prompt.seed for prompt in prompts]):
                images.append(image)
                advance(1)
        return Pictures(tuple(images), _right(images, prompts))

    first, *others = plans
    exact = drawn(first)
    return [compared(first, exact, name, drawn(name)) for name in others]


def compared(first: str, exact: Pictures, name: str, found: Pictures) -> LedgerEntry:
    """The entry of plan `name`: passed where nearly as many pictures are right as under plan `first`."""
    decibels = sorted(map(_psnr_db, found.images, exact.images))
    lost = exact.right - found.right
    height, width = exact.images[0].shape[:2]
    return LedgerEntry(
        stage=f"{first} pictures -> {name} pictures",
        network=END_TO_END,
        case=f"{width}x{height}",
        status="passed" if lost <= max(1.0, (1 - SCORE_KEPT) * exact.right) else "failed",
        reason=f"{found.right} of {len(found.images)} right by the judge, {exact.right} under {first}; at least "
        f"{decibels[0]:.1f} dB, half of them {decibels[len(decibels) // 2]:.1f} dB or more",
        psnr_db=decibels[0],
    )


def _right(images: Sequence[NDArray[np.uint8]], prompts: Sequence[Prompt]) -> int:
    return sum(judge(image, prompt.description).passed for image, prompt in zip(images, prompts, strict=True))


def _psnr_db(found: NDArray[np.uint8], wanted: NDArray[np.uint8]) -> float:
    import numpy as np

    error = float(np.square(found.astype(np.float64) - wanted).mean())
    return 10.0 * math.log10(255.0**2 / error) if error else EQUAL_PSNR_DB
