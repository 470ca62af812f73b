from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from l2p_engines.store.shared import (
    StoreEntry,
    StoreFindings,
    check_store,
    list_store,
    open_store,
    prune_store,
    register_bundle,
    store_bytes,
)
from l2p_engines.store.stages import Home, Stage, StageOutput, named_by_content, run_stage
from l2p_runtime.bundle import FULL_HASH_BYTES, file_digest, open_bundle
from l2p_runtime.contract import (
    MANIFEST_NAME,
    NETWORKS,
    SCHEMA,
    CheckpointRecord,
    FileRecord,
    GraphRecord,
    HeadSpec,
    Manifest,
    ModelSpec,
    NetworkSpec,
    PlanRef,
    Profile,
    Range,
    RotarySpec,
    Sampling,
    bundle_digest,
    manifest_to_bytes,
)
from l2p_runtime.errors import ArtifactError, HostError, UsageError
from l2p_runtime.files import is_partial_of

MODEL = ModelSpec(
    "z_image_l2p", "1k", 16, 32, 1, 2, (0, 1), 32, 8, 8, 32, 64, RotarySpec(256.0, (8, 12, 12), (64, 64, 64), (8, 8)),
    HeadSpec(1, 1, 1.0),
)  # fmt: skip
PROFILE = Profile("small", 16, Range(16, 32, 64), Range(16, 32, 64))
CHECKPOINT = CheckpointRecord("small", "0" * 32, "", 1, 1, "0" * 64, trained=True, licence="")

