"""A disk that is full or cannot be written, memory that is not there: code 3, a message that says which, no rest."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from conftest import Bundles, run_cli, write_profile
from tools.mounts import mounted

MIB = 1 << 20


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    return write_profile(tmp_path / "mine.toml", 16)


@pytest.fixture
def build(tiny_path: Path, profile: Path, bundles: Bundles) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A build whose traces are in a store already, unless it is given another store."""

    def run(out: Path, store: Path | None = None) -> subprocess.CompletedProcess[str]:
        return run_cli("build", tiny_path, "--profile", profile, "--store", store or bundles.store, "--out", out)

    return run


def test_no_room_is_told_before_any_work(tiny_path: Path, profile: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "size=4m") as disk:
        result = run_cli("build", tiny_path, "--profile", profile, "--out", disk / "out")
        assert list(disk.iterdir()) == []
    assert result.returncode == 3
    assert "bytes free, the build needs about" in result.stderr
    assert "hashing" not in result.stderr
    assert "hint: choose another --out" in result.stderr


def test_a_disk_that_fills_up_while_building(tiny_path: Path, profile: Path, tmp_path: Path) -> None:
    # Room for bytes and none for names: what was checked before holds, and writing fails all the same.
    with mounted(tmp_path / "full", "size=512m,nr_inodes=6") as disk:
        result = run_cli("build", tiny_path, "--profile", profile, "--out", disk / "out")
        assert not (disk / "out" / "bundle.json").exists()
        assert not list(disk.rglob("*.partial"))
        assert not list((disk / "out" / ".work").glob("*"))
    assert result.returncode == 3, result.stderr
    assert "No space left on device" in result.stderr
    assert "hint: free some space" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_output_that_cannot_be_written(
    build: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    with mounted(tmp_path / "fixed", "size=64m,ro") as disk:
        for result in (build(disk / "out"), build(disk / "deep" / "out"), build(tmp_path / "out", disk / "store")):
            assert result.returncode == 3, result.stderr
            assert "cannot write" in result.stderr
            assert "Read-only file system" in result.stderr
            assert "hint: choose another" in result.stderr
    assert not (tmp_path / "out").exists()


def test_an_old_bundle_that_cannot_be_written(
    build: Callable[..., subprocess.CompletedProcess[str]], bundles: Bundles, tmp_path: Path
) -> None:
    with mounted(tmp_path / "fixed", "size=64m") as disk:
        shutil.copytree(bundles.path("tiny-16"), disk / "out")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        result = build(disk / "out")
        assert run_cli("inspect", disk / "out").returncode == 0
    assert result.returncode == 3, result.stderr
    assert "cannot write" in result.stderr


def limited(kind: int, size: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(kind, (size, size))


@pytest.mark.parametrize("kind", [resource.RLIMIT_AS, resource.RLIMIT_DATA])
def test_a_memory_limit_is_told_before_any_work(kind: int, tiny_path: Path, profile: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "l2p_export", "build", str(tiny_path), "--profile", str(profile)]
    command += ["--out", str(tmp_path / "out")]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limited(kind, 520 * MIB),
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 3, result.stderr
    assert "bytes of memory" in result.stderr
    assert "hint: " in result.stderr
    assert "ulimit" in result.stderr
    assert not (tmp_path / "out").exists()


def test_two_builds_of_one_output(bundles: Bundles, profile: Path, tmp_path: Path) -> None:
    """Of weights that no other build has, so that both have graphs to write and to compare."""
    out = tmp_path / "out"
    state = load_file(bundles.checkpoint("tiny-16"))
    save_file({name: value * np.float32(0.5) for name, value in state.items()}, tmp_path / "half.safetensors")
    command = [sys.executable, "-m", "l2p_export", "build", str(tmp_path / "half.safetensors")]
    command += ["--profile", str(profile), "--store", str(bundles.store), "--out", str(out)]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    running = [subprocess.Popen(command, text=True, **pipes) for _ in range(2)]
    errors = {process.communicate()[1]: process.returncode for process in running}
    codes = sorted(errors.values())
    assert codes in ([0, 3], [0]), errors
    assert any("another build is writing" in text for text, code in errors.items() if code == 3)
    assert run_cli("verify", out, "--quiet").returncode == 0
