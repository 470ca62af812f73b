"""Frames on a bad day: kills at any moment, a disk that fills up, folders and files that are not as they should be."""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import Bundles, run_cli
from tools.mounts import mounted

STOPPED_SECONDS = 10
"""What a stop may take: the rest of one call into a library, and of one file."""


@pytest.fixture(scope="module")
def bundle(bundles: Bundles) -> Path:
    return bundles.path("tiny-16-fused")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "shot").mkdir()
    return tmp_path / "shot"


def command(bundle: Path, folder: Path, frames: str, *arguments: str, suffix: str = ".png") -> list[str]:
    call = ["generate", str(bundle), "--prompt", "a circle", "--size", "32x32", "--frames", frames, "--seed-per-frame"]
    return [*call, *arguments, "--out", str(folder / f"s.####{suffix}")]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def kill_until_done(call: list[str], folder: Path, frames: int, kills: int, seed: int) -> list[int]:
    """Start a command again and again, and kill it at random moments; the codes that it ended with.

    Each run gets as far as its first new frame at least, and all kills together over most of the frames.
    """
    source = random.Random(seed)  # noqa: S311 - moments, not secrets
    codes: list[int] = []
    while len(codes) < 4 * frames + kills:
        wanted = _count(folder) + source.randint(1, max(3 * frames // (2 * (kills + 1)), 1))
        with subprocess.Popen(
            [sys.executable, "-m", "l2p_export", *call],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=_default_interrupt,  # noqa: PLW1509
        ) as process:
            if len(codes) < kills:
                while process.poll() is None and _count(folder) < wanted:
                    time.sleep(0.002)
                time.sleep(source.random() * 0.1)
                signum = source.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
                started = time.monotonic()
                process.send_signal(signum)
                process.wait(60)
                if signum != signal.SIGKILL and process.returncode:
                    assert time.monotonic() - started < STOPPED_SECONDS
                    assert not list(folder.glob(".*"))
            codes.append(process.wait(300))
        if codes[-1] == 0:
            return codes
    raise AssertionError(codes)


def _default_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _count(folder: Path) -> int:
    return sum(not path.name.startswith(".") for path in folder.iterdir())


def check_kills(bundle: Path, tmp_path: Path, suffix: str, frames: int, kills: int) -> list[int]:
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    calm.mkdir()
    killed.mkdir()
    call = (f"1-{frames}", "--steps", "8", "--skip-existing")
    result = run_cli(*command(bundle, calm, *call, suffix=suffix))
    assert result.returncode == 0, result.stderr
    codes = kill_until_done(command(bundle, killed, *call, suffix=suffix), killed, frames, kills, 7)
    assert files(killed) == files(calm)
    assert len(files(calm)) == frames
    # Never 0 after a signal, unless all was done when it came.
    assert set(codes[:-1]) <= {-signal.SIGKILL, 143, 130}
    return codes


@pytest.mark.parametrize("suffix", [".png", ".exr"])
def test_a_shot_that_is_killed_is_the_same_shot(suffix: str, bundle: Path, tmp_path: Path) -> None:
    codes = check_kills(bundle, tmp_path, suffix, frames=40, kills=3)
    assert len(codes) >= 3


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_thousand_frames_and_forty_kills(bundle: Path, tmp_path: Path) -> None:
    codes = check_kills(bundle, tmp_path, ".exr", frames=1000, kills=44)
    assert sum(code != 0 for code in codes) >= 40


def test_a_disk_that_is_full_in_the_fifth_of_ten_frames(bundle: Path, tmp_path: Path) -> None:
    # A frame of 32x32 takes one page of 4 KiB.
    with mounted(tmp_path / "small", "size=16k") as disk:
        call = command(bundle, disk, "1-10", "--steps", "1")
        result = run_cli(*call, "--json")
        assert result.returncode == 6, result.stderr
        facts = json.loads(result.stdout)
        assert facts["written"] == 4
        assert [failed["frame"] for failed in facts["failed"]] == [5, 6, 7, 8, 9, 10]
        assert all("No space left on device" in failed["reason"] for failed in facts["failed"])
        assert "error: 6 of 10 frames failed: 5-10" in result.stderr
        assert sorted(files(disk)) == [f"s.000{frame}.png" for frame in range(1, 5)]
        subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)
        result = run_cli(*call, "--skip-existing")
        assert result.returncode == 0, result.stderr
        assert "6 frames written" in result.stdout
        assert len(files(disk)) == 10


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_drawn(bundle: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "fixed", "size=64k") as disk:
        call = command(bundle, disk, "1-3", "--steps", "1")
        assert run_cli(*call).returncode == 0
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for arguments in ((), ("--dry-run",)):
            result = run_cli(*call, *arguments)
            assert result.returncode == 3, result.stderr
            assert "cannot write" in result.stderr
            assert "Read-only file system" in result.stderr
        assert run_cli(*call, "--skip-existing").returncode == 0
        assert len(files(disk)) == 3


@pytest.mark.parametrize("line", ['{"frame": 7, "promt": "x"}', "no json", '{"frame": 7, "seed": "x"}'])
def test_a_wrong_line_leaves_everything_as_it_is(line: str, bundle: Path, folder: Path, tmp_path: Path) -> None:
    (folder / "s.0003.png").write_bytes(b"what is there")
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text("".join(f'{{"frame": {frame}, "prompt": "p"}}\n' for frame in range(1, 7)) + line)
    for frames in ((), ("--frames", "1-3")):
        arguments = ("--size", "32x32", "--prompts", jobs, *frames, "--out", folder / "s.####.png")
        result = run_cli("generate", bundle, *arguments)
        assert result.returncode == 2
        assert f"line 7 of `{jobs}`: " in result.stderr
    assert files(folder) == {"s.0003.png": b"what is there"}


def test_a_prompt_that_is_too_long_is_refused_before_anything_is_drawn(
    bundle: Path, folder: Path, tmp_path: Path
) -> None:
    jobs = tmp_path / "jobs.jsonl"
    lines = [{"frame": frame, "prompt": "word " * (600 if frame == 7 else 1)} for frame in range(1, 9)]
    jobs.write_text("\n".join(map(json.dumps, lines)))
    base = ("generate", bundle, "--size", "32x32", "--steps", 1, "--prompts", jobs, "--out", folder / "s.####.png")
    result = run_cli(*base)
    assert result.returncode == 2
    assert f"line 7 of `{jobs}`: the prompt has" in result.stderr
    assert "--truncate-prompt" in result.stderr
    assert not files(folder)
    assert run_cli(*base, "--frames", "1-6").returncode == 0
    assert run_cli(*base, "--truncate-prompt").returncode == 0
    assert len(files(folder)) == 8


def test_a_link_to_another_file_is_replaced_and_not_followed(bundle: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"precious")
    (folder / "s.0001.png").symlink_to(tmp_path / "precious")
    assert run_cli(*command(bundle, folder, "1", "--steps", "1")).returncode == 0
    assert (tmp_path / "precious").read_bytes() == b"precious"
    assert not (folder / "s.0001.png").is_symlink()


def test_a_farm_without_a_home_a_terminal_and_a_stderr(bundle: Path, folder: Path, tmp_path: Path) -> None:
    """Nothing is written but the frames: not into the home, the working folder or the folder for temporary files."""
    home, work, temporary = (tmp_path / name for name in ("home", "work", "temporary"))
    for path in (home, work, temporary):
        path.mkdir()
    home.chmod(0o500)
    environment = {"LC_ALL": "C", "PATH": os.environ["PATH"], "HOME": str(home), "TMPDIR": str(temporary)}
    for index, extra in enumerate(({}, {"HOME": "/nowhere/at/all"})):
        frames = f"{index}1-{index}2"
        line = [sys.executable, "-m", "l2p_export", *command(bundle, folder, frames, "--steps", "1")]
        words = shlex.join([*line, "--prompt", "ein Kreis, \u5706"])
        result = subprocess.run(
            ["sh", "-c", f"exec {words} </dev/null 2>&-"],
            cwd=work,
            env=environment | extra,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        assert (result.returncode, result.stdout) == (0, f"2 frames written into {folder}/s.####.png\n")
    assert sorted(files(folder)) == ["s.0001.png", "s.0002.png", "s.0011.png", "s.0012.png"]
    assert not [path for place in (home, work, temporary) for path in place.rglob("*")]
