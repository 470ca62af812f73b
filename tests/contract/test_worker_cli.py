"""`worker` and `generate --worker`, as a session of a render farm uses them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from conftest import run_cli
from l2p_runtime import HostError
from l2p_runtime.worker import stop_worker, worker_status

if TYPE_CHECKING:
    from conftest import Bundles

KIND = "tiny-16-fused"
IMAGE = ("--prompt", "a red circle", "--size", "32x32", "--steps", 2)


@contextmanager
def started(bundle: Path, socket: Path, *options: str | Path) -> Iterator[dict[str, str]]:
    """A worker in the background."""
    result = run_cli("worker", "start", bundle, "--socket", socket, "--json", *options)
    assert result.returncode == 0, result.stderr
    try:
        yield json.loads(result.stdout)
    finally:
        with suppress(HostError):
            stop_worker(socket)


@pytest.fixture(scope="module")
def bundle(bundles: Bundles) -> Path:
    return bundles.path(KIND)


@pytest.fixture(scope="module")
def socket(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The socket of a worker that several tests draw with."""
    path = tmp_path_factory.mktemp("session") / "own" / "socket"
    with started(bundle, path):
        yield path


def test_an_image_has_the_bytes_of_one_that_is_drawn_without_it(bundle: Path, socket: Path, tmp_path: Path) -> None:
    outs = [tmp_path / "own.png", tmp_path / "worker.png"]
    results = [
        run_cli("generate", bundle, *IMAGE, "--seed", 3, "--out", outs[0], "--json"),
        run_cli("generate", bundle, *IMAGE, "--seed", 3, "--out", outs[1], "--json", "--worker", socket),
    ]
    assert [result.returncode for result in results] == [0, 0], results[1].stderr
    own, other = (json.loads(result.stdout) for result in results)
    assert other == own | {"out": str(outs[1])}
    assert outs[0].read_bytes() == outs[1].read_bytes()


def test_frames_tell_the_farm_and_the_failed_ones(bundle: Path, socket: Path, tmp_path: Path) -> None:
    (tmp_path / "x.0003.png").mkdir()
    words = ("--frames", "1-5x2", "--out", "x.####.png", "--progress-format", "openjd", "--worker", socket)
    result = run_cli("generate", bundle, *IMAGE, *words, cwd=tmp_path)
    assert result.returncode == 6, result.stderr
    lines = result.stdout.splitlines()
    assert lines[-1] == "openjd_fail: 1 of 3 frames failed: 3"
    shares = [float(line.removeprefix("openjd_progress: ")) for line in lines[:-1]]
    assert shares == sorted(shares)
    assert shares[0] > 0
    assert "note: frame 3 failed" in result.stderr
    assert sorted(path.name for path in tmp_path.glob("*.png") if path.is_file()) == ["x.0001.png", "x.0005.png"]
    (tmp_path / "x.0003.png").rmdir()
    again = run_cli("generate", bundle, *IMAGE, *words, "--skip-existing", cwd=tmp_path)
    assert again.returncode == 0
    assert again.stdout.endswith("1 frame written into " + str(tmp_path / "x.####.png") + ", 2 were there\n")


def test_what_is_wrong_with_a_request_is_told_as_without_a_worker(bundle: Path, socket: Path, tmp_path: Path) -> None:
    for words in (
        ("--size", "33x32"),
        ("--steps", 0),
        ("--out", tmp_path / "no" / "x.png"),
        ("--negative-embeddings", __file__),
        ("--frames", "1-5"),
    ):
        command = ("generate", bundle, "--prompt", "x", "--out", tmp_path / "x.png", *words)
        own, other = run_cli(*command), run_cli(*command, "--worker", socket)
        assert own.returncode == other.returncode == 2, (words, own.stderr, other.stderr)
        assert _error(own.stderr) == _error(other.stderr)
    assert run_cli("generate", bundle, *IMAGE, "--out", tmp_path / "x.png", "--worker", socket).returncode == 0


def _error(text: str) -> str:
    return text[text.index("error: ") :]


