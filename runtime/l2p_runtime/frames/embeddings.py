"""Embeddings of the prompts of frames: the text encoder is loaded for many prompts, and each is encoded once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from l2p_runtime.errors import L2PError
from l2p_runtime.frames.shot import FrameRequest, checked_call

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from l2p_runtime.pipeline import Pipeline

Embeddings: TypeAlias = "tuple[NDArray[np.float32], ...]"
"""Of the prompt, and of the negative prompt where there is guidance: [L,C] each."""

Group = tuple[bool, tuple[str, ...]]
"""Whether texts are cut, and the texts of a frame. They are encoded together, as in `Pipeline.generate`: what else is
encoded changes no bit of a frame that is drawn again."""

GROUPS_MAX = 16
"""Groups that are encoded for one loading of the text encoder, and that are kept for later frames."""
FRAMES_AHEAD = 64
"""Frames that are looked at for their texts."""


@dataclass(frozen=True, slots=True, eq=False)
class _Frame:
    """A frame with its captions before they are encoded, or why it has none."""

    request: FrameRequest
    captions: tuple[NDArray[np.float32] | str, ...] = ()
    error: L2PError | None = None

    @property
    def group(self) -> Group | None:
        """Its texts; None if it has none."""
        texts = tuple(dict.fromkeys(caption for caption in self.captions if isinstance(caption, str)))
        return (bool(self.request.call.get("truncate_prompt", False)), texts) if texts else None


def with_embeddings(
    pipe: Pipeline, requests: Iterator[FrameRequest], attempt: Callable[[Callable[[], Any]], Any]
) -> Iterator[tuple[FrameRequest, Embeddings | L2PError]]:
    """Each frame with its embeddings, or why it has none.

    Args:
        pipe: what encodes them.
        requests: the frames; up to `FRAMES_AHEAD` are looked ahead.
        attempt: calls a function, again if it fails; returns its result or the last error.
    """
    kept: dict[Group, Embeddings] = {}
    for window in _windows(pipe, requests, kept):
        wanted = dict.fromkeys(group for frame in window if (group := frame.group) is not None)
        new = [group for group in wanted if group not in kept]
        found = attempt(lambda: _encoded(pipe, new))  # noqa: B023
        if not isinstance(found, L2PError):
            kept |= found
        for frame in window:
            if frame.error is not None:
                yield frame.request, frame.error
            elif frame.group is not None and frame.group not in kept:
                yield frame.request, found
            else:
                yield frame.request, _embedded(frame, kept)
        for group in [group for group in kept if group not in wanted][: max(len(kept) - GROUPS_MAX, 0)]:
            del kept[group]


def _windows(
    pipe: Pipeline, requests: Iterator[FrameRequest], kept: Mapping[Group, Embeddings]
) -> Iterator[list[_Frame]]:
    """Frames whose texts are encoded together."""
    window: list[_Frame] = []
    new: set[Group] = set()
    for request in requests:
        try:
            frame = _Frame(request, checked_call(pipe.bundle.manifest, request.call).captions)
        except L2PError as error:
            frame = _Frame(request, error=error)
        window.append(frame)
        if frame.group is not None and frame.group not in kept:
            new.add(frame.group)
        if len(new) == GROUPS_MAX or len(window) == FRAMES_AHEAD:
            yield window
            window, new = [], set()
    if window:
        yield window


def _encoded(pipe: Pipeline, groups: Sequence[Group]) -> dict[Group, Embeddings]:
    found: dict[Group, Embeddings] = {}
    for truncate in (False, True):
        texts = [texts for cut, texts in groups if cut == truncate]
        if texts:
            embeds = pipe.encode_each(texts, truncate_prompt=truncate)
            found |= {(truncate, group): tuple(those) for group, those in zip(texts, embeds, strict=True)}
    return found


def _embedded(frame: _Frame, kept: Mapping[Group, Embeddings]) -> Embeddings:
    group = frame.group
    embeds = {} if group is None else dict(zip(group[1], kept[group], strict=True))
    return tuple(embeds[caption] if isinstance(caption, str) else caption for caption in frame.captions)
