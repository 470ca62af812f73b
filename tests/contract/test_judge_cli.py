"""`l2p-export judge`: what a stranger's picture shows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import run_cli
from l2p_export.world.captions import describe
from l2p_export.world.render import render
from l2p_export.world.scenes import place


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("judge") / "picture.png"
    scene = place(describe("a red circle to the left of a blue square"), np.random.default_rng(0), (1.0, 1.5))
    Image.fromarray(render(scene, 256, 384)).save(path)
    return path


@pytest.mark.parametrize(
    ("prompt", "passed", "says"),
    [
        ("a red circle to the left of a blue square", True, "right: a red circle to the left of a blue square"),
        ("A blue square right of a red circle.", True, "right: "),
        ("a red circle above a blue square", False, "wrong: "),
        ("a red square", False, "wrong: "),
    ],
)
def test_a_verdict_is_one_line(picture: Path, prompt: str, passed: bool, says: str) -> None:
    result = run_cli("judge", picture, "--prompt", prompt)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(says)
    assert result.stdout.count("\n") == 1
    facts = json.loads(run_cli("judge", picture, "--prompt", prompt, "--json").stdout)
    assert facts["passed"] is passed
    assert len(facts["found"]["objects"]) == 2


def test_what_cannot_be_judged(picture: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(picture.read_bytes()[:200])
    for path, prompt, code, says in (
        (picture, "a purple elephant", 2, "is none of the small world"),
        (tmp_path / "absent.png", "a red circle", 2, "there is no picture"),
        (tmp_path, "a red circle", 2, "cannot read"),
        (damaged, "a red circle", 4, "is no readable image"),
    ):
        result = run_cli("judge", path, "--prompt", prompt)
        assert (result.returncode, result.stdout) == (code, "")
        assert says in result.stderr


def test_a_turned_picture_is_judged_upright(picture: Path, tmp_path: Path) -> None:
    """As a camera that is held upright stores it: turned, with a note that says so."""
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(picture) as upright:
        upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.jpg", quality=95, exif=exif)
    result = run_cli("judge", tmp_path / "turned.jpg", "--prompt", "a red circle to the left of a blue square")
    assert result.stdout == "right: a red circle to the left of a blue square\n"


def test_an_animation_is_not_judged(picture: Path, tmp_path: Path) -> None:
    with Image.open(picture) as first:
        first.save(tmp_path / "a.gif", save_all=True, append_images=[first.transpose(Image.Transpose.ROTATE_180)])
    result = run_cli("judge", tmp_path / "a.gif", "--prompt", "a red circle")
    assert (result.returncode, result.stdout) == (4, "")
    assert "has 2 frames or pages, expected one" in result.stderr
