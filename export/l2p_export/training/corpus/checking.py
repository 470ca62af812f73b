"""Checks training images before a run: every file is decoded once, counted and given a digest."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from l2p_export.training.corpus.corpus import Corpus, Row, listed, read_file, row_picture
from l2p_export.training.corpus.pictures import CHANGES, PIXELS_MAX
from l2p_export.training.corpus.rendered import RenderedScenes
from l2p_export.training.loop.settings import digest
from l2p_export.world.scenes import scenes_digest
from l2p_runtime.errors import ArtifactError

if TYPE_CHECKING:
    from l2p_export.training.corpus.reader import Images
    from l2p_runtime.progress import Reporter

UPSCALED, CROPPED = "upscaled", "cropped to squares"


@dataclass(frozen=True, slots=True)
class CheckedImages:
    """Images that can be read.

    Attributes:
        images: the same images; each row has the digest of its file, so that a file that changes later is refused.
        counts: of images, by what is done to them: upscaled, cropped, or one of `pictures.CHANGES`.
    """

    images: Images
    counts: Mapping[str, int]

    @property
    def text(self) -> str:
        """The counts in one line."""
        said = ", ".join(f"{count} {what}" for what, count in self.counts.items() if count)
        return f"{len(self.images)} images: {said or 'none upscaled, cropped or converted'}"


def check_images(images: Images, size_px: int, report: Reporter) -> CheckedImages:
    """Decode every image once.

    Args:
        images: scenes of the small world are never at fault.
        size_px: side of the largest training images.
        report: gets the number of images.

    Raises:
        ArtifactError: images are damaged, changed, or too narrow to be resized; lists them.
    """
    if isinstance(images, RenderedScenes):
        return CheckedImages(images, {})
    rows, faults = [], []
    counts = Counter(dict.fromkeys((UPSCALED, CROPPED, *CHANGES), 0))
    with report.task("checking the images", len(images), "images") as advance:
        for row in images.rows:
            try:
                found, changes = _checked(images, row, size_px)
            except ArtifactError as error:
                faults.append(str(error))
            else:
                rows.append(found)
                counts.update(changes)
            advance(1)
    if faults:
        raise ArtifactError(
            f"{len(faults)} of {len(images)} images cannot be trained on: {listed(faults)}",
            hint="replace these files, or remove their lines",
        )
    return CheckedImages(Corpus(images.folder, tuple(rows)), dict(counts))


def images_digest(images: Images) -> str:
    """Hex SHA-256 of captions, seeds and contents, in order: equal digests train equal adapters.

    Raises:
        ArtifactError: a file without a digest in its row cannot be read.
    """
    if isinstance(images, RenderedScenes):
        return scenes_digest((row.text, scene) for row, scene in zip(images.rows, images.scenes, strict=True))
    return digest([[row.text, row.seed, row.sha256 or _sha256(read_file(images, row))] for row in images.rows])


def _checked(corpus: Corpus, row: Row, size_px: int) -> tuple[Row, list[str]]:
    """A row with its file's digest, and what is done to its picture."""
    data = read_file(corpus, row)
    picture = row_picture(corpus, row, data)
    height, width = picture.pixels.shape[:2]
    short, long = sorted((height, width))
    if size_px * (size_px * long // short) > PIXELS_MAX:
        raise ArtifactError(
            f"`{corpus.folder / row.file_name}` has {width}x{height} pixels, too narrow to be resized to {size_px} px"
        )
    shape = [what for what, is_so in ((UPSCALED, short < size_px), (CROPPED, short < long)) if is_so]
    return replace(row, sha256=_sha256(data)), [*shape, *picture.changes]


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
