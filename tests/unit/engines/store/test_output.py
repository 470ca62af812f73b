from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from l2p_engines.store.output import open_output, require_disk
from l2p_engines.store.stages import Home, StageOutput, run_stage
from l2p_runtime.errors import ArtifactError, HostError, ParityError, UsageError
from l2p_runtime.files import partial_path


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    root = tmp_path / "new" / "bundle"

    def fail() -> None:
        with open_output(root) as output:
            (output.root / "graphs").mkdir()
            (output.root / "graphs" / "x.onnx").write_bytes(b"x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not root.exists()


def test_a_failed_build_leaves_a_folder_that_was_there(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), open_output(tmp_path):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def stage(root: Path, name: str) -> None:
    def make(work: Path) -> StageOutput:
        (work / name).write_bytes(name.encode())
        return StageOutput("graphs", ((work / name, "0" * 64),))

    run_stage(Home(root), "graph", name, {"name": name}, make)


def ended_build(root: Path, error: BaseException, *names: str) -> dict[str, bytes]:
    """A build that ends with an error after some stages; every file that it leaves."""

    def build() -> None:
        with open_output(root):
            for name in names:
                stage(root, name)
            raise error

    with pytest.raises(type(error)):
        build()
    return {path.name: path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", [UsageError, ArtifactError, ParityError, HostError, RuntimeError, KeyboardInterrupt])
def test_a_refused_build_leaves_what_a_stopped_one_finished(kind: type[BaseException], tmp_path: Path) -> None:
    error = kind("refused")
    finished = ended_build(tmp_path, KeyboardInterrupt(), "first", "second")
    assert {"first", "second"} < finished.keys()
    assert len(finished) == 4
    assert ended_build(tmp_path, error) == finished
    assert ended_build(tmp_path, error, "first") == finished
    # A build that fails by itself would fail again; one that the machine or the user stopped goes on.
    is_final = kind in (UsageError, ArtifactError, ParityError)
    assert ("third" in ended_build(tmp_path, error, "third")) is not is_final
    with open_output(tmp_path) as output:
        assert (tmp_path / "graphs" / "first").read_bytes() == b"first"
        output.tidy(())
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_build_left_is_swept(tmp_path: Path) -> None:
    (tmp_path / "graphs").mkdir()
    (tmp_path / "graphs" / "head.fp32.partial").write_bytes(b"x")
    for name in ("bundle.json", ".store"):
        partial_path(tmp_path / name).write_bytes(b"{")
    (tmp_path / ".build.lock").touch()
    with open_output(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["notes.txt", "models", ".git", f".notes.txt.{'0' * 16}.partial"])
def test_folders_with_other_things_are_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(UsageError, match=name), open_output(tmp_path):
        pass
    assert (tmp_path / name).is_dir()


def test_files_and_links_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    for name in ("file", "link"):
        with pytest.raises(UsageError, match="not a folder"), open_output(tmp_path / name):
            pass


def test_a_second_build_of_one_folder_is_told_so(tmp_path: Path) -> None:
    with open_output(tmp_path / "x"), pytest.raises(HostError, match="another build"), open_output(tmp_path / "x"):
        pass


def test_a_dead_builds_lock_does_not_hold(tmp_path: Path) -> None:
    handle = os.open(tmp_path / ".build.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(handle, fcntl.LOCK_EX)
    os.close(handle)
    with open_output(tmp_path):
        pass


def test_an_unreadable_manifest_is_no_licence_to_delete(tmp_path: Path) -> None:
    (tmp_path / "graphs").mkdir()
    (tmp_path / "graphs" / "x.onnx").write_bytes(b"x")
    (tmp_path / "bundle.json").write_text("{")
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "record.json").write_text("{}")
    with open_output(tmp_path) as output:
        output.tidy(())
    # A build that is refused sweeps what it made, where it knows what that is.
    ended_build(tmp_path, UsageError("refused"), "made")
    kept = {"graphs/x.onnx", "graphs/made", "stages/record.json", "bundle.json"}
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} >= kept


def test_too_little_disk_is_said_before_any_work(tmp_path: Path) -> None:
    require_disk(tmp_path, 1)
    with pytest.raises(HostError, match="bytes free"):
        require_disk(tmp_path, 1 << 60)
