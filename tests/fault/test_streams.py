"""Standard streams that are closed, full or no longer read: the work is done and the code is right."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conftest import Bundles

COMMAND = (sys.executable, "-m", "l2p_export")


def run_shell(redirection: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command with its streams as a shell redirects them."""
    words = ["bash", "-c", f'"$@" {redirection}', "bash", *COMMAND, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def run_pipe(redirection: str, reader: str, *arguments: str | Path) -> tuple[int, str, str]:
    """Run a command whose output another one reads; its code, and what came through and past the pipe."""
    script = f'"$@" {redirection} | {reader}; echo "${{PIPESTATUS[0]}}"'
    words = ["bash", "-c", script, "bash", *COMMAND, *map(str, arguments)]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    *lines, code = result.stdout.splitlines()
    return int(code), "\n".join(lines), result.stderr


@pytest.mark.parametrize("redirection", ["2>&-", "<&-", "<&- 2>&-", "2>/dev/full", "2>&1 2>/dev/full"])
def test_a_result_without_stderr_or_stdin(redirection: str) -> None:
    result = run_shell(redirection, "plan", "--profile", "4k", "--json")
    assert result.returncode == 0
    assert json.loads(result.stdout)
    assert result.stderr == ""


@pytest.mark.parametrize("redirection", [">&-", "<&- >&- 2>&-", ">&- 2>/dev/full"])
def test_a_result_that_nobody_wants(redirection: str) -> None:
    result = run_shell(redirection, "plan", "--profile", "4k")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full", "<&- >&- 2>&-"])
@pytest.mark.parametrize(
    ("arguments", "code"),
    [(("nonsense",), 2), (("inspect", "."), 4), (("plan", "--size", "x"), 2), (("store", "ls", "."), 3)],
)
def test_an_error_that_cannot_be_told_keeps_its_code(redirection: str, arguments: tuple[str, ...], code: int) -> None:
    result = run_shell(redirection, *arguments)
    assert (result.returncode, result.stdout, result.stderr) == (code, "", "")


@pytest.mark.parametrize("arguments", [("plan", "--profile", "4k"), ("--help",), ("plan", "--help"), ("--version",)])
def test_a_result_that_cannot_be_written_is_an_error(arguments: tuple[str, ...]) -> None:
    result = run_shell(">/dev/full", *arguments)
    assert result.returncode == 3
    assert "error: No space left on device `stdout`" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("redirection", ["", "2>&1", "2>&-"])
@pytest.mark.parametrize("arguments", [("plan", "--profile", "4k"), ("plan", "--profile", "4k", "--json")])
def test_a_reader_that_goes_away_ends_a_command_silently(redirection: str, arguments: tuple[str, ...]) -> None:
    code, out, err = run_pipe(redirection, "true", *arguments)
    assert (code, out, err) == (141, "", "")


def test_a_reader_of_errors_that_goes_away_changes_no_code() -> None:
    code, out, err = run_pipe("2>&1", "true", "inspect", ".")
    assert (code, out, err) == (4, "", "")


def test_an_import_without_streams_writes_its_file(tiny_path: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole.safetensors"
    for redirection, code in (("2>&-", 0), ("<&- >&- 2>&-", 0), ("2>&1 >&-", 0)):
        result = run_shell(redirection, "import", tiny_path, "--out", whole)
        assert result.returncode == code
        assert whole.stat().st_size > tiny_path.stat().st_size // 2
        whole.unlink()
    assert run_pipe("2>&1", "true", "import", tiny_path, "--out", whole)[0] == 141
    assert whole.exists()


def test_a_bundle_draws_and_verifies_without_streams(bundles: Bundles, tmp_path: Path) -> None:
    bundle = bundles.path("tiny-16")
    embeddings, picture = tmp_path / "embeddings.npy", tmp_path / "picture.png"
    width = json.loads((bundle / "bundle.json").read_bytes())["model"]["caption_width"]
    np.save(embeddings, np.ones((5, width), np.float32))
    for redirection in ("2>&-", "<&- >&- 2>&-", "2>/dev/full"):
        result = run_shell(redirection, "generate", bundle, "--embeddings", embeddings, "--out", picture)
        assert result.returncode == 0
        assert picture.read_bytes().startswith(b"\x89PNG")
        picture.unlink()
    assert run_shell("2>&-", "verify", bundle, "--plan", "fp32").returncode == 0


def test_a_pipe_that_somebody_made_non_blocking_is_waited_for() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    with subprocess.Popen([*COMMAND, "plan", "--profile", "4k", "--json"], stdout=writing, stderr=writing) as process:
        os.close(writing)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(3)
        with os.fdopen(reading, "rb") as pipe:
            assert json.loads(pipe.read())
        assert process.wait(30) == 0
