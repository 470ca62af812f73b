"""Draws the frames of a shot in one process: networks are loaded once, a frame is written while the next is drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

from l2p_runtime.arguments import whole_number
from l2p_runtime.errors import CancelledError, HostError, L2PError
from l2p_runtime.frames.embeddings import Embeddings, with_embeddings
from l2p_runtime.frames.shot import FrameRequest

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from l2p_runtime.pipeline import Pipeline

Write: TypeAlias = "Callable[[FrameRequest, NDArray[Any]], None]"
"""Writes pixels [H,W,3] of a frame, whole or not at all; called in a thread of its own, one call at a time."""

RETRIES_MAX = 100

State = Literal["drawing", "written", "skipped", "failed"]
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, eq=False)
class FrameEvent:
    """Something that happened to a frame.

    Attributes:
        steps: how many are done, and of how many; while it is drawn.
        error: why it failed.
    """

    frame: int
    path: Path
    state: State
    steps: tuple[int, int] = (0, 0)
    error: L2PError | None = None


@dataclass(frozen=True, slots=True)
class FrameReport:
    """What came of the frames.

    Attributes:
        written: number of frames that were drawn and written.
        skipped: number of frames that were there.
        failed: those that were not written, in order.
    """

    written: int
    skipped: int
    failed: tuple[int, ...]


def draw_frames(
    pipe: Pipeline,
    requests: Iterable[FrameRequest],
    write: Write,
    *,
    is_there: Callable[[FrameRequest], bool] = lambda request: False,
    retries: int = 0,
    tell: Callable[[FrameEvent], None] = lambda event: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> FrameReport:
    """Draw frames in order, and write each while the next is drawn. At most two images are in memory.

    A frame that cannot be drawn or written has failed, and the others go on. A frame has the bits that
    `Pipeline.generate` draws for its call by itself.

    Args:
        pipe: the pipeline.
        requests: the frames, taken as they are needed; up to 64 are looked ahead.
        write: writes a frame.
        is_there: true for a frame that need not be drawn.
        retries: how many times a frame is tried again after it failed.
        tell: receives what happens to each frame, in the caller's thread.
        cancelled: called between networks and stripes; true stops. A frame that is being written is finished.

    Raises:
        UsageError: retries out of range.
        CancelledError: `cancelled` said so.
    """
    retries = whole_number("retries", retries, 0, RETRIES_MAX)
    tally = _Tally(tell)

    def attempt(work: Callable[[], Result]) -> Result | L2PError:
        return _tried(retries, work, cancelled)

    def draw(request: FrameRequest, embeds: Embeddings) -> NDArray[Any]:
        def progress(done: int, steps: int) -> None:
            tell(FrameEvent(request.frame, request.path, "drawing", (done, steps)))

        captions = {"prompt_embeds": embeds[0], "negative_embeds": embeds[1] if len(embeds) > 1 else None}
        return pipe.generate(**{**request.call, **captions}, progress=progress, cancelled=cancelled)

    absent = _absent(requests, is_there, cancelled, tally)
    writing: tuple[FrameRequest, Future[L2PError | None]] | None = None
    with ThreadPoolExecutor(1, "frame-writer") as writer:
        for request, embeds in with_embeddings(pipe, absent, attempt):
            pixels = embeds if isinstance(embeds, L2PError) else attempt(partial(draw, request, embeds))
            tally.finish(writing)
            writing = None
            if isinstance(pixels, L2PError):
                tally.settle(request, "failed", pixels)
            else:
                writing = request, writer.submit(_tried, retries, partial(write, request, pixels))
            # Only the writer holds the image while the next is drawn.
            del pixels
        tally.finish(writing)
    return FrameReport(tally.written, tally.skipped, tuple(tally.failed))


@dataclass(slots=True)
class _Tally:
    """Counts what came of frames, and tells it."""

    tell: Callable[[FrameEvent], None]
    written: int = 0
    skipped: int = 0
    failed: list[int] = field(default_factory=list)

    def settle(self, request: FrameRequest, state: State, error: L2PError | None = None) -> None:
        """Nothing more happens to a frame."""
        if state == "failed":
            self.failed.append(request.frame)
        else:
            self.written += state == "written"
            self.skipped += state == "skipped"
        self.tell(FrameEvent(request.frame, request.path, state, error=error))

    def finish(self, writing: tuple[FrameRequest, Future[L2PError | None]] | None) -> None:
        """Wait for a frame that is being written."""
        if writing is not None:
            error = writing[1].result()
            self.settle(writing[0], "failed" if error else "written", error)


def _absent(
    requests: Iterable[FrameRequest],
    is_there: Callable[[FrameRequest], bool],
    cancelled: Callable[[], bool],
    tally: _Tally,
) -> Iterator[FrameRequest]:
    """The frames that are to be drawn."""
    for request in requests:
        _go_on(cancelled)
        if is_there(request):
            tally.settle(request, "skipped")
        else:
            yield request


def _tried(
    retries: int, work: Callable[[], Result], cancelled: Callable[[], bool] = lambda: False
) -> Result | L2PError:
    """What a function returns, or why it failed the last time."""
    while True:
        try:
            return work()
        except CancelledError:
            raise
        except (L2PError, OSError, MemoryError) as error:
            # A library may have made it from what a signal raised.
            _go_on(cancelled)
            if retries == 0:
                return _as_l2p_error(error)
        retries -= 1


def _go_on(cancelled: Callable[[], bool]) -> None:
    if cancelled():
        raise CancelledError("drawing was cancelled")


def _as_l2p_error(error: L2PError | OSError | MemoryError) -> L2PError:
    if isinstance(error, L2PError):
        return error
    if isinstance(error, MemoryError):
        return HostError(f"out of memory: {error}", hint="draw a smaller image, or give the process more memory")
    where = f" `{error.filename}`" if error.filename else ""
    return HostError(f"{error.strerror or error}{where}")
