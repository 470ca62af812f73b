"""Files and folders that are whole or absent, whoever else writes them and whatever interrupts the writer."""

from __future__ import annotations

import errno
import fcntl
import inspect
import json
import os
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l2p_runtime.files import (
    atomic_file,
    atomic_folder,
    commit_file,
    is_partial_of,
    partial_folder,
    partial_path,
    sweep_partials,
    sync_folder,
    write_bytes,
    write_json,
    write_text,
)

LETTERS, TURNS = (b"a", b"b", b"c"), 25


class StopError(BaseException):
    """Ends a block as SIGTERM does."""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is synced, by path, in order; and renames, as `-> TARGET`."""
    told: list[str] = []
    fsync, replace, rename = os.fsync, Path.replace, Path.rename

    def noted_fsync(handle: int) -> None:
        told.append(str(Path(f"/proc/self/fd/{handle}").readlink()))
        fsync(handle)

    def noted(move: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
        def moved(self: Path, target: Path) -> Path:
            told.append(f"-> {target}")
            return move(self, target)

        return moved

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted(replace))
    monkeypatch.setattr(Path, "rename", noted(rename))
    return told


@pytest.mark.parametrize("before", [None, b"", b"a longer content than the new one"])
def test_a_file_is_replaced_whole(tmp_path: Path, before: bytes | None) -> None:
    path = tmp_path / "x.bin"
    if before is not None:
        path.write_bytes(before)
    with atomic_file(path) as file:
        file.write(b"ne")
        file.flush()
        assert (path.read_bytes() if path.exists() else None) == before
        file.write(b"w")
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["x.bin"]


def test_bytes_text_and_json(tmp_path: Path) -> None:
    write_bytes(tmp_path / "bytes", b"\0\xff\n")
    write_text(tmp_path / "text", "\u7ea2\n")
    write_json(tmp_path / "json", {"a": (1, None), "\u7ea2": "x"})
    write_json(tmp_path / "indented", {"a": [1]}, indent=1)
    assert (tmp_path / "bytes").read_bytes() == b"\0\xff\n"
    assert (tmp_path / "text").read_bytes() == "\u7ea2\n".encode()
    assert (tmp_path / "json").read_bytes() == b'{"a": [1, null], "\\u7ea2": "x"}'
    assert (tmp_path / "indented").read_text() == json.dumps({"a": [1]}, indent=1)
    assert len(names(tmp_path)) == 4


def test_what_cannot_be_encoded_begins_no_file(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "x", "\udc80")
    with pytest.raises(TypeError):
        write_json(tmp_path / "x", {"a": object()})
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, StopError, OSError(errno.ENOSPC, "full")])
def test_an_exception_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, error: BaseException | type[BaseException]
) -> None:
    (tmp_path / "x").write_bytes(b"before")

    def write() -> None:
        with atomic_file(tmp_path / "x") as file:
            file.write(b"half")
            raise error

    with pytest.raises(type(error) if isinstance(error, BaseException) else error):
        write()
    assert names(tmp_path) == ["x"]
    assert (tmp_path / "x").read_bytes() == b"before"


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bytes(tmp_path / "x", b"before")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_bytes(tmp_path / "x", b"after")
    assert names(tmp_path) == ["x"]
    assert (tmp_path / "x").read_bytes() == b"before"


def test_the_file_is_synced_before_its_name_and_the_folder_after(tmp_path: Path, synced: list[str]) -> None:
    write_bytes(tmp_path / "x", b"x")
    first, *others = synced
    assert is_partial_of(Path(first).name, "x")
    assert Path(first).parent == tmp_path
    assert others == [f"-> {tmp_path / 'x'}", str(tmp_path)]


def test_a_work_folder_holds_the_temporary_file_and_the_target_folder_is_synced(
    tmp_path: Path, synced: list[str]
) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "records").mkdir()
    write_bytes(tmp_path / "records" / "x", b"x", work=tmp_path / "work")
    assert Path(synced[0]).parent == tmp_path / "work"
    assert synced[1:] == [f"-> {tmp_path / 'records' / 'x'}", str(tmp_path / "records")]
    assert names(tmp_path / "work") == []


def test_a_file_of_another_writer_is_synced_before_it_is_renamed(tmp_path: Path, synced: list[str]) -> None:
    partial = partial_path(tmp_path / "x")
    partial.write_bytes(b"x")
    commit_file(partial, tmp_path / "x")
    assert synced == [str(partial), f"-> {tmp_path / 'x'}", str(tmp_path)]
    assert (tmp_path / "x").read_bytes() == b"x"


def test_a_folder_is_synced_with_all_that_is_in_it(tmp_path: Path, synced: list[str]) -> None:
    with atomic_folder(tmp_path / "new") as partial:
        assert is_partial_of(partial.name, "new")
        (partial / "inner").mkdir()
        (partial / "inner" / "x").write_bytes(b"x")
        (partial / "y").write_bytes(b"y")
        (partial / "link").symlink_to("y")
        assert synced == []
    *before, renamed, after = synced
    inside = {partial, partial / "inner", partial / "inner" / "x", partial / "y"}
    assert set(map(Path, before)) == inside
    assert (renamed, after) == (f"-> {tmp_path / 'new'}", str(tmp_path))
    assert names(tmp_path) == ["new"]
    assert names(tmp_path / "new") == ["inner", "link", "y"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, StopError])
def test_an_exception_leaves_no_folder(tmp_path: Path, error: type[BaseException]) -> None:
    def fill() -> None:
        with atomic_folder(tmp_path / "new") as partial:
            (partial / "x").write_bytes(b"x")
            raise error

    with pytest.raises(error):
        fill()
    assert names(tmp_path) == []


def test_a_folder_replaces_a_folder_and_nothing_else(tmp_path: Path) -> None:
    for name in ("x", "y"):
        with atomic_folder(tmp_path / "new") as partial:
            (partial / name).touch()
    assert names(tmp_path / "new") == ["y"]
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "new")
    for name in ("file", "link"):
        with pytest.raises(NotADirectoryError) as caught, atomic_folder(tmp_path / name):
            pass
        assert str(caught.value.filename) == str(tmp_path / name)
    assert names(tmp_path) == ["file", "link", "new"]
    assert names(tmp_path / "new") == ["y"]


def test_a_folder_that_cannot_be_synced_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "before").touch()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), atomic_folder(tmp_path / "x") as partial:
        (partial / "after").touch()
    assert names(tmp_path) == ["x"]
    assert names(tmp_path / "x") == ["before"]


def test_a_temporary_folder_goes_with_what_was_not_moved_out_of_it(tmp_path: Path) -> None:
    with partial_folder(tmp_path / "x") as partial:
        (partial / "kept").write_bytes(b"x")
        (partial / "left").write_bytes(b"y")
        commit_file(partial / "kept", tmp_path / "kept")
    assert names(tmp_path) == ["kept"]


@pytest.fixture
def guessed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Digits that temporary names get next; afterwards random ones."""
    digits, real = ["0" * 16], secrets.token_hex
    monkeypatch.setattr(secrets, "token_hex", lambda count: digits.pop(0) if digits else real(count))
    return digits


