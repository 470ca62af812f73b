"""`l2p-export eval` as a user meets it: on a bundle, without torch; on a source; and for the public benchmarks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from conftest import run_cli
from l2p_runtime import Pipeline

if TYPE_CHECKING:
    from conftest import Bundles

KIND = "tiny-16-fused"
SMALL = ("--size", "64x64", "--steps", 1)


def _stamps(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob("*.png")}


def test_a_bundle_is_scored_and_its_images_are_kept(bundles: Bundles, tmp_path: Path) -> None:
    out = tmp_path / "scores"
    arguments = ("eval", bundles.path(KIND), *SMALL, "--count", 3, "--seed", 5, "--out", out)
    result = run_cli(*arguments, "--json", "--quiet")
    assert result.returncode == 0, result.stderr
    scores = json.loads(result.stdout)
    # Random weights draw noise, which is never right.
    assert (scores["overall"]["passed"], scores["overall"]["count"]) == (0, 3)
    assert scores["categories"]["held-out combination"]["count"] == 3
    assert "not enough images" in scores["frechet"]["reason"]
    assert scores == json.loads((out / "scores.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["seed"] for row in rows] == [5, 6, 7]
    with Image.open(out / "contact.png") as sheet:
        assert sheet.size == (3 * 72, 72)
    with Pipeline.open(bundles.path(KIND)) as pipe:
        drawn = pipe.generate(rows[2]["prompt"], height=64, width=64, seed=7, steps=1)
    kept = np.asarray(Image.open(out / "images" / "00" / "00000002.png"))
    # The text encoder reads prompts together here and one by one there.
    assert np.abs(kept.astype(int) - drawn.astype(int)).max() <= 1

    before = _stamps(out / "images")
    again = run_cli(*arguments)
    assert again.returncode == 0, again.stderr
    assert _stamps(out / "images") == before
    table = again.stdout.splitlines()
    assert table[0] == "3 images of 64x64, 1 steps, guidance 1, shift 3, seeds from 5"
    assert table[2].split() == ["all", "0", "3", "0.0%", "0.0%", "to", "56.1%"]
    assert not any(line.startswith("training combination") for line in table)
    refused = run_cli(*arguments[:-2], "--guidance", 2, "--out", out)
    assert refused.returncode == 2
    assert "guidance is 2.0, it began with 1.0" in refused.stderr


def test_a_bundle_is_scored_without_torch(bundles: Bundles) -> None:
    command = ["eval", str(bundles.path(KIND)), *map(str, SMALL), "--count", "1", "--guidance", "2", "--quiet"]
    code = (
        "import sys; from l2p_export.cli.main import main\n"
        f"main.main({command!r}, standalone_mode=False)\n"
        "assert not {'torch', 'transformers', 'diffusers', 'onnx'} & set(sys.modules), sorted(sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "guidance 2" in result.stdout


def test_its_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, l2p_export.cli.eval as c; c.command.main(['--help'], standalone_mode=False)\n"
        "assert not {'torch', 'numpy', 'skimage', 'onnxruntime'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_source_is_scored_by_its_own_defaults(tmp_path: Path) -> None:
    source = _write_source(tmp_path / "source")
    (tmp_path / "captions.txt").write_text("a red circle\na blue square above a green circle on a grey background\n")
    arguments = ("eval", source, "--prompts", tmp_path / "captions.txt", "--out", tmp_path / "out")
    dry = json.loads(run_cli(*arguments, "--dry-run", "--json").stdout)
    assert (dry["size"], dry["steps"], dry["guidance"], dry["shift"], dry["images"]) == ("128x128", 30, 3.0, 2.0, 2)
    assert not (tmp_path / "out").exists()
    result = run_cli(*arguments, "--size", "64x32", "--steps", 1, "--images-per-prompt", 2, "--json")
    assert result.returncode == 0, result.stderr
    scores = json.loads(result.stdout)
    assert scores["categories"]["two objects"]["count"] == 2
    assert scores["parts"]["relation"]["count"] == 2
    with Image.open(tmp_path / "out" / "images" / "00" / "00000003.png") as image:
        assert image.size == (64, 32)
    for extra, message in (
        (("--size", "40x64"), "does not divide by 16 px"),
        (("--plan", "fp16"), "--coarse are for bundles"),
        (("--positions", "linear"), "--coarse are for bundles"),
    ):
        refused = run_cli(*arguments, *extra)
        assert refused.returncode == 2
        assert message in refused.stderr


def test_public_benchmarks_get_their_folders(bundles: Bundles, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"tag": "colors", "prompt": "a photo of a red bench", "include": []}\n')
    (tmp_path / "dpg").mkdir()
    (tmp_path / "dpg" / "17.txt").write_text("A long description of a harbour at dawn.")
    base = ("eval", bundles.path(KIND), "--size", "32x32", "--steps", 1)
    for layout, prompts, name, size in (
        ("geneval", "rows.jsonl", "00000/samples/00001.png", (32, 32)),
        ("dpg", "dpg", "17.png", (64, 64)),
    ):
        out = tmp_path / f"{layout}-images"
        arguments = (*base, "--layout", layout, "--prompts", tmp_path / prompts, "--out", out)
        told = run_cli(*arguments, "--dry-run")
        assert told.stdout == f"would draw 4 images of 32x32, 1 steps, guidance 1, shift 3, seeds from 0 into {out}\n"
        assert not out.exists()
        result = run_cli(*arguments, "--json")
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout)["drawn"] == 4
        with Image.open(out / name) as image:
            assert image.size == size
            # Four seeds, four images.
            assert len(np.unique(np.asarray(image))) > 1
        assert json.loads(run_cli(*arguments, "--json").stdout)["drawn"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--layout", "coco"), "'coco' is not one of"),
        (("--layout", "geneval"), "needs --prompts and --out"),
        (("--prompts", "absent.txt"), "there is no prompt file `absent.txt`"),
        (("--prompts", "empty.txt"), "`empty.txt` holds no prompt"),
        (("--prompts", "cow.txt"), "`cow.txt` line 2: "),
        (("--prompts", "cow.txt", "--count", "3"), "--count would too"),
        (("--prompts", "cow.txt", "--training"), "--training would too"),
        (("--images-per-prompt", "2"), "--images-per-prompt needs --prompts"),
        (("--out", "cow.txt"), "`cow.txt` is a file"),
        (("--size", "40x64"), "does not divide by 16 px"),
        (("--seed", "-1"), "seed is -1"),
        (("--steps", "0"), "steps"),
        (("--layout", "dpg", "--prompts", "long", "--out", "out"), "long/1.txt`: the prompt has"),
        (("--layout", "dpg", "--prompts", "dpg", "--out", "out", "--size", "32x64"), "cuts squares"),
    ],
)
def test_wrong_calls_say_what_is_wrong_and_write_nothing(
    bundles: Bundles, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "cow.txt").write_text("a red circle\na purple cow\n")
    for name, text in (("long", "word " * 600), ("dpg", "a harbour")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.txt").write_text(text)
    before = sorted(tmp_path.iterdir())
    result = run_cli("eval", bundles.path(KIND), *arguments, cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert result.stdout == ""
    assert sorted(tmp_path.iterdir()) == before


def test_models_that_cannot_be_scored_are_refused(bundles: Bundles, tmp_path: Path) -> None:
    neither = run_cli("eval", tmp_path)
    assert neither.returncode == 2
    assert "neither a bundle (bundle.json) nor a pipeline folder (model_index.json)" in neither.stderr
    mute = run_cli("eval", bundles.path("tiny-16"))
    assert mute.returncode == 2
    assert "has no text encoder" in mute.stderr
    assert "--text-encoder DIR" in mute.stderr
    (tmp_path / "model_index.json").write_text("{}")
    broken = run_cli("eval", tmp_path)
    assert broken.returncode == 4
    assert "no autoencoder's configuration" in broken.stderr


def test_without_the_judges_library_it_says_what_to_install(bundles: Bundles) -> None:
    code = (
        "import sys; sys.modules['skimage'] = None; sys.argv = ['l2p-export', 'eval', sys.argv[1]]\n"
        "from l2p_export.cli.main import run; run()"
    )
    command = [sys.executable, "-c", code, str(bundles.path(KIND))]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 3
    assert "pip install 'l2p-export[train]'" in result.stderr


def _write_source(folder: Path) -> Path:
    """A small source with random weights, as `train source` writes it."""
    from diffusers import AutoencoderKL

    from l2p_export.training.source.autoencoder import CONFIG
    from l2p_export.training.source.folder import write_source
    from l2p_export.training.source.model import initial_source, source_dimensions
    from l2p_export.training.source.tokens import world_tokenizer

    d = source_dimensions()
    autoencoder = AutoencoderKL(**CONFIG, sample_size=128, scaling_factor=1.0, shift_factor=0.0)
    write_source(folder, initial_source(d, 0), d, autoencoder, world_tokenizer(), 2.0)
    return folder
