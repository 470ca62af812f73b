"""A corpus on disk: PNG images, and one JSON line per image with its prompt and seed.

    DIR/metadata.jsonl     {"file_name": "images/000000.png", "text": "a red circle", "seed": 7, "sha256": "..."}
    DIR/images/*.png

The file names follow Hugging Face's ImageFolder format, so other tools can read a corpus, and a folder of that format
is a corpus: only `file_name` and `text` are needed, and unknown keys are passed over (docs/training.md, "Your own
images").
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from l2p_export.training.corpus.pictures import FILE_BYTES_MAX, decode_picture
from l2p_export.training.loop.settings import SETTINGS_NAME, locked_folder, require_settings
from l2p_runtime.errors import ArtifactError, HostError, UsageError
from l2p_runtime.files import sweep_partials, write_bytes
from l2p_runtime.noise import checked_seed
from l2p_runtime.textfile import read_lines

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from l2p_export.training.corpus.pictures import Picture

METADATA_NAME, IMAGES_NAME = "metadata.jsonl", "images"
SHARD_IMAGES = 10_000
"""Maximum images per folder: `images/00`, `images/01` and so on."""

TEXT_CHARACTERS_MAX = 1 << 16
FAULTS_SHOWN = 5
KEPT_BYTES = 1 << 30
"""Maximum bytes of decoded training images that each process keeps in memory."""

PROMPTS_BYTES_MAX = 64 << 20
"""Maximum size of a prompt file."""

METADATA_BYTES_MAX = 1 << 31

_HOW_TO = f"write one with `train corpus`, or a {METADATA_NAME} beside your images, as docs/training.md shows"
_REPLACE = "replace the file or remove its line; a corpus that `train corpus` wrote can be drawn again"


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
        ArtifactError: a row is damaged, has no caption, points outside of the folder, or names a file that is missing
            or that another row names; lists the rows.
    """
    path = folder / METADATA_NAME
    if not path.is_file():
        raise UsageError(f"`{folder}` has no {METADATA_NAME}, so it is no corpus", hint=_HOW_TO)
    rows, faults = [], []
    lines_of = dict[Path, int]()
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = _row(line)
            file = _file(folder, row.file_name)
        except (ValueError, RecursionError, TypeError) as error:
            faults.append(f"line {number}: {error}")
            continue
        if file in lines_of:
            faults.append(f"line {number}: `{row.file_name}` is also the file of line {lines_of[file]}")
        lines_of.setdefault(file, number)
        rows.append(row)
    if faults:
        raise ArtifactError(
            f"`{path}`: {listed(faults)}",
            hint="correct or remove these lines; or run the corpus command that wrote it again, into another folder",
        )
    if not rows:
        raise ArtifactError(f"`{path}` lists no image", hint=_HOW_TO)
    return Corpus(folder, tuple(rows))


def listed(faults: Sequence[str]) -> str:
    """The first faults in a sentence, and the number of others."""
    more = f" and {len(faults) - FAULTS_SHOWN} more" if len(faults) > FAULTS_SHOWN else ""
    return "; ".join(faults[:FAULTS_SHOWN]) + more


def read_image(corpus: Corpus, row: Row) -> NDArray[np.uint8]:
    """uint8 sRGB pixels [H,W,3] of one row, as `decode_picture` makes them.

    Raises:
        ArtifactError: damaged, or changed since its digest was taken.
    """
    return row_picture(corpus, row, read_file(corpus, row)).pixels


def row_picture(corpus: Corpus, row: Row, data: bytes) -> Picture:
    """The picture of a row from the bytes of its file.

    Raises:
        ArtifactError: damaged, or not the file of which the row has a digest.
    """
    path = corpus.folder / row.file_name
    if row.sha256 and hashlib.sha256(data).hexdigest() != row.sha256:
        raise ArtifactError(f"`{path}` is not the file that its row was written for", hint=_REPLACE)
    return decode_picture(data, str(path), _REPLACE)


def read_file(corpus: Corpus, row: Row) -> bytes:
    """Bytes of a row's file.

    Raises:
        ArtifactError: it cannot be read, or is larger than `FILE_BYTES_MAX`.
    """
    path = corpus.folder / row.file_name
    try:
        with path.open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ArtifactError(f"`{path}` is no readable image: {error.strerror or error}", hint=_REPLACE) from error
    if len(data) > FILE_BYTES_MAX:
        raise ArtifactError(f"`{path}` has more than {FILE_BYTES_MAX:,} bytes", hint=_REPLACE)
    return data


@contextmanager
def written_corpus(folder: Path, settings: Mapping[str, object]) -> Iterator[None]:
    """Hold the lock of a corpus that is written, in a new folder or in one of equal settings.

    Raises:
        UsageError: the folder holds a corpus of other settings, or one that no command wrote.
        HostError: another command writes there, or the folder cannot be written.
    """
    if (folder / METADATA_NAME).exists() and not (folder / SETTINGS_NAME).is_file():
        raise UsageError(
            f"`{folder}` has a {METADATA_NAME} that no command wrote", hint="choose another folder to write to"
        )
    with locked_folder(folder):
        require_settings(folder, settings)
        for images in (folder / IMAGES_NAME).glob("*"):
            sweep_partials(images)
        yield


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
    line = (folder / METADATA_NAME).read_bytes().rstrip(b"\n").rpartition(b"\n")[2]
    try:
        return int(Path(_row(line.decode()).file_name).stem) + 1
    except (ValueError, RecursionError, TypeError) as error:
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


def _lines(path: Path) -> list[str]:
    try:
        return read_lines(path, METADATA_BYTES_MAX)
    except OSError as error:
        raise ArtifactError(f"cannot read `{path}`: {error.strerror or error}") from error
    except UsageError as error:
        raise ArtifactError(str(error), hint=error.hint) from error


def _row(line: str) -> Row:
    """Read a line; keys other than those of `Row` are passed over.

    Raises:
        ValueError, TypeError, RecursionError: the line is damaged; says how.
    """
    parsed = json.loads(line)
    if not isinstance(parsed, dict):
        raise TypeError("no JSON object")
    name, text = _text("file_name", parsed.get("file_name")), _text("text", parsed.get("text", parsed.get("prompt")))
    seed, digest = parsed.get("seed"), parsed.get("sha256", "")
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 1 << 64):
        raise TypeError(f"`seed` is {_shown(seed)}, expected 0 to 2^64 - 1")
    return Row(name, text, seed, digest if isinstance(digest, str) else "")


def _text(key: str, value: object) -> str:
    if not isinstance(value, str) or not value.strip() or len(value) > TEXT_CHARACTERS_MAX:
        raise TypeError(
            f"`{key}` is {_shown(value)}, expected text of up to {TEXT_CHARACTERS_MAX:,} characters, not empty"
        )
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"`{key}` has half of a surrogate pair, which is no character")
    return value


def _shown(value: object) -> str:
    """A value as an error shows it: the start of a long one."""
    shown = "missing" if value is None else repr(value)
    return shown if len(shown) <= 40 else f"{shown[:40]}…"


def _file(folder: Path, name: str) -> Path:
    """The real path of a row's file.

    Raises:
        ValueError: it is missing, no file, or outside of the folder.
    """
    path = folder / name
    try:
        real = path.resolve()
        is_file = real.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a zero character, links in a circle
        raise ValueError(f"`{_shown(name)}` is no path: {error}") from error
    if Path(name).is_absolute() or not real.is_relative_to(folder.resolve()):
        raise ValueError(f"`{name}` leaves the folder")
    if not is_file:
        raise ValueError(f"`{name}` is missing")
    return real
