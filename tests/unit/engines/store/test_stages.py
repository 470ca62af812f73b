from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l2p_engines.store.stages import (
    Home,
    Stage,
    StageOutput,
    StageRunner,
    find_stage,
    named_by_content,
    run_stage,
    stage_key,
    stages,
    sweep_work,
)
from l2p_runtime.errors import ArtifactError

INPUTS = {"weights": "abc"}
CONTENT = b"a graph of some length"

MAKER = """
import sys
from pathlib import Path
from l2p_engines.store.stages import Home, StageOutput, run_stage

root, count = map(Path, sys.argv[1:])

def make(work):
    (work / "half").write_bytes(b"half a file")
    with count.open("a") as file:
        file.write("made\\n")
    print("making", flush=True)
    sys.stdin.readline()
    return StageOutput(facts="made by a child")

stage = run_stage(Home(root), "graph", "head", {"weights": "abc"}, make, lambda text: print(text, flush=True))
print(stage.facts, flush=True)
"""


class Maker:
    """Makes one file, and counts how often it was asked to."""

    def __init__(self, content: bytes = CONTENT) -> None:
        self.content = content
        self.calls = 0

    def __call__(self, work: Path) -> StageOutput:
        self.calls += 1
        assert list(work.iterdir()) == []
        (work / "partial").write_bytes(self.content)
        digest = hashlib.sha256(self.content).hexdigest()
        return StageOutput("graphs", ((named_by_content(work / "partial", "head.onnx", digest), digest),), {"n": 1})


def run(home: Home, make: Callable[[Path], StageOutput]) -> Stage:
    return run_stage(home, "graph", "head", INPUTS, make)


def record_path(root: Path) -> Path:
    return root / "stages" / f"{stage_key('graph', INPUTS)}.json"


