"""`l2p-export train`: from nothing to adapters on a source, in steps too few to learn from."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from conftest import run_cli

TINY = ("--scenes", "16", "--autoencoder-steps", "2", "--steps", "2", "--batch", "4", "--samples", "4", "--quiet")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source, a corpus that it drew, and 1k adapters: all made by the command line."""
    root = tmp_path_factory.mktemp("train")
    made = run_cli("train", "source", "--out", root / "source", *TINY)
    assert (made.returncode, made.stdout) == (0, f"{root / 'source'}\n"), made.stderr
    draw = ("--count", "5", "--steps", "2", "--size", "64x64", "--batch", "2", "--quiet")
    made = run_cli("train", "corpus", root / "source", "--out", root / "corpus", *draw)
    assert (made.returncode, made.stdout) == (0, f"{root / 'corpus'}\n"), made.stderr
    made = run_cli(*transfer(root), "--out", root / "adapters.safetensors")
    assert made.returncode == 0, made.stderr
    return root


def transfer(root: Path, *more: str) -> tuple[str | Path, ...]:
    small = ("--size-px", "64", "--steps", "2", "--batch", "2", "--head-divisor", "8", "--quiet", "--licence", "MIT")
    small += ("--sampling-steps", "7", "--guidance", "2.5")
    return ("train", "transfer", root / "source", "--corpus", root / "corpus", *small, *more)


def test_adapters_are_what_was_trained(folder: Path) -> None:
    """No layer of the trunk is in the file; its digest is, and import makes a whole model of it."""
    with safe_open(folder / "adapters.safetensors", "pt") as file:
        names, metadata = set(file.keys()), file.metadata()
    stated = {name: metadata[name] for name in ("license", "l2p.steps", "l2p.guidance", "l2p.shift")}
    assert stated == {"license": "MIT", "l2p.steps": "7", "l2p.guidance": "2.5", "l2p.shift": "3"}
    assert {name.split(".")[1] for name in names if name.startswith("layers.")} == {"0", "5"}
    whole = folder / "whole.safetensors"
    made = run_cli("import", folder / "adapters.safetensors", "--source", folder / "source", "--out", whole)
    assert made.returncode == 0, made.stderr
    facts = json.loads(run_cli("inspect", whole, "--json", "--digest").stdout)
    assert facts["trunk_sha256"] == metadata["l2p.trunk_sha256"]
    adapters, merged = load_file(folder / "adapters.safetensors"), load_file(whole)
    assert all(merged[name].equal(tensor) for name, tensor in adapters.items())
    source = load_file(folder / "source" / "transformer" / "diffusion_pytorch_model.safetensors")
    frozen = [name for name in source if name.startswith(("layers.1.", "layers.2.", "layers.3.", "layers.4."))]
    assert frozen
    assert all(merged[name].equal(source[name]) for name in frozen)
    assert not adapters["layers.0.attention.to_q.weight"].equal(source["layers.0.attention.to_q.weight"])


def test_corpus_has_an_image_a_row(folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "corpus" / "metadata.jsonl").read_text().splitlines()]
    assert [row["seed"] for row in rows] == list(range(5))
    assert all((folder / "corpus" / row["file_name"]).is_file() for row in rows)
    assert len({row["sha256"] for row in rows}) == 5


def test_finished_work_is_not_done_again(folder: Path) -> None:
    started = time.monotonic()
    again = run_cli("train", "corpus", folder / "source", "--out", folder / "corpus", "--count", "5", "--steps", "2",
                    "--size", "64x64", "--batch", "2", "--json")  # fmt: skip
    assert json.loads(again.stdout)["drawn"] == 0
    before = (folder / "adapters.safetensors").stat().st_mtime_ns
    again = run_cli(*transfer(folder), "--out", folder / "adapters.safetensors")
    assert again.returncode == 0, again.stderr
    assert (folder / "adapters.safetensors").stat().st_mtime_ns == before
    assert time.monotonic() - started < 300


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--learning-rate", "0.001"), "learning_rate is 0.001"),
        (("--noise", "fresh"), "noise is 'fresh', it began with 'stored'"),
        (("--shift", "5"), "shift is 5.0, it began with 3.0"),
    ],
)
def test_other_settings_are_refused_by_name(folder: Path, more: tuple[str, ...], says: str) -> None:
    result = run_cli(*transfer(folder, *more), "--out", folder / "adapters.safetensors")
    assert result.returncode == 2
    assert says in result.stderr