@pytest.mark.parametrize("kind", ["file", "link", "dangling link", "folder"])
def test_what_was_planted_under_a_temporary_name_is_neither_followed_nor_removed(
    tmp_path: Path, guessed: list[str], kind: str
) -> None:
    planted, victim = tmp_path / f".x.{'0' * 16}.partial", tmp_path / "victim"
    victim.write_bytes(b"mine")
    if kind == "file":
        planted.write_bytes(b"planted")
    elif kind == "folder":
        planted.mkdir()
    else:
        planted.symlink_to(victim if kind == "link" else tmp_path / "nowhere")
    write_bytes(tmp_path / "x", b"new")
    assert guessed == []
    assert (tmp_path / "x").read_bytes() == b"new"
    assert not (tmp_path / "x").is_symlink()
    assert victim.read_bytes() == b"mine"
    assert names(tmp_path) == sorted([planted.name, "victim", "x"])


def test_names_that_are_all_taken_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "token_hex", lambda count: "0" * 16)
    planted = tmp_path / f".x.{'0' * 16}.partial"
    planted.write_bytes(b"planted")
    with pytest.raises(FileExistsError, match="every temporary name is taken") as caught:
        write_bytes(tmp_path / "x", b"new")
    assert caught.value.filename == str(tmp_path / "x")
    with pytest.raises(FileExistsError), atomic_folder(tmp_path / "x"):
        pass
    assert planted.read_bytes() == b"planted"
    assert names(tmp_path) == [planted.name]


