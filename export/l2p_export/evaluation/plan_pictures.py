"""Compares the pictures of precision plans with those of the float32 plan, or of the first plan, and judges them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from l2p_calib.ledger import END_TO_END, psnr_db
from l2p_export.evaluation.drawers import Drawer, DrawOptions, open_drawer
from l2p_export.evaluation.scores import Prompt, world_prompts
from l2p_export.world.judge import judge, require_judge
from l2p_runtime.contract import Comparison, LedgerEntry, pictures_comparison
from l2p_runtime.errors import UnsupportedError, UsageError
from l2p_runtime.networks import open_plan, runnable_plans

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from l2p_runtime.bundle import Bundle
    from l2p_runtime.progress import Reporter

SCORE_KEPT = 0.98
"""Minimum share of the pictures right under the first plan that must stay right; one picture may always be lost."""


@dataclass(frozen=True, slots=True)
class PictureJob:
    """Pictures to draw and compare.

    Attributes:
        backend: name of the backend that draws all of them.
        first: the plan that others are compared with.
        others: plans that are compared with it.
        count: pictures of each plan.
        size_px: height and width; None for the model's preferred size.
    """

    backend: str
    first: str
    others: tuple[str, ...]
    count: int
    size_px: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class PictureComparison:
    """Scores of the pictures under one plan.

    Attributes:
        right: pictures that show their prompts.
        right_first: pictures of the first plan that show their prompts.
        psnr_db: of each picture, against the first plan's.
    """

    right: int
    right_first: int
    psnr_db: tuple[float, ...]


def check_pictures(
    bundle: Bundle, backend: str, plan: str | None, count: int, size_px: tuple[int, int] | None
) -> PictureJob:
    """Check what can be compared, without drawing.

    Args:
        bundle: the bundle.
        backend: a backend by name, or `auto`.
        plan: compare only this plan with the first; None for all plans that the backend has files for.
        count: number of captions; each plan draws one picture of each.
        size_px: height and width; None for the model's preferred size.

    Raises:
        UsageError: no text encoder, no such plan, no other plan, or a size that the model does not take.
        HostError: scikit-image is not installed, or no backend runs here.
    """
    require_judge()
    opened = open_plan(bundle, backend, 0, plan).backend
    names = runnable_plans(bundle, opened)
    opened.device.close()
    first = next((name for name in names if bundle.manifest.plan(name).base == "fp32"), names[0])
    others = tuple(name for name in names if name != first and plan in (None, name))
    if not others:
        raise UsageError(
            f"pictures are compared with those of plan `{first}`, and no other is asked for",
            hint="leave --pictures out, or name another --plan that the bundle has",
        )
    found = PictureJob(opened.name, first, others, count, size_px)
    _drawer(bundle, found, first)
    return found


def compare_pictures(bundle: Bundle, asked: PictureJob, reporter: Reporter) -> list[LedgerEntry]:
    """Draw held-out captions of the small world under each plan, with the same seeds, and judge them.

    The first plan's pictures stay in memory; a picture of another plan stays until it is compared. Plans that the
    backend does not run are listed as not run.

    Args:
        bundle: a bundle with a text encoder.
        asked: the job from `check_pictures`.
        reporter: gets the number of pictures.

    Returns:
        One entry per plan other than the first.
    """
    prompts = world_prompts(asked.count, 0, held_out=True)

    def drawn(name: str) -> Iterator[NDArray[np.uint8]]:
        drawer = _drawer(bundle, asked, name)
        with reporter.task(f"pictures under {name}", asked.count, "images") as advance:
            for image in drawer.draw([prompt.text for prompt in prompts], [prompt.seed for prompt in prompts]):
                yield image
                advance(1)

    drawer = _drawer(bundle, asked, asked.first)
    case = f"{drawer.width_px}x{drawer.height_px}"
    comparisons = {name: pictures_comparison(asked.first, name) for name in asked.others}
    try:
        exact = tuple(drawn(asked.first))
    except UnsupportedError as error:
        return [LedgerEntry(item, END_TO_END, case, "not run", str(error)) for item in comparisons.values()]
    right_first = sum(_is_right(*pair) for pair in zip(exact, prompts, strict=True))
    entries = []
    for name, comparison in comparisons.items():
        try:
            found = [
                (_is_right(image, prompt), _psnr_db(image, wanted))
                for image, prompt, wanted in zip(drawn(name), prompts, exact, strict=True)
            ]
        except UnsupportedError as error:
            entries.append(LedgerEntry(comparison, END_TO_END, case, "not run", str(error)))
            continue
        right, decibels = zip(*found, strict=True)
        entries.append(entry_of(comparison, case, PictureComparison(sum(right), right_first, decibels)))
    return entries


def entry_of(comparison: Comparison, case: str, shown: PictureComparison) -> LedgerEntry:
    """Ledger entry of one plan: passed if nearly as many pictures are right as under the first plan."""
    decibels = sorted(shown.psnr_db)
    lost = shown.right_first - shown.right
    return LedgerEntry(
        comparison=comparison,
        network=END_TO_END,
        case=case,
        status="passed" if lost <= max(1.0, (1 - SCORE_KEPT) * shown.right_first) else "failed",
        reason=f"{shown.right} of {len(decibels)} right by the judge, where {shown.right_first} were; at least "
        f"{decibels[0]:.1f} dB, half of them {decibels[len(decibels) // 2]:.1f} dB or more",
        psnr_db=decibels[0],
    )


def _drawer(bundle: Bundle, asked: PictureJob, plan: str) -> Drawer:
    return open_drawer(bundle.root, DrawOptions(asked.size_px, backend=asked.backend, plan=plan, store=bundle.store))


def _is_right(image: NDArray[np.uint8], prompt: Prompt) -> bool:
    return judge(image, prompt.description).passed


def _psnr_db(found: NDArray[np.uint8], wanted: NDArray[np.uint8]) -> float:
    return psnr_db(found.astype("float64") - wanted, 255.0)
