"""A corpus on disk: PNG images, and one JSON line per image with its prompt and seed.

    DIR/metadata.jsonl     {"file_name": "images/000000.png", "text": "a red circle", "seed": 7, "sha256": "..."}
    DIR/images/*.png

The file names follow Hugging Face's ImageFolder format, so other tools can read a corpus.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from l2p_runtime.errors import ArtifactError, HostError, UsageError
from l2p_runtime.files import write_bytes
from l2p_runtime.noise import checked_seed

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

METADATA_NAME, IMAGES_NAME = "metadata.jsonl", "images"
SHARD_IMAGES = 10_000
"""Maximum images per folder: `images/00`, `images/01` and so on."""

TEXT_CHARACTERS_MAX = 1 << 16
PIXELS_MAX = 1 << 28
KEPT_BYTES = 1 << 30
"""Maximum bytes of decoded training images that each process keeps in memory."""

PROMPTS_BYTES_MAX = 64 << 20
"""Maximum size of a prompt file."""


@dataclass(frozen=True, slots=True)
class Row:
    """One image of a corpus; `seed` is that of its noise, None for an image that no model drew."""

    file_name: str
    text: str
    seed: int | None
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class Corpus:
    """A checked corpus: every row is valid and names an existing file."""

    folder: Path
    rows: tuple[Row, ...]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.rows)


def open_corpus(folder: Path) -> Corpus:
    """Read a corpus's rows.

    Raises:
        UsageError: the folder is not a corpus.
        ArtifactError: a row is damaged, points outside of the folder or names a missing file; lists the rows.
    """
    path = folder / METADATA_NAME
    if not path.is_file():
        raise UsageError(f"`{folder}` has no {METADATA_NAME}, so it is no corpus", hint="write one with `train corpus`")
    rows, faults = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = _row(line)
        except (ValueError, RecursionError, TypeError, KeyError) as error:
            faults.append(f"line {number}: {error}")
            continue
        fault = _file_fault(folder, row)
        if fault:
            faults.append(f"line {number}: {fault}")
        rows.append(row)
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ArtifactError(
            f"`{path}`: {'; '.join(faults[:5])}{more}",
            hint="run the corpus command that wrote it again, which resumes, or remove these lines",
        )
    if not rows:
        raise ArtifactError(f"`{path}` lists no image", hint="write a corpus with `train corpus`")
    return Corpus(folder, tuple(rows))


def read_image(corpus: Corpus, row: Row) -> NDArray[np.uint8]:
    """uint8 pixels [H,W,3] of one row.

    Raises:
        ArtifactError: damaged, changed since it was written, or larger than `PIXELS_MAX`.
    """
    path, again = corpus.folder / row.file_name, "draw the corpus again"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"`{path}` is no readable image: {error}", hint=again) from error
    if row.sha256 and hashlib.sha256(data).hexdigest() != row.sha256:
        raise ArtifactError(f"`{path}` is not the file that its row was written for", hint=again)
    return decode_image(data, str(path), again)


def decode_image(data: bytes, name: str, hint: str) -> NDArray[np.uint8]:
    """uint8 pixels [H,W,3] of an image file; `name` and `hint` are for errors.

    Raises:
        ArtifactError: damaged, not an image, or larger than `PIXELS_MAX`.
    """
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > PIXELS_MAX:
                raise ArtifactError(f"`{name}` has {image.width}x{image.height} pixels, expected up to {PIXELS_MAX:,}")
            return np.asarray(image.convert("RGB"))
    except (OSError, UnidentifiedImageError, SyntaxError, Image.DecompressionBombError) as error:
        raise ArtifactError(f"`{name}` is no readable image: {error}", hint=hint) from error


def write_image(folder: Path, index: int, pixels: NDArray[np.uint8], text: str, seed: int | None) -> Row:
    """Write one PNG atomically, and return its row.

    Raises:
        HostError: the file cannot be written.
    """
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    data = buffer.getvalue()
    name = f"{IMAGES_NAME}/{index // SHARD_IMAGES:02}/{index:08}.png"
    path = folder / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, data)
    except OSError as error:
        raise HostError(f"cannot write `{path}`: {error.strerror or error}", hint="make room, then again") from error
    return Row(name, text, seed, hashlib.sha256(data).hexdigest())


def append_rows(folder: Path, rows: Iterable[Row]) -> None:
    """Append rows to the metadata; their images must be written before.

    Raises:
        HostError: the file cannot be written.
    """
    text = "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)
    try:
        with (folder / METADATA_NAME).open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
    except OSError as error:
        raise HostError(
            f"cannot write `{folder / METADATA_NAME}`: {error.strerror or error}", hint="make room, then again"
        ) from error


def written_rows(folder: Path) -> int:
    """Number of complete rows that a corpus has so far; a row truncated by a kill is removed.

    Raises:
        HostError: the file cannot be written.
    """
    path = folder / METADATA_NAME
    if not path.is_file():
        return 0
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        write_bytes(path, whole)
    return whole.count(b"\n")


def next_image(folder: Path) -> int:
    """Number of the image after a corpus's last row, also if images were dropped; see `written_rows`.

    Raises:
        ArtifactError: the last row does not name a numbered image.
        HostError: the file cannot be written.
    """
    if not written_rows(folder):
        return 0
    line = (folder / METADATA_NAME).read_text(encoding="utf-8").rstrip("\n").rpartition("\n")[2]
    try:
        return int(Path(_row(line).file_name).stem) + 1
    except (ValueError, RecursionError, TypeError, KeyError) as error:
        raise ArtifactError(
            f"`{folder / METADATA_NAME}`: the last line is damaged: {error}", hint="remove that line, then run again"
        ) from error


def corpus_images(prompts: Sequence[str], seeds_per_prompt: int, seed: int) -> int:
    """Number of images that a corpus will have.

    Raises:
        UsageError: none, or seeds out of range.
    """
    total = len(prompts) * seeds_per_prompt
    if total < 1:
        raise UsageError(f"{len(prompts)} prompts with {seeds_per_prompt} seeds each, expected 1 or more of both")
    checked_seed(seed)
    checked_seed(seed + total - 1)
    return total


def _row(line: str) -> Row:
    parsed = json.loads(line)
    if not isinstance(parsed, dict):
        raise TypeError("no JSON object")
    name, text, seed = parsed["file_name"], parsed.get("text", parsed.get("prompt")), parsed.get("seed")
    if not isinstance(name, str) or not isinstance(text, str) or len(text) > TEXT_CHARACTERS_MAX:
        raise TypeError("`file_name` and `text` must be text")
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 1 << 64):
        raise TypeError(f"`seed` is {seed!r}, expected 0 to 2^64 - 1")
    digest = parsed.get("sha256", "")
    return Row(name, text, seed, digest if isinstance(digest, str) else "")


def _file_fault(folder: Path, row: Row) -> str:
    path = folder / row.file_name
    if Path(row.file_name).is_absolute() or not path.resolve().is_relative_to(folder.resolve()):
        return f"`{row.file_name}` leaves the folder"
    return "" if path.is_file() else f"`{row.file_name}` is missing"