def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"mine")
    (tmp_path / "x").symlink_to(tmp_path / "victim")
    write_bytes(tmp_path / "x", b"new")
    assert not (tmp_path / "x").is_symlink()
    assert (tmp_path / "victim").read_bytes() == b"mine"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_follow_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_bytes(tmp_path / "x", b"x")
        with atomic_folder(tmp_path / "folder"):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o777 & ~umask


def test_a_started_program_does_not_inherit_the_file(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "x") as file:
        assert not os.get_inheritable(file.fileno())


def test_an_error_names_the_file_that_was_wanted(tmp_path: Path) -> None:
    (tmp_path / "folder" / "full").mkdir(parents=True)
    (tmp_path / "file").touch()
    for path, error in [
        (tmp_path / "nowhere" / "x", FileNotFoundError),
        (tmp_path / "file" / "x", NotADirectoryError),
        (tmp_path / "folder", IsADirectoryError),
    ]:
        with pytest.raises(error) as caught:
            write_bytes(path, b"x")
        assert str(caught.value.filename) == str(path)
        assert ".partial" not in str(caught.value)
    with pytest.raises(FileNotFoundError) as caught, atomic_folder(tmp_path / "nowhere" / "x"):
        pass
    assert str(caught.value.filename) == str(tmp_path / "nowhere" / "x")
    assert names(tmp_path) == ["file", "folder"]


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that every user can reach; pytest's own are private."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


def as_nobody(call: Callable[[], object]) -> None:
    """Call without root's right to write everywhere."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        call()
    finally:
        if root:
            os.seteuid(0)


def test_a_folder_that_may_not_be_written_is_said(public: Path) -> None:
    (public / "x").write_bytes(b"before")
    public.chmod(0o555)
    with pytest.raises(PermissionError) as caught:
        as_nobody(lambda: write_bytes(public / "x", b"after"))
    assert str(caught.value.filename) == str(public / "x")
    assert (public / "x").read_bytes() == b"before"
    assert names(public) == ["x"]


def test_a_folder_that_may_be_written_and_not_read_is_written(public: Path) -> None:
    public.chmod(0o333)
    as_nobody(lambda: write_bytes(public / "x", b"x"))
    public.chmod(0o755)
    assert (public / "x").read_bytes() == b"x"


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EBADF, errno.ENOTSUP])
def test_a_file_system_that_cannot_sync_folders_is_left_at_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    real = os.fsync

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    write_bytes(tmp_path / "x", b"x")
    assert names(tmp_path) == ["x"]


def test_a_disk_that_fails_to_sync_a_folder_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failed(handle: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", failed)
    with pytest.raises(OSError, match="Input/output"):
        sync_folder(tmp_path)


def fill(path: Path, letter: bytes, turns: int) -> None:
    for _ in range(turns):
        with atomic_file(path) as file:
            for _ in range(16):
                file.write(letter * 4096)


def require_one_letter(path: Path) -> None:
    data = path.read_bytes()
    assert len(data) == 16 * 4096
    assert len(set(data)) == 1


def test_threads_that_write_one_path_leave_one_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with ThreadPoolExecutor(len(LETTERS)) as pool:
        running = [pool.submit(fill, path, letter, TURNS) for letter in LETTERS]
        while not all(writer.done() for writer in running):
            if path.exists():
                require_one_letter(path)
        for writer in running:
            writer.result()
    require_one_letter(path)
    assert names(tmp_path) == ["x"]


def test_processes_that_write_one_path_leave_one_whole_file(tmp_path: Path) -> None:
    imports = "import os, sys\nfrom pathlib import Path\nfrom l2p_runtime.files import atomic_file\n"
    # Each is the first process of its container.
    call = f"os.getpid = lambda: 1\nfill(Path(sys.argv[1]), sys.argv[2].encode(), {TURNS})"
    script = "\n".join([imports, inspect.getsource(fill), call])
    path = tmp_path / "x"
    commands = [[sys.executable, "-c", script, str(path), letter.decode()] for letter in LETTERS]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    while any(process.poll() is None for process in running):
        if path.exists():
            require_one_letter(path)
    for process in running:
        assert process.communicate()[1] == ""
        assert process.returncode == 0
    require_one_letter(path)
    assert names(tmp_path) == ["x"]


def test_what_a_killed_writer_left_is_swept(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"before")
    child = os.fork()
    if child == 0:
        try:
            with atomic_folder(tmp_path / "y") as partial, atomic_file(tmp_path / "x") as file:
                (partial / "z").write_bytes(b"z")
                file.write(b"half")
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert [is_partial_of(name) for name in names(tmp_path)] == [True, True, False]
    sweep_partials(tmp_path, "z")
    assert len(names(tmp_path)) == 3
    sweep_partials(tmp_path, "x")
    assert [is_partial_of(name, "y") for name in names(tmp_path)] == [True, False]
    sweep_partials(tmp_path)
    assert names(tmp_path) == ["x"]
    assert (tmp_path / "x").read_bytes() == b"before"


@pytest.mark.parametrize(
    "name",
    ["x.partial", ".x.partial", ".x.0123.partial", f".x.{'0' * 16}", f".x.{'G' * 16}.partial", f"x.{'0' * 16}.partial"],
)
def test_what_has_another_name_is_not_swept(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    sweep_partials(tmp_path)
    assert names(tmp_path) == [name]


def test_a_sweep_follows_no_link_and_needs_no_folder(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x").touch()
    partial_path(tmp_path / "x").symlink_to(tmp_path / "folder")
    sweep_partials(tmp_path)
    sweep_partials(tmp_path / "nowhere")
    assert names(tmp_path) == ["folder"]
    assert names(tmp_path / "folder") == ["x"]


# Bytes, since a file name is bytes; what is no UTF-8 comes as surrogates.
file_names = st.binary(min_size=1, max_size=255).map(
    lambda data: os.fsdecode(data.replace(b"\0", b"0").replace(b"/", b"_"))
)


@settings(max_examples=100, deadline=None)
@given(file_names.filter(lambda name: name not in (".", "..")))
def test_a_file_of_any_name_is_written(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        assert is_partial_of(partial_path(path).name, name)
        assert is_partial_of(partial_path(path).name)
        write_bytes(path, b"before")
        write_bytes(path, b"after")
        assert path.read_bytes() == b"after"
        assert names(Path(folder)) == [name]
        partial_path(path).touch()
        sweep_partials(Path(folder), name)
        assert names(Path(folder)) == [name]


@pytest.mark.parametrize("name", [".", "..", "/"])
def test_a_path_that_is_no_file_name_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    before = set(Path(name).parent.iterdir())
    with pytest.raises(OSError):  # noqa: PT011 - the kernel's word depends on the path
        write_bytes(Path(name), b"x")
    assert set(Path(name).parent.iterdir()) == before


WRITER = """
import sys, time
from pathlib import Path
from l2p_runtime.files import atomic_file, partial_folder