@pytest.mark.parametrize("frames", [(), ("--frames", "1-2")])
def test_the_folder_of_what_is_drawn_is_made_on_request(
    frames: tuple[str, ...], bundle: Path, socket: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a" / "b" / "x.##.png"
    words = ("generate", bundle, *IMAGE, *frames, "--out", out)
    for place in ((), ("--worker", socket)):
        assert run_cli(*words, *place).returncode == 2
        assert run_cli(*words, *place, "--make-folder", "--dry-run").returncode == 0
        assert not (tmp_path / "a").exists()
        assert run_cli(*words, *place, "--make-folder").returncode == 0
        assert len(list(out.parent.iterdir())) == (2 if frames else 1)
        shutil.rmtree(tmp_path / "a")


def test_another_bundle_and_other_options_are_refused(
    bundles: Bundles, bundle: Path, socket: Path, tmp_path: Path
) -> None:
    other = bundles.path("tiny-16")
    draws = ("generate", other, "--embeddings", "x.npy", "--out", tmp_path / "x.png")
    (tmp_path / "x.npy").write_bytes(b"")
    for command, text in (
        (draws, f"the worker serves `{bundle}`, expected `{other}`"),
        (("worker", "start", other), f"serves `{bundle}`"),
        (("generate", bundle, *IMAGE, "--plan", "fp32", "--out", tmp_path / "x.png"), "was started without --plan"),
        (("worker", "start", bundle, "--memory-budget", "1GiB"), "'memory_budget': '1GiB'"),
    ):
        option = "--worker" if command[0] == "generate" else "--socket"
        result = run_cli(*command, option, socket, cwd=tmp_path)
        assert result.returncode == 2, result.stderr
        assert text in result.stderr
    assert run_cli("worker", "start", bundle, "--socket", socket).returncode == 0, "the same worker is no other one"


def test_a_memory_budget_holds_in_a_worker(bundle: Path, tmp_path: Path) -> None:
    socket = tmp_path / "own" / "socket"
    with started(bundle, socket, "--memory-budget", "80MiB"):
        words = ("--worker", socket, "--prompt", "x", "--steps", 1, "--out", tmp_path / "x.png")
        result = run_cli("generate", bundle, *words, "--size", "128x128")
        assert result.returncode == 0, result.stderr
        large = run_cli("generate", bundle, *words, "--size", "1024x1024")
        own = run_cli("generate", bundle, *words[2:], "--size", "1024x1024", "--memory-budget", "80MiB")
        assert large.returncode == own.returncode == 3
        assert _error(large.stderr) == _error(own.stderr)


def test_sigterm_of_a_client_cancels_its_drawing(bundle: Path, socket: Path, tmp_path: Path) -> None:
    words = ("--prompt", "x", "--size", "128x128", "--steps", "1000", "--out", tmp_path / "x.####.png")
    command = [sys.executable, "-m", "l2p_export", "generate", bundle, *words, "--frames", "1-99", "--worker", socket]
    client = subprocess.Popen([*command, "--progress-format", "percent"], stdout=subprocess.PIPE)
    assert client.stdout is not None
    assert client.stdout.readline() == b"0%\n"
    client.send_signal(signal.SIGTERM)
    client.stdout.close()
    assert client.wait(20) == 143
    # The worker goes on with the next request.
    result = run_cli("generate", bundle, *IMAGE, "--out", tmp_path / "y.png", "--worker", socket)
    assert result.returncode == 0, result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["y.png"]


def test_a_killed_worker_is_told_and_its_socket_replaced(bundle: Path, tmp_path: Path) -> None:
    socket, out = tmp_path / "own" / "socket", tmp_path / "x.png"
    with started(bundle, socket) as facts:
        os.kill(int(facts["process"]), signal.SIGKILL)
        _wait(lambda: not _answers(socket))
        assert socket.exists()
        result = run_cli("generate", bundle, *IMAGE, "--out", out, "--worker", socket)
        assert result.returncode == 3
        assert "no worker listens at" in result.stderr
        assert run_cli("worker", "stop", "--socket", socket).returncode == 0
        with started(bundle, socket):
            assert run_cli("generate", bundle, *IMAGE, "--out", out, "--worker", socket).returncode == 0


def test_a_bundle_that_cannot_be_loaded_is_told_at_once(bundle: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(bundle, broken)
    next((broken / "graphs").glob("trunk.*.safetensors")).write_bytes(b"")
    result = run_cli("worker", "start", broken, "--socket", tmp_path / "own" / "socket")
    assert result.returncode == 4
    assert "error: " in result.stderr
    assert not (tmp_path / "own" / "socket").exists()


def test_a_bundle_that_was_built_anew_is_not_drawn_with_the_old_networks(bundle: Path, tmp_path: Path) -> None:
    copy, socket = tmp_path / "copy", tmp_path / "own" / "socket"
    shutil.copytree(bundle, copy)
    with started(copy, socket):
        manifest = copy / "bundle.json"
        manifest.write_bytes(manifest.read_bytes() + b"\n")
        result = run_cli("generate", copy, *IMAGE, "--out", tmp_path / "x.png", "--worker", socket)
        assert result.returncode == 4
        assert "was built anew since the worker loaded it" in result.stderr


def test_it_ends_with_the_folder_of_its_session(bundle: Path, tmp_path: Path) -> None:
    socket = tmp_path / "session" / "own" / "socket"
    with started(bundle, socket) as facts:
        process = os.pidfd_open(int(facts["process"]))
        shutil.rmtree(tmp_path / "session")
        _wait(lambda: _has_ended(process))
        os.close(process)


def test_what_is_no_request_of_this_version_is_refused(bundle: Path, socket: Path) -> None:
    from l2p_runtime import ArtifactError, UsageError
    from l2p_runtime import __version__ as version
    from l2p_runtime.worker import request_drawing

    whole = {"version": version, "bundle": str(bundle), "arguments": ["--out=x.png"]}
    for change, kind, text in (
        ({"version": "0.0"}, HostError, "its client version '0.0'"),
        ({"bundle": 3}, UsageError, "expected `3`"),
        ({"arguments": "x"}, ArtifactError, "no list of arguments"),
        ({"arguments": ["--fly"]}, UsageError, "No such option"),
        ({"arguments": ["--help"]}, UsageError, "asks for help"),
        ({"arguments": []}, UsageError, "Missing option '--out'"),
    ):
        with pytest.raises(kind, match=text):
            request_drawing(socket, {**whole, **change}, lambda event: None)


def test_a_worker_and_a_server_are_not_both_asked(socket: Path, tmp_path: Path) -> None:
    words = ("--prompt", "x", "--out", "x.png", "--worker", socket, "--server", "grpc://localhost:1")
    result = run_cli("generate", *words, cwd=tmp_path)
    assert result.returncode == 2
    assert "--worker" in result.stderr


def _answers(socket: Path) -> bool:
    try:
        return bool(worker_status(socket))
    except HostError:
        return False


def _has_ended(process: int) -> bool:
    import select

    return bool(select.select([process], [], [], 0)[0])


def _wait(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)
