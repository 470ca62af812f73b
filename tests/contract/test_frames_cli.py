"""Frames of a shot through the command line, as an artist or a farm asks for them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import l2p_runtime.loaded
from conftest import Bundles, run_cli

KIND = "tiny-16-fused"
BASE = ("--size", "32x32", "--steps", "2")


@pytest.fixture(scope="module")
def bundle(bundles: Bundles) -> Path:
    return bundles.path(KIND)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "shot").mkdir()
    return tmp_path / "shot" / "s.####.png"


def draw(bundle: Path, out: Path, *arguments: object, code: int = 0) -> Any:
    result = run_cli("generate", bundle, *BASE, *map(str, arguments), "--out", out)
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    return result


def names(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir())


def pixels(path: Path) -> Any:
    with Image.open(path) as image:
        return np.asarray(image)


def jobs(folder: Path, *lines: object) -> Path:
    path = folder / "jobs.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_frames_are_the_pictures_of_single_calls(bundle: Path, out: Path, tmp_path: Path) -> None:
    """With guidance, so that the text encoder reads two texts for each frame."""
    call = ("--prompt", "a red circle", "--seed", 5, "--guidance", 2)
    result = draw(bundle, out, *call, "--frames", "-1,2-4x2", "--quiet")
    assert result.stdout == f"3 frames written into {out}\n"
    assert result.stderr == ""
    assert names(out) == ["s.-001.png", "s.0002.png", "s.0004.png"]
    draw(bundle, tmp_path / "one.png", *call)
    for path in out.parent.iterdir():
        assert (pixels(path) == pixels(tmp_path / "one.png")).all()


def test_a_frame_says_how_it_was_made(bundle: Path, out: Path) -> None:
    draw(bundle, out, "--prompt", "a red circle", "--frames", "-3", "--seed", 5, "--seed-per-frame")
    with Image.open(out.parent / "s.-003.png") as image:
        text = image.text
    assert (text["prompt"], text["seed"]) == ("a red circle", "5")
    parameters = json.loads(text["parameters"])
    assert (parameters["frame"], parameters["image_index"], parameters["seed"]) == (-3, 2**32 - 3, 5)
    assert (parameters["backend"], parameters["plan"], parameters["steps"]) == ("onnx", "fp32", 2)


def test_each_frame_has_its_own_noise_and_keeps_it(bundle: Path, out: Path) -> None:
    draw(bundle, out, "--prompt", "a", "--frames", "1-3", "--seed-per-frame")
    first = {name: (out.parent / name).read_bytes() for name in names(out)}
    assert len({pixels(out.parent / name).tobytes() for name in first}) == 3
    draw(bundle, out, "--prompt", "a", "--frames", "3,2", "--seed-per-frame")
    assert {name: (out.parent / name).read_bytes() for name in names(out)} == first


def test_prompts_by_frame(bundle: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[str] = []
    load = l2p_runtime.loaded.load_network
    monkeypatch.setattr(
        l2p_runtime.loaded, "load_network", lambda opened, network: (loads.append(network), load(opened, network))[1]
    )
    path = jobs(
        tmp_path,
        {"frame": 9, "prompt": "a red circle", "seed": 3},
        {"frame": 2, "prompt": "a blue square", "negative": "red", "guidance": 2, "size": "48x32", "out": "title.png"},
        {"frame": 7, "steps": 3},
    )
    result = draw(bundle, out, "--prompts", path, "--prompt", "of all", "--json")
    facts = json.loads(result.stdout)
    assert (facts["frames"], facts["count"], facts["written"], facts["failed"]) == ("9,2,7", 3, 3, [])
    assert names(out) == ["s.0007.png", "s.0009.png", "title.png"]
    assert loads.count("text_encoder") == 1
    assert loads.count("trunk") == 1
    for name, call in {
        "s.0009.png": ("--prompt", "a red circle", "--seed", 3),
        "title.png": ("--prompt", "a blue square", "--negative", "red", "--guidance", 2, "--size", "48x32"),
        "s.0007.png": ("--prompt", "of all", "--steps", 3),
    }.items():
        draw(bundle, tmp_path / "one.png", *call)
        np.testing.assert_array_equal(pixels(out.parent / name), pixels(tmp_path / "one.png"))
        with Image.open(out.parent / name) as image:
            assert image.text["prompt"] == call[1]


def test_only_the_frames_asked_for_are_drawn_of_a_prompts_file(bundle: Path, out: Path, tmp_path: Path) -> None:
    path = jobs(tmp_path, *({"frame": frame, "prompt": f"p {frame}"} for frame in range(5)))
    draw(bundle, out, "--prompts", path, "--frames", "3,1")
    assert names(out) == ["s.0001.png", "s.0003.png"]


def test_existing_frames_are_opened_and_what_does_not_read_is_drawn_again(bundle: Path, out: Path) -> None:
    call = ("--prompt", "a", "--frames", "1-6", "--seed-per-frame")
    draw(bundle, out, *call)
    whole = {name: (out.parent / name).read_bytes() for name in names(out)}
    two, three, four, five = (out.parent / f"s.000{frame}.png" for frame in (2, 3, 4, 5))
    two.write_bytes(whole[two.name][:-100])
    three.write_bytes(b"")
    Image.new("RGB", (16, 16)).save(four)
    five.unlink()
    kept = {name: (out.parent / name).stat().st_mtime_ns for name in ("s.0001.png", "s.0006.png")}
    result = draw(bundle, out, *call, "--skip-existing", "--json")
    facts = json.loads(result.stdout)
    assert (facts["written"], facts["skipped"]) == (4, 2)
    assert {name: (out.parent / name).read_bytes() for name in names(out)} == whole
    assert {name: (out.parent / name).stat().st_mtime_ns for name in kept} == kept
    result = draw(bundle, out, *call, "--skip-existing")
    assert result.stdout == f"0 frames written into {out}, 6 were there\n"


def test_a_frame_that_fails_is_named_and_the_others_are_there(bundle: Path, out: Path) -> None:
    for frame in (2, 4):
        (out.parent / f"s.000{frame}.png").mkdir()
    result = draw(bundle, out, "--prompt", "a", "--frames", "1-5", "--json", code=6)
    facts = json.loads(result.stdout)
    assert (facts["written"], facts["skipped"]) == (3, 0)
    assert [(failed["frame"], failed["out"]) for failed in facts["failed"]] == [
        (frame, str(out.parent / f"s.000{frame}.png")) for frame in (2, 4)
    ]
    assert "Is a directory" in facts["failed"][0]["reason"]
    assert "note: frame 2 failed: " in result.stderr
    assert "error: 2 of 5 frames failed: 2,4" in result.stderr
    assert "--skip-existing" in result.stderr
    assert names(out) == [f"s.000{frame}.png" for frame in range(1, 6)]


PROGRESS = {
    "openjd": r"openjd_progress: [0-9]+\.[0-9]",
    "percent": r"[0-9]+%",
    "afanasy": r"PROGRESS: [0-9]+%",
    "tractor": r"TR_PROGRESS [01][0-9][0-9]%",
}


@pytest.mark.parametrize("form", PROGRESS)
def test_progress_for_a_farm(form: str, bundle: Path, out: Path) -> None:
    result = draw(bundle, out, "--prompt", "a", "--frames", "1-4", "--progress-format", form)
    *lines, last = result.stdout.splitlines()
    assert last == f"4 frames written into {out}"
    assert len(lines) >= 5
    assert "\r" not in result.stdout
    shares = [re.fullmatch(PROGRESS[form], line) and re.findall(r"[0-9.]+", line)[0] for line in lines]
    assert [float(share) for share in shares] == sorted(float(share) for share in shares)
    assert float(shares[-1]) == 100
    assert result.stderr == ""


def test_no_progress(bundle: Path, out: Path) -> None:
    result = draw(bundle, out, "--prompt", "a", "--frames", "1-2", "--progress-format", "none", "--json")
    assert json.loads(result.stdout)["written"] == 2
    assert result.stderr == ""
    result = draw(bundle, out, "--prompt", "a", "--frames", "1-2")
    assert "drawing 2 frames: done in" in result.stderr
    result = draw(bundle, out.parent / "one.png", "--prompt", "a", "--progress-format", "afanasy")
    assert result.stdout.splitlines() == ["PROGRESS: 50%", "PROGRESS: 100%", str(out.parent / "one.png")]


def test_a_failure_is_told_a_farm(bundle: Path, out: Path) -> None:
    (out.parent / "s.0002.png").mkdir()
    farm = ("--prompt", "a", "--progress-format", "openjd")
    result = draw(bundle, out, *farm, "--frames", "1-2", code=6)
    assert result.stdout.splitlines()[-1] == "openjd_fail: 1 of 2 frames failed: 2"
    assert "openjd_progress: 100.0" not in result.stdout
    result = draw(bundle, out, *farm, "--frames", "1-10:3", code=2)
    assert result.stdout.startswith("openjd_fail: frames `1-10:3` are 4 frames")
    assert draw(bundle, out, "--prompt", "a", "--frames", "x", "--progress-format", "afanasy", code=2).stdout == ""


def test_a_dry_run_counts_and_writes_nothing(bundle: Path, out: Path) -> None:
    call = ("--prompt", "a", "--frames", "1-10000000", "--frame-dialect", "openjd", "--dry-run")
    draw(bundle, out, "--prompt", "a", "--frames", "5,10")
    result = draw(bundle, out, *call[:2], "--frames", "1-10", "--dry-run")
    first, last = (out.parent / f"s.{number}.png" for number in ("0001", "0010"))
    assert result.stdout == f"would draw 10 frames into {first} to {last}; 2 of these files exist\n"
    facts = json.loads(draw(bundle, out, *call, "--json").stdout)
    assert (facts["count"], facts["existing"], facts["first"]) == (10_000_000, 2, str(first))
    assert facts["last"] == str(out.parent / "s.10000000.png")
    assert names(out) == ["s.0005.png", "s.0010.png"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--skip-existing",), "--skip-existing: there are no --frames"),
        (("--seed-per-frame", "--retries", "2"), "--seed-per-frame, --retries: there are no --frames"),
        (("--frame-dialect", "openjd"), "--frame-dialect: there are no --frames"),
        (("--frames", "1-2", "--json", "--progress-format", "openjd"), "both write to stdout"),
        (("--frames", "1-2", "--seed-per-frame", "--rng", "torch-cpu"), "one image per seed"),
        (("--frames", "1-1000000000"), "expected up to 10,000,000"),
        (("--frames", "1-10:3"), "4 frames (1, 4, 7, 10) in openjd and 10 frames"),
        (("--frames", "1-5,3-7", "--frame-dialect", "openjd"), "overlap at 3"),
        (("--frames", "1-2", "--coarse", "64x64"), "64x64"),
        (("--frames", "1-2", "--size", "33x32"), "does not divide"),
        (("--frames", "1-2", "--retries", "-1"), "--retries"),
        (("--frames", ""), "frames hold ''"),
    ],
)
def test_what_is_refused_before_anything_is_drawn(
    arguments: tuple[str, ...], says: str, bundle: Path, out: Path
) -> None:
    for dry in ((), ("--dry-run",)):
        result = draw(bundle, out, "--prompt", "a", *arguments, *dry, code=2)
        assert says in result.stderr
        assert names(out) == []


@pytest.mark.parametrize("name", ["s.png", "s.##.%04d.png", "s.%4d.png", "s.##.jpg", "##/s.png", "s.png.##"])
def test_names_that_are_refused(name: str, bundle: Path, out: Path) -> None:
    draw(bundle, out.parent / name, "--prompt", "a", "--frames", "1-2", code=2)
    assert names(out) == []


def test_a_server_draws_no_frames(out: Path) -> None:
    for arguments in (("--frames", "1-2"), ("--bits", "16"), ("--compression", "zip"), ("--retries", "1")):
        result = run_cli("generate", "--server", "http://127.0.0.1:9", "--prompt", "a", *arguments, "--out", out)
        assert result.returncode == 2
        assert arguments[0] in result.stderr


def test_a_memory_budget_has_room_for_the_frame_that_is_written(bundle: Path, out: Path) -> None:
    call = ("--prompt", "a", "--frames", "1-3", "--size", "128x128")
    refused = draw(bundle, out, *call, "--memory-budget", "70MiB", code=3)
    (wanted,) = re.findall(r"memory budget to ([0-9,]+) bytes", refused.stderr)
    assert names(out) == []
    least = int(wanted.replace(",", ""))
    assert least >= _least_of_one_image(bundle, out) + 2 * 3 * 128 * 128
    draw(bundle, out, *call, "--memory-budget", least - 1, code=3)
    draw(bundle, out, *call, "--memory-budget", least)
    assert len(names(out)) == 3


def _least_of_one_image(bundle: Path, out: Path) -> int:
    call = ("--prompt", "a", "--size", "128x128", "--memory-budget", "70MiB", "--dry-run")
    refused = draw(bundle, out.parent / "one.png", *call, code=3)
    (wanted,) = re.findall(r"memory budget to ([0-9,]+) bytes", refused.stderr)
    return int(wanted.replace(",", ""))