with atomic_file(Path(sys.argv[1]) / "o.png") as file, partial_folder(Path(sys.argv[1]) / "folder") as folder:
    file.write(b"half")
    file.flush()
    (folder / "x").write_bytes(b"half")
    print("writing", flush=True)
    time.sleep(60)
"""


def test_a_sweep_tells_a_killed_writer_from_a_running_one(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        partials = names(tmp_path)
        sweep_partials(tmp_path)
        assert names(tmp_path) == partials
        assert len(partials) == 2
        process.send_signal(signal.SIGKILL)
    assert names(tmp_path) == partials
    sweep_partials(tmp_path, "another")
    assert names(tmp_path) == partials
    sweep_partials(tmp_path)
    assert names(tmp_path) == []


def test_a_sweep_spares_what_this_process_writes(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "x") as file, atomic_folder(tmp_path / "folder") as folder:
        (folder / "y").write_bytes(b"y")
        sweep_partials(tmp_path)
        file.write(b"x")
        assert len(names(tmp_path)) == 2
    assert names(tmp_path) == ["folder", "x"]


def test_writers_and_sweeps_at_once(tmp_path: Path) -> None:
    def turn(index: int) -> None:
        for count in range(TURNS):
            if index % 2:
                sweep_partials(tmp_path)
            else:
                write_bytes(tmp_path / f"{index}", bytes([count]))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(turn, range(8)))
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == {
        str(index): bytes([TURNS - 1]) for index in range(0, 8, 2)
    }


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EBADF, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_only_what_is_old_is_swept(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(handle: int, mode: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    write_bytes(tmp_path / "x", b"x")
    new, old, folder = (partial_path(tmp_path / name) for name in ("new", "old", "folder"))
    new.touch()
    old.touch()
    folder.mkdir()
    for path in (old, folder):
        os.utime(path, (time.time() - 100_000,) * 2)
    sweep_partials(tmp_path)
    assert names(tmp_path) == sorted([new.name, "x"])