@contextmanager
def child(root: Path, count: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that wants the stage; when it makes it, it goes on once it is sent a line."""
    command = [sys.executable, "-c", MAKER, str(root), str(count)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def flip_middle(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("shared", [False, True])
def test_a_stage_is_made_once_and_then_found(tmp_path: Path, shared: bool) -> None:
    home, make = Home(tmp_path, shared), Maker()
    made, found = run(home, make), run(home, make)
    assert make.calls == 1
    assert made == found == find_stage(home, made.key)
    assert stages(tmp_path) == [made]
    (record,) = made.files
    digest = hashlib.sha256(CONTENT).hexdigest()
    assert record.path == f"graphs/head.{digest[:16]}.onnx"
    assert (record.sha256, record.size_bytes, record.in_store) == (digest, len(CONTENT), shared)
    assert (tmp_path / record.path).read_bytes() == CONTENT
    assert found.facts == {"n": 1}
    assert list((tmp_path / ".work").iterdir()) == []


def test_files_are_synced_before_a_record_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[str, bool]] = []
    fsync = os.fsync

    def noted(handle: int) -> None:
        path = Path(f"/proc/self/fd/{handle}").readlink()
        synced.append((path.relative_to(tmp_path).parts[0], record_path(tmp_path).exists()))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    run(Home(tmp_path), Maker())
    # The file, its folder, the record, its folder.
    assert synced == [(".work", False), ("graphs", False), (".work", False), ("stages", True)]


def test_other_inputs_or_another_kind_are_another_stage(tmp_path: Path) -> None:
    home, make = Home(tmp_path), Maker()
    found = [
        run_stage(home, kind, "head", inputs, make)
        for kind, inputs in (("graph", INPUTS), ("trace", INPUTS), ("graph", {"weights": "abd"}), ("graph", {}))
    ]
    assert make.calls == len({stage.key for stage in found}) == 4
    # Equal content is one file all the same.
    assert len(list((tmp_path / "graphs").iterdir())) == 1


def test_a_label_decides_nothing(tmp_path: Path) -> None:
    make = Maker()
    for label in ("one", "two"):
        run_stage(Home(tmp_path), "graph", label, INPUTS, make)
    assert make.calls == 1


def test_a_runner_keeps_the_keys_of_what_it_ran(tmp_path: Path) -> None:
    runner = StageRunner(Home(tmp_path))
    outer = runner("graph", "head", INPUTS, lambda work: StageOutput(facts=runner("trace", "head", {}, Maker()).key))
    assert runner.keys == [stage_key("trace", {}), stage_key("graph", INPUTS)]
    assert outer.facts == runner.keys[0]
    runner.keys.clear()
    assert runner("graph", "head", INPUTS, Maker()) == outer
    assert runner.keys == [outer.key]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
OBJECTS = st.dictionaries(st.text(max_size=5), JSON, min_size=1, max_size=5)


def reordered(value: object) -> object:
    """The same JSON, its objects' keys in the opposite order, and tuples in place of lists."""
    if isinstance(value, dict):
        return {key: reordered(inner) for key, inner in reversed(value.items())}
    return tuple(map(reordered, value)) if isinstance(value, list) else value


def typed(value: object) -> object:
    """Compares as JSON does: True, 1 and 1.0 are three values, and so are 0.0 and -0.0; order of keys is none."""
    if isinstance(value, dict):
        return "object", frozenset((key, typed(inner)) for key, inner in value.items())
    return ("list", tuple(map(typed, value))) if isinstance(value, list) else (type(value).__name__, repr(value))


@given(inputs=OBJECTS)
def test_the_order_of_keys_does_not_matter(inputs: dict[str, object]) -> None:
    other = reordered(inputs)
    assert isinstance(other, dict)
    assert stage_key("graph", inputs) == stage_key("graph", other)
    assert stage_key("graph", inputs) == stage_key("graph", json.loads(json.dumps(inputs)))


@given(inputs=OBJECTS, data=st.data())
def test_any_changed_value_changes_the_key(inputs: dict[str, object], data: st.DataObject) -> None:
    name, value = data.draw(st.sampled_from(sorted(inputs))), data.draw(JSON)
    changed = {**inputs, name: value}
    assert (stage_key("graph", inputs) == stage_key("graph", changed)) == (typed(inputs) == typed(changed))
    assert stage_key("graph", inputs) != stage_key("trace", inputs)


@pytest.mark.parametrize(
    ("one", "other"),
    [(1, True), (1, 1.0), (1, "1"), (None, "null"), ([], {}), ([1, [2]], [[1], 2]), ("\ud800\udc00", "\U00010000")],
)
def test_values_that_look_alike_are_told_apart(one: object, other: object) -> None:
    assert stage_key("graph", {"x": one}) != stage_key("graph", {"x": other})


@pytest.mark.parametrize("error", [ArtifactError("a weight is NaN"), KeyboardInterrupt(), ZeroDivisionError()])
def test_a_failing_stage_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    def fail(work: Path) -> StageOutput:
        (work / "half").write_bytes(b"half a file")
        raise error

    home = Home(tmp_path)
    with pytest.raises(type(error)):
        run(home, fail)
    assert [path.name for path in tmp_path.rglob("*")] == [".work"]
    make = Maker()
    run(home, make)
    assert make.calls == 1


def test_a_killed_stage_is_cleared_by_the_next_run(tmp_path: Path) -> None:
    root, count = tmp_path / "home", tmp_path / "count"
    root.mkdir()
    with child(root, count) as process:
        assert line(process) == "making"
        process.kill()
    key = stage_key("graph", INPUTS)
    assert sorted(path.name for path in (root / ".work").iterdir()) == [key, f"{key}.lock"]
    assert not record_path(root).exists()
    make = Maker()
    assert run(Home(root), make).files
    assert make.calls == 1
    assert list((root / ".work").iterdir()) == []


def test_a_killed_stage_is_cleared_by_a_sweep(tmp_path: Path) -> None:
    root, count = tmp_path / "home", tmp_path / "count"
    root.mkdir()
    with child(root, count) as process:
        assert line(process) == "making"
        process.kill()
    assert sweep_work(root) == [root / ".work" / stage_key("graph", INPUTS)]
    assert list(root.iterdir()) == []
    assert sweep_work(root) == []


def test_a_sweep_leaves_what_a_live_process_makes(tmp_path: Path) -> None:
    root, count = tmp_path / "home", tmp_path / "count"
    root.mkdir()
    (root / ".work" / "dead").mkdir(parents=True)
    with child(root, count) as process:
        assert line(process) == "making"
        assert sweep_work(root) == [root / ".work" / "dead"]
        assert (root / ".work" / stage_key("graph", INPUTS) / "half").exists()
        assert process.communicate("\n")[0] == "made by a child\n"
        assert process.returncode == 0
    assert [stage.facts for stage in stages(root)] == ["made by a child"]


def test_a_sweep_clears_a_record_that_was_half_written(tmp_path: Path) -> None:
    # A bundle's registration is written in `.work` itself, and a kill can leave it there.
    (tmp_path / ".work").mkdir()
    (tmp_path / ".work" / "0123.json").write_text('{"path')
    assert sweep_work(tmp_path) == [tmp_path / ".work" / "0123.json"]
    assert list(tmp_path.iterdir()) == []


def test_two_processes_that_want_one_stage_make_it_once(tmp_path: Path) -> None:
    root, count = tmp_path / "home", tmp_path / "count"
    root.mkdir()
    with child(root, count) as first:
        assert line(first) == "making"
        with child(root, count) as second:
            assert line(second) == "another process is making `head`; waiting for it"
            assert first.communicate("\n")[0] == "made by a child\n"
            assert line(second) == "made by a child"
            assert second.wait() == 0
    assert count.read_text() == "made\n"


def test_who_waits_for_a_killed_process_makes_the_stage(tmp_path: Path) -> None:
    root, count = tmp_path / "home", tmp_path / "count"
    root.mkdir()
    with child(root, count) as first:
        assert line(first) == "making"
        with child(root, count) as second:
            assert "waiting" in line(second)
            first.kill()
            assert line(second) == "making"
            assert second.communicate("\n")[0] == "made by a child\n"
    assert count.read_text() == "made\nmade\n"


@pytest.mark.parametrize("shared", [False, True])
def test_a_stage_whose_file_is_missing_is_made_again(tmp_path: Path, shared: bool) -> None:
    home, make = Home(tmp_path, shared), Maker()
    stage = run(home, make)
    (tmp_path / stage.files[0].path).unlink()
    assert find_stage(home, stage.key) is None
    assert run(home, make) == stage
    assert make.calls == 2
    assert (tmp_path / stage.files[0].path).read_bytes() == CONTENT


def shorten(path: Path) -> None:
    path.write_bytes(CONTENT[:-1])


def link_away(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


@pytest.mark.parametrize("damage", [flip_middle, shorten, link_away])
def test_a_changed_file_is_made_again_in_an_own_home(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    home, make = Home(tmp_path), Maker()
    stage = run(home, make)
    path = tmp_path / stage.files[0].path
    damage(path)
    assert run(home, make) == stage
    assert make.calls == 2
    assert not path.is_symlink()
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("damage", [flip_middle, shorten, link_away])
def test_a_changed_file_of_a_shared_home_is_told(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    home, make = Home(tmp_path, is_shared=True), Maker()
    stage = run(home, make)
    damage(tmp_path / stage.files[0].path)
    with pytest.raises(ArtifactError, match=rf"the store `{tmp_path}` is damaged: .*{stage.files[0].path}") as caught:
        run(home, make)
    assert f"l2p-export store check {tmp_path} --remove" in caught.value.hint
    assert make.calls == 1


def altered(record: bytes, **values: object) -> bytes:
    return json.dumps(json.loads(record) | values).encode()


def with_path(record: bytes, path: str) -> bytes:
    data = json.loads(record)
    data["files"][0]["path"] = path
    return json.dumps(data).encode()


RECORDS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda record: b"",
    "truncated": lambda record: record[: len(record) // 2],
    "no UTF-8": lambda record: b"\xff" + record,
    "nested": lambda record: b"[" * 100_000,
    "null": lambda record: b"null",
    "list": lambda record: b"[" + record + b"]",
    "endless number": lambda record: record.replace(b": 1,", b": " + b"9" * 5000 + b",", 1),
    "unknown key": lambda record: altered(record, extra=1),
    "wrong type": lambda record: altered(record, files={"0": 1}),
    "another's": lambda record: altered(record, key="0" * 64),
    "no digest": lambda record: record.replace(hashlib.sha256(CONTENT).hexdigest().encode(), b"beef"),
    "huge": lambda record: record + b" " * (17 << 20),
    "climbing path": lambda record: with_path(record, "graphs/../../victim"),
    "absolute path": lambda record: with_path(record, "/etc/passwd"),
    "path outside the folders": lambda record: with_path(record, "stages/x.json"),
}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("case", RECORDS)
def test_a_record_that_cannot_be_trusted_counts_as_none(tmp_path: Path, case: str, shared: bool) -> None:
    root, victim = tmp_path / "home", tmp_path / "victim"
    root.mkdir()
    victim.write_bytes(CONTENT)
    home, make = Home(root, shared), Maker()
    stage = run(home, make)
    good = record_path(root).read_bytes()
    record_path(root).write_bytes(RECORDS[case](good))
    assert find_stage(home, stage.key) is None
    assert run(home, make) == stage
    assert make.calls == 2
    assert record_path(root).read_bytes() == good
    assert victim.read_bytes() == CONTENT


def test_records_that_cannot_be_read_do_not_hide_the_others(tmp_path: Path) -> None:
    stage = run(Home(tmp_path), Maker())
    (tmp_path / "stages" / "a.json").write_bytes(b"{")
    (tmp_path / "stages" / "z.json").symlink_to(tmp_path / "nowhere")
    assert stages(tmp_path) == [stage]


def test_labels_in_any_file_name_are_kept(tmp_path: Path) -> None:
    # A checkpoint's name is what the file system holds, and that need not be UTF-8.
    label = os.fsdecode(b"m\xffdel.safetensors")
    make = Maker()
    for _ in range(2):
        run_stage(Home(tmp_path), "digests", label, INPUTS, make)
    assert make.calls == 1