def test_own_images(folder: Path, tmp_path: Path) -> None:
    """A folder as a user has it: a turned photo, a transparent drawing, captions in any script, keys of other tools."""
    photos = tmp_path / "photos"
    (photos / "more").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (90, 70), "red").save(photos / "1.jpg", exif=exif)
    Image.new("RGBA", (40, 40), (0, 0, 255, 99)).save(photos / "more" / "2.png")
    Image.new("RGB", (64, 64), "green").save(photos / "3.webp")
    captions = {"1.jpg": "a red wall", "more/2.png": "blue\u2028glass", "3.webp": "緑の草"}
    rows = [{"file_name": name, "text": text, "license": "CC0"} for name, text in captions.items()]
    metadata = photos / "metadata.jsonl"
    metadata.write_text(
        "\ufeff" + "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )

    out = tmp_path / "a.safetensors"
    own = ("--corpus", photos, "--noise", "fresh", "--holdout", "1", "--out", out)
    made = run_cli(*transfer(folder, "--json"), *own)
    assert made.returncode == 0, made.stderr
    assert "3 images: 1 upscaled, 1 cropped to squares, 1 turned upright, 1 put on white\n" in made.stderr
    facts = json.loads(made.stdout)
    assert (facts["images"], facts["held_out_images"], facts["image_changes"]["upscaled"]) == (3, 1, 1)
    with safe_open(out, "pt") as file:
        assert float(file.metadata()["l2p.holdout_loss"]) == facts["holdout_loss"] > 0

    changed = rows[0] | {"text": "a blue wall"}
    metadata.write_text("".join(json.dumps(row) + "\n" for row in (changed, *rows[1:])), encoding="utf-8")
    other = run_cli(*transfer(folder), *own)
    assert other.returncode == 2
    assert "is digest" in other.stderr

    (photos / "3.webp").write_bytes((photos / "3.webp").read_bytes()[:30])
    broken = run_cli(*transfer(folder), *own, "--work", tmp_path / "new")
    assert broken.returncode == 4
    assert "1 of 3 images cannot be trained on" in broken.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--holdout", "5"), 2, "5 of 5 images held out leave none to train on"),
        (("--holdout", "1.5"), 2, "expected a share below 1, or a number of images"),
        (("--size-px", "65"), 2, "expected a multiple of the 1k patch, 16 px"),
        (("--window-tokens", "9"), 2, "a window of 9 tokens is larger than an image of 64 px"),
        (("--variant", "9k"), 2, "9k"),
        (("--batch", "0"), 2, "batch"),
        (("--sampling-steps", "0"), 2, "steps"),
        (("--guidance", "nan"), 2, "guidance"),
        (("--init", "nowhere"), 2, "there is no adapter file `nowhere`"),
        (("--corpus", "nowhere"), 2, "there is no corpus"),
    ],
)
def test_wrong_calls(folder: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, says: str) -> None:
    result = run_cli(*transfer(folder, *arguments), "--out", tmp_path / "a.safetensors", "--work", tmp_path / "work")
    assert result.returncode == code
    assert says in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("corpus", "--count", "0"), "0 prompts with 1 seeds each"),
        (("corpus", "--seeds-per-prompt", "0"), "with 0 seeds each, expected 1 or more of both"),
        (("corpus", "--seed", "-1"), "seed is -1"),
        (("corpus", "--seed", str(2**64 - 1), "--count", "2"), f"seed is {2**64}"),
        (("corpus", "--size", "0x0"), "an image of 0x0 px"),
        (("corpus", "--size", "99999999x64", "--count", "1"), "pixels"),
        (("corpus", "SOURCE", "--guidance", "nan", "--count", "1"), "guidance is nan"),
        (("corpus", "SOURCE", "--shift", "inf", "--count", "1"), "shift inf"),
        (("source", "--seed", "-3"), "seed is -3"),
        (("source", "--size-px", "72"), "a size is 72 px, expected a multiple of 16 px from 64 px on"),
        (("source", "--size-px", "128", "--size-px", "48"), "a size is 48 px"),
        (("source", "--samples", "1"), "1 samples, expected 2 or more"),
        (("source", "--init", "nowhere"), "there is no source"),
    ],
)
def test_wrong_numbers_are_the_callers_mistake(
    folder: Path, tmp_path: Path, arguments: tuple[str, ...], says: str
) -> None:
    named = [folder / "source" if argument == "SOURCE" else argument for argument in arguments]
    result = run_cli("train", *named, "--out", tmp_path / "out")
    assert result.returncode == 2, result.stderr
    assert says in result.stderr
    assert not list(tmp_path.iterdir())