HOLDER = """
import sys
from pathlib import Path
from l2p_engines.store.shared import open_store

with open_store(Path(sys.argv[1])):
    print("open", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    with open_store(tmp_path / "store") as home:
        assert home == Home(tmp_path / "store", is_shared=True)
    return tmp_path / "store"


def graph(root: Path, network: str, version: int = 1) -> Stage:
    """A graph stage of two small files."""

    def make(work: Path) -> StageOutput:
        files = []
        for suffix in ("onnx", "safetensors"):
            content = f"{network} {version} {suffix}".encode() * 50
            (work / suffix).write_bytes(content)
            digest = hashlib.sha256(content).hexdigest()
            files.append((named_by_content(work / suffix, f"{network}.fp32.{suffix}", digest), digest))
        return StageOutput("graphs", tuple(files))

    return run_stage(Home(root, True), "graph", f"{network}.fp32", {"network": network, "version": version}, make)


def trace(root: Path) -> Stage:
    """A stage whose file no bundle names."""

    def make(work: Path) -> StageOutput:
        (work / "x").write_bytes(b"trace")
        digest = hashlib.sha256(b"trace").hexdigest()
        return StageOutput("traces", ((named_by_content(work / "x", "head.fp32.onnx", digest), digest),))

    return run_stage(Home(root, True), "trace", "head.fp32", {}, make)


def bundle(root: Path, folder: Path, **versions: int) -> dict[str, Stage]:
    """Build a bundle of graphs in the store: all of version 1 but those that are named. Returns its stages."""
    with open_store(root):
        made = {network: graph(root, network, versions.get(network, 1)) for network in NETWORKS}
    commit(root, folder, made)
    return made


def commit(root: Path, folder: Path, made: dict[str, Stage]) -> None:
    graphs = tuple(
        GraphRecord(name, "fp32", 20, stage.files[0].path, stage.files[1].path) for name, stage in made.items()
    )
    data = manifest_to_bytes(
        Manifest(
            schema=SCHEMA,
            producer="test",
            model=MODEL,
            checkpoint=CHECKPOINT,
            sampling=Sampling(),
            networks=tuple(NetworkSpec(name, (), ()) for name in NETWORKS),
            profiles=(PROFILE,),
            plans=(PlanRef("fp32", "0", "fp32"),),
            graphs=graphs,
            references=(),
            files=tuple(record for stage in made.values() for record in stage.files),
            ledger=(),
        )
    )
    folder.mkdir(exist_ok=True)
    with open_store(root) as home:
        register_bundle(home, folder, bundle_digest(data))
    (folder / MANIFEST_NAME).write_bytes(data)
    open_bundle(folder)


def check(root: Path, *, remove: bool = False) -> StoreFindings:
    return check_store(root, remove=remove, advance=lambda size: None)


def labels(entries: list[StoreEntry]) -> list[str]:
    return sorted(f"{entry.stage.kind} {entry.stage.label}" for entry in entries)


def record_path(root: Path, stage: Stage) -> Path:
    return root / "stages" / f"{stage.key}.json"


def flip(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 1]))


def flip_middle(path: Path) -> None:
    flip(path, path.stat().st_size // 2)


def everything(root: Path) -> dict[str, int]:
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
    return {name: path.stat().st_mtime_ns for name, path in files.items() if name != ".lock"}


@contextmanager
def held(root: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process has the store open."""
    command = [sys.executable, "-c", HOLDER, str(root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "open\n"
            yield process
        finally:
            process.kill()


def test_a_store_is_made_where_nothing_is(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "deep" / "new"):
        for _ in range(2):
            with open_store(folder) as home:
                assert home == Home(folder, is_shared=True)
        assert json.loads((folder / "l2p-store.json").read_bytes()) == {"schema": 1}
        assert list_store(folder) == []


def test_a_store_given_by_a_relative_path_is_known_by_its_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with open_store(Path("store")) as home:
        assert home.root == tmp_path / "store"


def test_a_folder_with_other_things_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(UsageError, match="is no store and not empty"), open_store(path):
            pass
        for call in (list_store, prune_store, check, store_bytes):
            with pytest.raises(HostError, match=r"is no store: it has no l2p-store\.json"):
                call(path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_store_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    # Nobody makes folders in /sys, not even root.
    for path in (Path("/sys/l2p-store"), tmp_path / "file" / "store"):
        with pytest.raises(HostError, match=f"cannot write the store `{path}`") as caught, open_store(path):
            pass
        assert "--store" in caught.value.hint


def test_what_fails_while_a_store_is_open_is_not_blamed_on_it(tmp_path: Path) -> None:
    with pytest.raises(PermissionError, match="elsewhere"), open_store(tmp_path / "store"):
        raise PermissionError(13, "Permission denied", "elsewhere")


def test_a_store_whose_making_was_killed_is_made(tmp_path: Path) -> None:
    (tmp_path / "store" / "bundles").mkdir(parents=True)
    (tmp_path / "store" / ".work").mkdir()
    (tmp_path / "store" / ".work" / "l2p-store.json").write_text('{"sch')
    with open_store(tmp_path / "store"):
        pass
    assert check(tmp_path / "store").damaged == ()


def meanwhile(monkeypatch: pytest.MonkeyPatch, call: Callable[[], object]) -> None:
    """Let another build do something while this one has written a record and not yet put it in place."""
    fsync = os.fsync

    def interrupted(handle: int) -> None:
        monkeypatch.setattr(os, "fsync", fsync)
        call()
        fsync(handle)

    monkeypatch.setattr(os, "fsync", interrupted)


def test_two_builds_make_one_store_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other() -> None:
        with open_store(tmp_path / "store"):
            pass

    meanwhile(monkeypatch, other)
    with open_store(tmp_path / "store"):
        pass
    assert list_store(tmp_path / "store") == []


def test_two_builds_register_equal_bundles_at_once(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {name: graph(root, name) for name in NETWORKS}
    meanwhile(monkeypatch, lambda: commit(root, tmp_path / "other", made))
    commit(root, tmp_path / "one", made)
    for name in ("one", "other"):
        open_bundle(tmp_path / name)


def test_several_builds_open_one_store(root: Path) -> None:
    with held(root), open_store(root) as home:
        assert run_stage(home, "graph", "head", {}, lambda work: StageOutput(facts=1)).facts == 1


def test_a_list_tells_sizes_and_users(root: Path, tmp_path: Path) -> None:
    made = bundle(root, tmp_path / "one")
    other = bundle(root, tmp_path / "other", head=2)
    alone = trace(root)
    entries = {entry.stage.key: entry for entry in list_store(root)}
    assert entries.keys() == {stage.key for stage in (*made.values(), other["head"], alone)}
    assert entries[made["trunk"].key].used_by == (str(tmp_path / "one"), str(tmp_path / "other"))
    assert entries[made["head"].key].used_by == (str(tmp_path / "one"),)
    assert entries[other["head"].key].used_by == (str(tmp_path / "other"),)
    assert entries[alone.key].used_by == ()
    sizes = [entry.size_bytes for entry in list_store(root)]
    assert sizes == sorted(sizes, reverse=True)
    assert sum(sizes) == store_bytes(root)
    assert sum(sizes) == sum((root / record.path).stat().st_size for e in entries.values() for record in e.stage.files)


def test_equal_networks_are_stored_once(root: Path, tmp_path: Path) -> None:
    one, other = bundle(root, tmp_path / "one"), bundle(root, tmp_path / "other", head=2)
    assert [name for name in NETWORKS if one[name] != other[name]] == ["head"]
    assert len(list((root / "graphs").iterdir())) == 2 * (len(NETWORKS) + 1)


def test_pruning_keeps_what_a_bundle_uses(root: Path, tmp_path: Path) -> None:
    bundle(root, tmp_path / "one")
    graph(root, "head", 2)
    trace(root)
    assert labels(prune_store(root)) == ["graph head.fp32", "trace head.fp32"]
    open_bundle(tmp_path / "one")
    assert {entry.used_by for entry in list_store(root)} == {(str(tmp_path / "one"),)}
    assert len(list((root / "graphs").iterdir())) == 2 * len(NETWORKS)
    assert list((root / "traces").iterdir()) == []
    assert prune_store(root) == []


def test_a_removed_bundle_frees_its_files(root: Path, tmp_path: Path) -> None:
    bundle(root, tmp_path / "one")
    bundle(root, tmp_path / "other", head=2)
    shutil.rmtree(tmp_path / "other")
    assert labels(prune_store(root)) == ["graph head.fp32"]
    open_bundle(tmp_path / "one")
    assert len(list((root / "bundles").iterdir())) == 1
    shutil.rmtree(tmp_path / "one")
    assert len(prune_store(root)) == len(NETWORKS)
    for folder in ("graphs", "stages", "bundles"):
        assert list((root / folder).iterdir()) == []


def test_a_rebuilt_bundle_frees_what_it_used_before(root: Path, tmp_path: Path) -> None:
    before = bundle(root, tmp_path / "one")
    after = bundle(root, tmp_path / "one", head=2)
    (gone,) = prune_store(root)
    assert gone.stage == before["head"] != after["head"]
    assert not (root / before["head"].files[0].path).exists()
    open_bundle(tmp_path / "one")


def test_a_bundle_that_is_being_replaced_keeps_its_files(root: Path, tmp_path: Path) -> None:
    # A build registers the new bundle before it replaces the manifest, and may be killed between the two.
    bundle(root, tmp_path / "one")
    with open_store(root) as home:
        register_bundle(home, tmp_path / "one", "f" * 64)
    assert prune_store(root) == []
    open_bundle(tmp_path / "one")


def test_equal_bundles_in_two_folders_both_count(root: Path, tmp_path: Path) -> None:
    bundle(root, tmp_path / "one")
    bundle(root, tmp_path / "other")
    assert {entry.used_by for entry in list_store(root)} == {(str(tmp_path / "one"), str(tmp_path / "other"))}
    shutil.rmtree(tmp_path / "other")
    assert prune_store(root) == []
    open_bundle(tmp_path / "one")


def test_files_of_a_bundle_are_kept_though_their_stage_is_gone(root: Path, tmp_path: Path) -> None:
    made = bundle(root, tmp_path / "one")
    record_path(root, made["head"]).unlink()
    assert prune_store(root) == []
    open_bundle(tmp_path / "one")


@pytest.mark.parametrize("remove", [False, True])
@pytest.mark.parametrize("record", [b"{", None])
def test_a_check_keeps_files_of_a_bundle_though_their_stage_is_lost(
    root: Path, tmp_path: Path, record: bytes | None, remove: bool
) -> None:
    made = bundle(root, tmp_path / "one")
    path = record_path(root, made["head"])
    path.unlink()
    if record is not None:
        path.write_bytes(record)
    found = check(root, remove=remove)
    assert [name for name, _ in found.damaged] == ([path.relative_to(root).as_posix()] if record is not None else [])
    open_bundle(tmp_path / "one")


def test_a_check_hashes_the_files_of_a_bundle_though_their_stage_is_lost(root: Path, tmp_path: Path) -> None:
    made = bundle(root, tmp_path / "one")
    record_path(root, made["head"]).unlink()
    flip_middle(root / made["head"].files[1].path)
    assert made["head"].files[1].path in dict(check(root).damaged)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"path": 1}', b'{"path": "/\\u0000"}', b"[" * 100_000, b"\xff"])
def test_a_registration_that_cannot_be_read_keeps_nothing(root: Path, tmp_path: Path, data: bytes) -> None:
    bundle(root, tmp_path / "one")
    graph(root, "head", 2)
    path = root / "bundles" / f"{'0' * 64}.{'0' * 16}.json"
    path.write_bytes(data)
    assert labels(prune_store(root)) == ["graph head.fp32"]
    assert not path.exists()
    open_bundle(tmp_path / "one")


def test_only_what_is_old_enough_is_pruned(root: Path) -> None:
    old, new = graph(root, "head", 1), graph(root, "head", 2)
    status = record_path(root, old).stat()
    os.utime(record_path(root, old), ns=(status.st_atime_ns, status.st_mtime_ns - 3600 * 10**9))
    assert prune_store(root, older_than_seconds=7200) == []
    (gone,) = prune_store(root, older_than_seconds=1800)
    assert gone.stage == old
    assert gone.age_seconds >= 3600
    assert [entry.stage for entry in list_store(root)] == [new]
    assert (root / new.files[0].path).exists()
    assert not (root / old.files[0].path).exists()


def test_a_stage_from_the_future_is_just_new(root: Path) -> None:
    stage = graph(root, "head")
    status = record_path(root, stage).stat()
    os.utime(record_path(root, stage), ns=(status.st_atime_ns, status.st_mtime_ns + 3600 * 10**9))
    assert list_store(root)[0].age_seconds == 0.0
    assert prune_store(root, older_than_seconds=1) == []
    assert len(prune_store(root)) == 1


def test_files_that_two_stages_name_stay_while_one_does(root: Path) -> None:
    stage = graph(root, "head")
    twin = json.loads(record_path(root, stage).read_bytes()) | {"key": "0" * 64}
    path = root / "stages" / f"{'0' * 64}.json"
    path.write_text(json.dumps(twin))
    os.utime(path, (0, 0))
    assert len(prune_store(root, older_than_seconds=3600)) == 1
    assert (root / stage.files[0].path).exists()
    assert check(root).damaged == ()


def test_a_dry_run_removes_nothing(root: Path, tmp_path: Path) -> None:
    bundle(root, tmp_path / "one")
    shutil.rmtree(tmp_path / "one")
    (root / "graphs" / "stray.onnx").touch()
    (root / ".work" / "dead").mkdir(exist_ok=True)
    before = everything(root)
    assert len(prune_store(root, dry_run=True)) == len(NETWORKS)
    assert everything(root) == before
    assert (root / ".work" / "dead").exists()
    assert len(prune_store(root)) == len(NETWORKS)
    assert not (root / "graphs" / "stray.onnx").exists()
    assert not (root / ".work" / "dead").exists()


def test_nothing_is_pruned_or_checked_while_a_build_uses_the_store(root: Path) -> None:
    stage = graph(root, "head")
    with held(root) as process:
        for call in (prune_store, check):
            with pytest.raises(HostError, match=f"a build is using the store `{root}`") as caught:
                call(root)
            assert "wait for it" in caught.value.hint
        assert len(list_store(root)) == 1
        process.kill()
        process.wait()
        # Whatever ended the build, its lock ended with it.
        assert check(root).damaged == ()
    assert (root / stage.files[0].path).exists()
    assert len(prune_store(root)) == 1


def test_no_build_begins_while_the_store_is_checked(root: Path) -> None:
    graph(root, "head")
    refused = []

    def advance(size: int) -> None:
        with pytest.raises(HostError, match="is being checked or pruned") as caught, open_store(root):
            pass
        refused.append(caught.value)

    check_store(root, remove=False, advance=advance)
    assert refused
    with open_store(root):
        pass


def test_a_whole_store_passes(root: Path, tmp_path: Path) -> None:
    bundle(root, tmp_path / "one")
    trace(root)
    before, seen = everything(root), []
    found = check_store(root, remove=True, advance=seen.append)
    assert sum(seen) == found.size_bytes == store_bytes(root)
    assert found == StoreFindings(2 * len(NETWORKS) + 1, store_bytes(root), (), ())
    assert everything(root) == before


def test_a_check_clears_what_is_left_over_and_says_what(root: Path, tmp_path: Path) -> None:
    bundle(root, tmp_path / "one")
    (root / "graphs" / "stray.onnx").write_bytes(b"x")
    (root / "text").mkdir()
    (root / "text" / "stray.json").write_bytes(b"x")
    (root / ".work" / "dead").mkdir(parents=True)
    (root / ".work" / "dead" / "half").write_bytes(b"x")
    (root / ".work" / "dead.lock").touch()
    (root / "bundles" / "gone.json").write_text(json.dumps({"path": str(tmp_path / "gone")}))
    found = check(root)
    assert found.removed == (".work/dead", "bundles/gone.json", "graphs/stray.onnx", "text/stray.json")
    assert found.damaged == ()
    assert not any((root / name).exists() for name in (*found.removed, ".work/dead.lock"))
    assert check(root).removed == ()
    open_bundle(tmp_path / "one")


def test_a_folder_among_the_files_does_not_stop_anything(root: Path) -> None:
    stage = graph(root, "head")
    (root / "graphs" / "folder").mkdir()
    (root / "stages" / "folder").mkdir()
    assert check(root).files == 2
    check(root, remove=True)
    assert [gone.stage for gone in prune_store(root)] == [stage]


@pytest.mark.parametrize("bundled", [False, True])
@pytest.mark.parametrize("damage", ["flipped", "short", "missing", "linked"])
def test_a_damaged_file_is_found_and_removed_on_request(root: Path, tmp_path: Path, damage: str, bundled: bool) -> None:
    made = bundle(root, tmp_path / "one") if bundled else {name: graph(root, name) for name in NETWORKS}
    name = made["head"].files[1].path
    path = root / name
    if damage == "flipped":
        flip_middle(path)
    elif damage == "short":
        os.truncate(path, path.stat().st_size - 1)
    else:
        path.rename(tmp_path / "elsewhere")
        if damage == "linked":
            path.symlink_to(tmp_path / "elsewhere")
    for _ in range(2):
        ((found, what),) = check(root).damaged
        assert found == name
        assert name in what
    ((found, what),) = check(root, remove=True).damaged
    assert found == name
    assert not path.exists()
    assert not path.is_symlink()
    assert (tmp_path / "elsewhere").exists() == (damage in ("missing", "linked"))
    assert not record_path(root, made["head"]).exists()
    assert check(root).damaged == ()
    assert graph(root, "head") == made["head"]
    assert path.is_file()
    if bundled:
        open_bundle(tmp_path / "one")


def test_a_large_file_flipped_in_the_middle_is_found_only_by_a_check(root: Path) -> None:
    def make(work: Path) -> StageOutput:
        with (work / "large").open("wb") as file:
            file.truncate(FULL_HASH_BYTES + 1)
        digest = file_digest(work / "large")
        return StageOutput("graphs", ((named_by_content(work / "large", "trunk.fp32.safetensors", digest), digest),))

    def stage() -> Stage:
        return run_stage(Home(root, True), "graph", "trunk.fp32", {}, make)

    record: FileRecord = stage().files[0]
    assert check(root).damaged == ()
    flip(root / record.path, FULL_HASH_BYTES // 2)
    stage()
    ((name, what),) = check(root).damaged
    assert name == record.path
    assert "its digest differs" in what
    flip(root / record.path, FULL_HASH_BYTES)
    with pytest.raises(ArtifactError, match="is damaged"):
        stage()


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b'{"key": 1}'])
def test_a_record_that_cannot_be_read_is_damage(root: Path, content: bytes) -> None:
    path = root / "stages" / f"{'0' * 64}.json"
    path.parent.mkdir()
    path.write_bytes(content)
    for remove in (False, True):
        assert dict(check(root, remove=remove).damaged).keys() == {f"stages/{'0' * 64}.json"}
    assert not path.exists()
    assert check(root).damaged == ()


@pytest.mark.parametrize("key", ["0" * 64, "../../victim"])
def test_a_record_under_another_name_is_damage_and_nothing_else_is_touched(
    root: Path, tmp_path: Path, key: str
) -> None:
    (tmp_path / "victim.json").write_text("mine")
    stage = graph(root, "head")
    data = json.loads(record_path(root, stage).read_bytes())
    record_path(root, stage).write_text(json.dumps(data | {"key": key}))
    list_store(root)
    assert dict(check(root).damaged).keys() == {record_path(root, stage).relative_to(root).as_posix()}
    prune_store(root)
    assert (tmp_path / "victim.json").read_text() == "mine"


def test_a_bundle_in_a_folder_of_any_name_is_registered(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"b\xffndel")
    bundle(root, folder)
    assert prune_store(root) == []
    open_bundle(folder)


def test_a_bundle_points_to_the_latest_store_first_and_forgets_old_ones(tmp_path: Path) -> None:
    stores = [tmp_path / f"store{number}" for number in range(6)]
    for store in (*stores, stores[4]):
        bundle(store, tmp_path / "one", head=stores.index(store))
    lines = (tmp_path / "one" / ".store").read_bytes().splitlines()
    assert lines == [os.fsencode(stores[number]) for number in (4, 5, 3, 2)]
    assert not [path for path in (tmp_path / "one").iterdir() if is_partial_of(path.name)]
    assert open_bundle(tmp_path / "one").store == stores[4]
