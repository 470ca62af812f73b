"""`farm`: jobs of each manager, and a session of Open Job Description that runs one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from conftest import run_cli
from fakes.engine_bundles import add_engines
from l2p_runtime.bundle import open_bundle

if TYPE_CHECKING:
    from conftest import Bundles

KIND = "tiny-16-fused"
PROGRAM = Path(sys.executable).with_name("l2p-export")
OPENJD = Path(sys.executable).with_name("openjd")
IMAGE = ("--prompt", 'a "red" {{circle}}', "--size", "32x32", "--steps", 2)
CUE = ("--show", "show", "--shot", "sh010", "--user", "artist")


def write(bundle: Path, out: Path, *options: str | int | Path, manager: str = "openjd") -> dict[str, object]:
    """Write a job; returns what `--json` prints."""
    words = ("--manager", manager, "--program", PROGRAM, "--frames", "1-40x2", *IMAGE, "--out", out, "--json")
    result = run_cli("farm", bundle, *map(str, words), *map(str, options))
    assert result.returncode == 0, result.stderr
    facts: dict[str, object] = json.loads(result.stdout)
    return facts


def session(job: Path) -> list[str | Path]:
    """The command that runs a job in one session."""
    return [OPENJD, "run", job / "template.json", "-p", f"file://{job / 'parameters.json'}"]


def test_a_session_loads_once_and_draws_all_frames_in_chunks(bundles: Bundles, tmp_path: Path) -> None:
    job = tmp_path / "a job"
    facts = write(bundles.path(KIND), job, "--chunk", 7)
    assert (facts["frames"], facts["tasks"]) == (20, 3)
    result = subprocess.run(session(job), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    frames = sorted(path.name for path in (job / "frames").iterdir())
    assert frames == [f"shot.{frame:04}.png" for frame in range(1, 40, 2)]
    log = result.stdout
    assert "Chunks run: 3" in log
    assert log.count("loaded ") == 1
    assert log.count("openjd_progress: 100.0") == 3
    assert "ended: asked to stop" in log


def test_a_failed_frame_fails_its_task_and_another_run_draws_what_is_missing(bundles: Bundles, tmp_path: Path) -> None:
    job = tmp_path / "job"
    write(bundles.path(KIND), job, "--chunk", 10, "--skip-existing")
    obstacle = job / "frames" / "shot.0003.png"
    obstacle.mkdir(parents=True)
    result = subprocess.run(session(job), capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "openjd_fail: 1 of 10 frames failed: 3" in result.stdout
    assert "exited with code: 6" in result.stdout
    assert "ended: asked to stop" in result.stdout
    obstacle.rmdir()
    again = subprocess.run(session(job), capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stdout
    assert "1 frame written into" in again.stdout
    assert len(list((job / "frames").iterdir())) == 20


def test_a_cancelled_session_ends_at_once_and_leaves_whole_frames(bundles: Bundles, tmp_path: Path) -> None:
    job = tmp_path / "job"
    write(bundles.path(KIND), job, "--chunk", 20, "--steps", 200, "--notice", 20)
    log = tmp_path / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(session(job), stdout=file, stderr=file)
    _wait(lambda: any((job / "frames").glob("*.png")))
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 1
    assert time.monotonic() - started < 15, "the notice was not waited for"
    text = log.read_text()
    assert "exited with code: 143" in text
    assert "ended: asked to stop" in text
    assert all(path.name.startswith("shot.") for path in (job / "frames").iterdir())


def test_a_bundle_that_is_not_there_fails_the_session(bundles: Bundles, tmp_path: Path) -> None:
    job = tmp_path / "job"
    write(bundles.path(KIND), job)
    command = [*session(job), "-p", f"Bundle={tmp_path}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "has no bundle.json" in result.stdout


def test_opencue_draws_with_the_words_of_its_command(bundles: Bundles, tmp_path: Path) -> None:
    job = tmp_path / "a job"
    write(bundles.path(KIND), job, *CUE, "--cores", 1, manager="opencue")
    layer = ET.parse(job / "job.xml").find("job/layers/layer")  # noqa: S314 - written here
    assert layer is not None
    command = str(layer.findtext("cmd")).replace("#FRAMESPEC#", "3-5x2")
    environment = {key.attrib["name"]: str(key.text) for key in layer.iter("key")}
    assert environment == {"OMP_NUM_THREADS": "1"}
    subprocess.run(["sh", "-c", command], check=True, env=os.environ | environment, cwd="/")
    assert sorted(path.name for path in (job / "frames").iterdir()) == ["shot.0003.png", "shot.0005.png"]


def test_the_memory_that_is_asked_for_is_the_budget_that_is_drawn_with(bundles: Bundles, tmp_path: Path) -> None:
    bundle = bundles.path(KIND)
    facts = write(bundle, tmp_path / "own")
    template = json.loads((tmp_path / "own" / "template.json").read_text())
    words = template["steps"][0]["script"]["actions"]["onRun"]["args"]
    budget = next(word for word in words if word.startswith("--memory-budget="))
    loads = template["steps"][0]["stepEnvironments"][0]["script"]["actions"]["onEnter"]["args"]
    assert budget in loads
    needs = facts["needs"]
    assert isinstance(needs, dict)
    assert needs["memory_mib"] > int(budget.removeprefix("--memory-budget=").removesuffix("MiB")) + 256
    given = write(bundle, tmp_path / "given", "--memory-budget", "2GiB")["needs"]
    assert isinstance(given, dict)
    assert 2048 * 1.05 + 256 <= given["memory_mib"] < 2048 * 1.05 + 260


def test_a_bundle_with_engines_asks_for_a_gpu(bundles: Bundles, tmp_path: Path) -> None:
    bundle = tmp_path / "engines.bundle"
    shutil.copytree(bundles.path("tiny-16"), bundle)
    add_engines(bundle, "fp32")
    embeddings = tmp_path / "x.npy"
    np.save(embeddings, np.zeros((3, open_bundle(bundle).manifest.model.caption_width), np.float32))
    words = ("--manager", "openjd", "--frames", "1-4", "--embeddings", embeddings, "--size", "64x64", "--json")
    found = {}
    for backend in ("auto", "rtx", "onnx", "onnx-cuda", "tensorrt"):
        out = tmp_path / backend
        result = run_cli("farm", bundle, *words, "--plan", "fp32", "--backend", backend, "--out", out)
        assert (result.returncode == 0) == (backend != "tensorrt"), result.stderr
        if result.returncode:
            assert "no engine in plan `fp32` for tensorrt" in result.stderr
            continue
        found[backend] = json.loads(result.stdout)["needs"]["gpu_memory_mib"]
        assert ("--memory-budget" in (out / "template.json").read_text()) == (backend == "onnx")
    assert found["onnx"] == 0
    # What a card keeps for itself, and weights and activations.
    assert 768 < found["rtx"] == found["auto"] <= 768 + 64
    assert 768 < found["onnx-cuda"] <= 768 + 64


def test_a_dry_run_writes_nothing_and_refuses_what_a_run_refuses(bundles: Bundles, tmp_path: Path) -> None:
    bundle, out = bundles.path(KIND), tmp_path / "job"
    words = ("farm", bundle, "--frames", "1-4", *IMAGE, "--out", out)
    for options, text in (
        (("--manager", "openjd", "--show", "x"), "--show belongs to --manager opencue"),
        (("--manager", "opencue"), "OpenCue wants a show and a shot"),
        (("--manager", "openjd", "--size", "33x32"), "33x32"),
        (("--manager", "openjd", "--frames", "1-10:3"), "--frame-dialect"),
        (("--manager", "openjd", "--pattern", "shot.png"), "expected a name with the frame in it"),
        (("--manager", "openjd", "--pattern", "shot.####.gif"), "shot"),
        (("--manager", "openjd", "--cores", 0), "'--cores': 0 is not in the range"),
        (("--manager", "openjd", "--out", bundle / "job"), "lies within"),
        (("--manager", "openjd", "--backend", "rtx"), "no engine"),
        (("--manager", "openjd", "--plan", "fp8"), "no plan `fp8`"),
    ):
        for dry in ((), ("--dry-run",)):
            result = run_cli(*words, *map(str, options), *dry)
            assert result.returncode in (2, 4), (options, result.stdout, result.stderr)
            assert text in result.stderr
    result = run_cli(*words, "--manager", "deadline-cloud", "--dry-run")
    assert result.returncode == 0, result.stderr
    assert f"would write {out / 'template.json'}" in result.stdout
    assert not out.exists()


@pytest.mark.parametrize(
    ("manager", "options", "submits"),
    [
        ("openjd", (), "openjd run {out}/template.json -p file://{out}/parameters.json"),
        ("deadline-cloud", (), "deadline bundle submit {out}"),
        ("opencue", CUE, "opencue.api.launchSpec"),
    ],
)
def test_what_to_do_with_a_job_is_told(
    manager: str, options: tuple[str, ...], submits: str, bundles: Bundles, tmp_path: Path
) -> None:
    out = tmp_path / "job"
    words = ("--manager", manager, "--frames", "1-4", *IMAGE, *options, "--out", out)
    result = run_cli("farm", bundles.path(KIND), *map(str, words))
    assert result.returncode == 0, result.stderr
    assert "4 frames in 1 task; each needs " in result.stdout
    assert submits.format(out=out) in result.stdout


def _wait(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)