def test_quiet_training_says_nothing(folder: Path, tmp_path: Path) -> None:
    """Nor do the libraries beneath it; other scenes in the same work folder are made anew, not taken for the old."""
    work = folder / "source.training"
    before = (work / "latents-128.safetensors").read_bytes()
    more = ("--scenes", "8", "--autoencoder-steps", "2", "--steps", "2", "--batch", "4", "--samples", "0", "--quiet")
    result = run_cli("train", "source", "--out", tmp_path / "again", "--init", folder / "source", *more)
    assert (result.returncode, result.stderr) == (0, "")
    copy = tmp_path / "again.training"
    assert (copy / "latents-128.safetensors").stat().st_size < len(before)
    shutil.copyfile(work / "latents-128.safetensors", copy / "latents-128.safetensors")
    shutil.rmtree(tmp_path / "again")
    shutil.rmtree(copy / "transformer")
    result = run_cli("train", "source", "--out", tmp_path / "again", "--init", folder / "source", *more)
    assert result.returncode == 0, result.stderr
    assert (copy / "latents-128.safetensors").stat().st_size < len(before)


def test_samples_of_a_transfer(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    result = run_cli(*transfer(folder, "--samples", "2"), "--out", out)
    assert result.returncode == 0, result.stderr
    made = {path.name for path in (tmp_path / "a.training").iterdir()}
    assert {"samples.png", "scores.csv", "progress.png", "progress.csv"} <= made
    assert (tmp_path / "a.training" / "scores.csv").read_text().splitlines()[0] == "step,training,held_out"


def test_adapters_have_a_name(folder: Path, tmp_path: Path) -> None:
    result = run_cli(*transfer(folder), "--out", tmp_path / "adapters")
    assert result.returncode == 2
    assert "expected a file name ending in .safetensors" in result.stderr


def test_stored_noise_needs_seeds(folder: Path, tmp_path: Path) -> None:
    """Renders have none: no model drew them."""
    renders = tmp_path / "renders"
    made = run_cli("train", "corpus", "--out", renders, "--count", "2", "--size", "64x64")
    assert made.returncode == 0, made.stderr
    result = run_cli(*transfer(folder, "--corpus", str(renders)), "--out", tmp_path / "a.safetensors")
    assert result.returncode == 2
    assert "--noise fresh" in result.stderr


def test_dry_run_writes_nothing(folder: Path, tmp_path: Path) -> None:
    for command in (
        ("train", "source", "--out", tmp_path / "s"),
        ("train", "corpus", folder / "source", "--out", tmp_path / "c"),
        (*transfer(folder), "--out", tmp_path / "a.safetensors"),
    ):
        result = run_cli(*command, "--dry-run")
        assert result.returncode == 0, result.stderr
        assert result.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(shutil.which("g++") is None, reason="nothing compiles here")
def test_a_head_is_compiled_where_something_compiles(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = (
        *transfer(folder, "--device", "cpu", "--compile", "--dry-run", "--json"),
        "--out",
        tmp_path / "a.safetensors",
    )
    result = run_cli(*command)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["is_compiled"] is True
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    result = run_cli(*command)
    assert result.returncode == 3
    assert "--compile needs a C++ compiler" in result.stderr


def test_a_trained_source_is_not_written_over(folder: Path) -> None:
    result = run_cli("train", "source", "--out", folder / "source", *TINY)
    assert result.returncode == 2
    assert "holds a trained source already" in result.stderr


def test_a_terminated_run_goes_on(folder: Path, tmp_path: Path) -> None:
    """SIGTERM saves the step at hand and exits with 143; the same command finishes the run."""
    out, progress = tmp_path / "a.safetensors", tmp_path / "a.training" / "progress.csv"
    command = [*transfer(folder), "--out", out, "--steps", "4000"]
    running = subprocess.Popen([sys.executable, "-m", "l2p_export", *map(str, command)], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 400
    while not progress.exists() or progress.read_text().count("\n") < 4:
        assert running.poll() is None, running.stderr.read() if running.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.2)
    running.send_signal(signal.SIGTERM)
    _, message = running.communicate(timeout=120)
    assert running.returncode == 143, message
    assert b"the same command resumes from there" in message
    steps = progress.read_text().count("\n") - 1
    states = [path.name for path in (tmp_path / "a.training").glob("step-*")]
    assert states == [f"step-{steps:08}"]
    assert out.is_file()
