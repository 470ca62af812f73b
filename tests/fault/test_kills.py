"""A build that is stopped, or that meets another one: the right code at once, and nothing half-written."""

from __future__ import annotations

import fcntl
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import pytest

from conftest import run_cli, write_profile
from l2p_engines.store.stages import Home, StageOutput, run_stage
from l2p_export.cli.console import Console, Session
from l2p_export.cli.stopping import Stops, TerminatedError

STOPPED_SECONDS = 10
"""What a stop may take: the rest of one call into a library."""


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    return write_profile(tmp_path / "mine.toml", 16)


@contextmanager
def build(checkpoint: Path, profile: Path, out: Path, *, until: str) -> Iterator[subprocess.Popen[str]]:
    """A running build that has just printed `until`."""
    command = [sys.executable, "-m", "l2p_export", "build", str(checkpoint), "--profile", str(profile)]
    command += ["--out", str(out)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # A test run in the background of a shell inherits an ignored SIGINT, and its children would.
    with subprocess.Popen(command, **pipes, text=True, preexec_fn=_default_interrupt) as process:  # noqa: PLW1509
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if until in line:
                    break
            assert process.poll() is None, "the build ended early"
            assert (out / ".build.lock").is_file()
            yield process
        finally:
            process.kill()


def _default_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def stop(process: subprocess.Popen[str], signum: int) -> tuple[int, str]:
    """Signal a build; its exit code, and what it said after."""
    started = time.monotonic()
    process.send_signal(signum)
    stdout, stderr = process.communicate(timeout=60)
    assert time.monotonic() - started < STOPPED_SECONDS
    assert stdout == ""
    return process.returncode, stderr


@pytest.mark.parametrize(
    ("signum", "code", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_stopped_build(signum: int, code: int, word: str, tmp_path: Path, tiny_path: Path, profile: Path) -> None:
    out = tmp_path / "out"
    with build(tiny_path, profile, out, until="tracing `caption`") as process:
        found, stderr = stop(process, signum)
    assert found == code, stderr
    assert word in stderr
    assert "Traceback" not in stderr
    assert not out.exists()


def test_killed_build_leaves_no_bundle(tmp_path: Path, tiny_path: Path, profile: Path) -> None:
    out = tmp_path / "out"
    with build(tiny_path, profile, out, until="`caption` ...") as process:
        assert stop(process, signal.SIGKILL)[0] == -signal.SIGKILL
    assert not (out / "bundle.json").exists()
    result = run_cli("inspect", out)
    assert result.returncode == 4
    assert "unfinished build" in result.stderr
    assert "hint: run the same build again to finish it" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_build_after_a_stopped_one(signum: int, tmp_path: Path, tiny_path: Path, profile: Path) -> None:
    out = tmp_path / "out"
    with build(tiny_path, profile, out, until="graph of `stem` ...") as process:
        stop(process, signum)
    result = run_cli("build", tiny_path, "--profile", profile, "--out", out)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in out.iterdir()) == ["bundle.json", "graphs", "reference", "stages"]
    assert not list(out.rglob("*.partial"))
    assert run_cli("verify", out).returncode == 0


def test_second_build_of_one_output(tmp_path: Path, tiny_path: Path, profile: Path) -> None:
    out = tmp_path / "out"
    (out / "graphs").mkdir(parents=True)
    (out / "graphs" / "stem.fp32.partial").write_text("the other build's")
    with (out / ".build.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = run_cli("build", tiny_path, "--profile", profile, "--out", out)
    assert result.returncode == 3, result.stderr
    assert f"another build is writing `{out}`" in result.stderr
    assert "hint: wait for it" in result.stderr
    assert (out / "graphs" / "stem.fp32.partial").read_text() == "the other build's"
    assert (out / ".build.lock").exists()


def test_a_refused_build_keeps_what_a_stopped_one_finished(tmp_path: Path, tiny_path: Path, profile: Path) -> None:
    out, store = tmp_path / "out", tmp_path / "file"
    store.write_text("no store")

    def make(work: Path) -> StageOutput:
        (work / "x.onnx").write_bytes(b"a trace that took minutes")
        return StageOutput("graphs", ((work / "x.onnx", "0" * 64),))

    out.mkdir()
    run_stage(Home(out), "graph", "x", {}, make)
    before = sorted(path for path in out.rglob("*") if path.is_file())
    assert len(before) == 2
    result = run_cli("build", tiny_path, "--profile", profile, "--store", store, "--out", out)
    assert result.returncode == 2, result.stderr
    assert sorted(path for path in out.rglob("*") if path.is_file()) == before


STOPPED_IMPORT = """
import os, signal
try:
    os.kill(os.getpid(), signal.{name})
    raise AssertionError("not reached")
except BaseException as error:
    # As a compiled module does with what is raised while it is loaded.
    {then}
"""


@pytest.mark.parametrize("then", ["raise ImportError(repr(error)) from None", "raise", "raise RuntimeError from error"])
@pytest.mark.parametrize(("name", "code", "word"), [("SIGTERM", 143, "terminated"), ("SIGINT", 130, "interrupted")])
def test_a_signal_while_a_library_is_imported(then: str, name: str, code: int, word: str, tmp_path: Path) -> None:
    (tmp_path / "onnxruntime.py").write_text(STOPPED_IMPORT.format(name=name, then=then))
    script = f"import sys, signal; sys.path.insert(0, {str(tmp_path)!r}); "
    script += "signal.signal(signal.SIGINT, signal.default_int_handler); sys.argv = ['l2p-export', 'doctor']; "
    result = run_script(script + "from l2p_export.cli.main import run; run()", tmp_path)
    assert (result.returncode, result.stderr.strip()) == (code, word)


@pytest.mark.parametrize(("signum", "kind"), [(signal.SIGTERM, TerminatedError), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_that_a_library_drops_stops_what_goes_on(signum: int, kind: type[BaseException]) -> None:
    stops = Stops()
    with click.Context(click.Command("x"), obj=Session(stops)):
        console = Console(quiet=True)
        with console.task("before") as advance, console.phases("too") as tell:
            advance(1)
            tell(0.5, "half")
            stops.arrived.append(signum)
            for go_on in (lambda: advance(1), lambda: tell(0.6, "more"), lambda: console.task("x").__enter__()):
                with pytest.raises(kind):
                    go_on()


BROKEN = """
import sys
import l2p_export.checkpoint.describe
from l2p_export.cli.main import run

def broken(*arguments, **options):
    raise {error}

l2p_export.checkpoint.describe.describe = broken
sys.argv = ["l2p-export", "inspect", "."]
run()
"""


@pytest.mark.parametrize(
    ("error", "code", "needles"),
    [
        ("ZeroDivisionError('boom')", 70, ("error: ZeroDivisionError: boom", "bug in l2p-export", "L2P_TRACEBACK=1")),
        ("KeyError('boom')", 70, ("error: KeyError: 'boom'", "bug in l2p-export")),
        ("MemoryError('boom')", 3, ("out of memory: boom", "hint: ")),
        ("OSError(28, 'No space left on device', 'disk')", 3, ("No space left on device `disk`", "free some space")),
        ("PermissionError(13, 'Permission denied', 'disk')", 3, ("Permission denied `disk`",)),
        ("KeyboardInterrupt", 130, ("interrupted",)),
    ],
)
def test_unknown_error(error: str, code: int, needles: tuple[str, ...], tmp_path: Path) -> None:
    result = run_script(BROKEN.format(error=error), tmp_path)
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    for needle in needles:
        assert needle in result.stderr


def run_script(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)


def test_traceback_of_our_bug_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("L2P_TRACEBACK", "1")
    result = run_script(BROKEN.format(error="KeyError('boom')"), tmp_path)
    assert result.returncode == 70
    assert "Traceback (most recent call last)" in result.stderr
