"""Stages: cached, content-addressed steps of a build.

A home is a folder, a bundle's own or a store that bundles share:

    graphs/, engines/, traces/, ...        files that carry their digest in their names
    stages/KEY.json                        the record of one finished stage; KEY is the digest of its inputs
    .work/KEY/, .work/KEY.lock             a stage that is being made, and the lock of the process that makes it

A record is written last and by one rename, so after a kill at any moment a stage is either finished or not begun.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from l2p_engines.store.locks import locked
from l2p_runtime.bundle import BUILD_STAGES, FULL_HASH_BYTES, check_file, file_record
from l2p_runtime.contract import FileRecord
from l2p_runtime.contract.codec import from_json, to_json
from l2p_runtime.errors import ArtifactError, HostError, L2PError
from l2p_runtime.files import commit_file, write_json

STAGES, WORK = BUILD_STAGES, ".work"
FOLDERS = ("graphs", "engines", "traces", "plans", "reference", "text")
"""Where the files of stages lie."""

DIGEST_DIGITS = 16
"""Hexadecimal digits of a content digest in a file name; records hold all 64."""

_KEY = re.compile(r"[0-9a-f]{64}")
_SCHEMA = 1
_RECORD_BYTES_MAX = 16 << 20


@dataclass(frozen=True, slots=True)
class Stage:
    """A finished stage.

    Attributes:
        key: digest of the kind and of all inputs.
        kind: `graph`, `engine`, `trace`, `digests`, `proof`.
        label: name for messages, as `trunk.fp16`.
        files: the files that it made.
        facts: further results, as JSON.
    """

    schema: int
    key: str
    kind: str
    label: str
    files: tuple[FileRecord, ...] = ()
    facts: object = None


@dataclass(frozen=True, slots=True)
class StageOutput:
    """The output of a stage: files in its work folder with their digests, to be moved to `folder`, and facts."""

    folder: str = ""
    files: tuple[tuple[Path, str], ...] = ()
    facts: object = None


@dataclass(frozen=True, slots=True)
class Home:
    """The folder where stages are kept; `is_shared` if other bundles use it too."""

    root: Path
    is_shared: bool = False


@dataclass(frozen=True, slots=True)
class StageRunner:
    """`run_stage` in the home of one build.

    Attributes:
        waiting: called when another process is making a stage that is needed here.
        keys: of every stage that was found or made; grows.
        kinds: of the same stages; grows.
        made: `kind label` of every stage that was made; grows.
    """

    home: Home
    waiting: Callable[[str], None] = lambda text: None
    keys: list[str] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    made: list[str] = field(default_factory=list)

    def __call__(
        self, kind: str, label: str, inputs: Mapping[str, object], make: Callable[[Path], StageOutput]
    ) -> Stage:
        """The finished stage for these inputs: found, or made now."""

        def noted(work: Path) -> StageOutput:
            made = make(work)
            self.made.append(f"{kind} {label}")
            return made

        stage = run_stage(self.home, kind, label, inputs, noted, self.waiting)
        self.keys.append(stage.key)
        self.kinds.append(kind)
        return stage

    def path(self, record: FileRecord) -> Path:
        """Where a file of a stage lies."""
        return self.home.root / record.path


def stage_key(kind: str, inputs: Mapping[str, object]) -> str:
    """Digest of a stage's kind and inputs; equal inputs give equal keys on every machine."""
    text = json.dumps([_SCHEMA, kind, to_json(inputs)], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def run_stage(
    home: Home,
    kind: str,
    label: str,
    inputs: Mapping[str, object],
    make: Callable[[Path], StageOutput],
    waiting: Callable[[str], None] = lambda text: None,
) -> Stage:
    """The finished stage for these inputs: found, or made now.

    Two builds that want one stage at once make it once: the second waits.

    Args:
        home: where to look and to keep it.
        kind: kind of work.
        label: name for messages.
        inputs: everything that decides the result, as JSON or specs.
        make: does the work in the folder it is given, and returns its output.
        waiting: called once when another process is making this stage.

    Raises:
        ArtifactError: a shared home holds the stage, but its files were changed.
    """
    key = stage_key(kind, inputs)
    if (found := find_stage(home, key)) is not None:
        return found
    work = home.root / WORK / key
    work.parent.mkdir(exist_ok=True)
    with locked(work.with_suffix(".lock"), lambda: waiting(f"another process is making `{label}`; waiting for it")):
        if (found := find_stage(home, key)) is not None:
            return found
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        try:
            # A label may be a file name, which is bytes; what is no UTF-8 in it cannot be kept as text.
            stage = Stage(_SCHEMA, key, kind, label.encode(errors="replace").decode())
            return _publish(home, stage, make(work), work)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def find_stage(home: Home, key: str) -> Stage | None:
    """A finished stage whose files are all there and unchanged; None if it must be made.

    Raises:
        ArtifactError: in a shared home, a file was changed. In a bundle of its own it is simply made again.
    """
    stage = read_stage(home.root / STAGES / f"{key}.json")
    if stage is None or not all((home.root / record.path).is_file() for record in stage.files):
        return None
    try:
        for record in stage.files:
            check_file(home.root, record, full=record.size_bytes <= FULL_HASH_BYTES)
    except ArtifactError as error:
        if not home.is_shared:
            return None
        raise ArtifactError(
            f"the store `{home.root}` is damaged: {error}",
            hint=f"`l2p-export store check {home.root} --remove` removes what is damaged; then build again",
        ) from error
    return stage


def read_stage(path: Path) -> Stage | None:
    """Read a record; None if it is missing, cannot be read, or belongs to another name."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > _RECORD_BYTES_MAX:
            return None
        stage = from_json(Stage, json.loads(path.read_bytes()))
    except (OSError, ValueError, RecursionError, L2PError):
        return None
    # The key becomes a file name again where records are removed.
    is_own = stage.schema == _SCHEMA and stage.key == path.stem and _KEY.fullmatch(stage.key)
    return stage if is_own else None


def stages(root: Path) -> list[Stage]:
    """Every readable record of a home."""
    found = (read_stage(path) for path in sorted((root / STAGES).glob("*.json")))
    return [stage for stage in found if stage is not None]


def named_by_content(path: Path, name: str, sha256: str) -> Path:
    """Rename a finished file to `name` with its digest put before the suffix."""
    stem, _, suffix = name.rpartition(".")
    target = path.with_name(f"{stem}.{sha256[:DIGEST_DIGITS]}.{suffix}")
    return path.replace(target)


def sweep_work(root: Path) -> list[Path]:
    """Remove what killed builds left in `.work`; a stage that a running one makes stays. Returns what was removed.

    Call it where no other process writes records: under the lock of a bundle, or the exclusive lock of a store.
    """
    work, removed = root / WORK, []
    entries = sorted(work.iterdir()) if work.is_dir() else []
    for path in entries:
        if ".lock" not in path.suffixes and not path.is_dir():
            removed.append(path)
            path.unlink(missing_ok=True)
    for key in sorted({path.name.partition(".lock")[0] for path in entries} - {path.name for path in removed}):
        try:
            with locked(work / f"{key}.lock"):
                if (work / key).exists():
                    removed.append(work / key)
                    shutil.rmtree(work / key, ignore_errors=True)
        except HostError:
            continue
    if work.is_dir() and not any(work.iterdir()):
        work.rmdir()
    return removed


def leftover_work(root: Path) -> list[Path]:
    """What `sweep_work` would remove where no build runs."""
    work = root / WORK
    entries = sorted(work.iterdir()) if work.is_dir() else []
    return [path for path in entries if ".lock" not in path.suffixes]


def _publish(home: Home, stage: Stage, made: StageOutput, work: Path) -> Stage:
    records = []
    for file, sha256 in made.files:
        target = home.root / made.folder / file.name
        target.parent.mkdir(exist_ok=True)
        # Synced here, before a record names it: files in a work folder may be written in any way.
        commit_file(file, target)
        records.append(file_record(home.root, target, sha256, in_store=home.is_shared))
    finished = Stage(stage.schema, stage.key, stage.kind, stage.label, tuple(records), to_json(made.facts))
    record = home.root / STAGES / f"{stage.key}.json"
    record.parent.mkdir(exist_ok=True)
    # Every file in the folder of records is taken for a record.
    write_json(record, finished, work=work)
    return finished
