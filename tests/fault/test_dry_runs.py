"""A dry run refuses what the run would refuse before its work, with the same code, and leaves nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from conftest import Bundles, run_cli, write_profile
from l2p_engines.store.shared import open_store
from l2p_runtime.files import partial_path
from tools.mounts import mounted


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in sorted(folder.rglob("*"))}


@pytest.fixture
def embeddings(bundles: Bundles, tmp_path: Path) -> Path:
    width = json.loads((bundles.path("tiny-16") / "bundle.json").read_bytes())["model"]["caption_width"]
    np.save(tmp_path / "embeddings.npy", np.ones((5, width), np.float32))
    return tmp_path / "embeddings.npy"


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--memory-budget", "1KiB"), 3, "raise the memory budget"),
        (("--size", "8192x8192", "--memory-budget", "64MiB"), 3, "raise the memory budget"),
        (("--backend", "nonsense"), 2, "no backend"),
        (("--plan", "nonsense"), 2, "nonsense"),
    ],
)
def test_drawing(
    arguments: tuple[str, ...], code: int, says: str, bundles: Bundles, embeddings: Path, tmp_path: Path
) -> None:
    before = snapshot(tmp_path)
    call = ("generate", bundles.path("tiny-16"), "--embeddings", embeddings, "--out", tmp_path / "x.png", *arguments)
    for dry in ((), ("--dry-run",)):
        result = run_cli(*call, *dry)
        assert (result.returncode, says in result.stderr) == (code, True), result.stderr
    assert run_cli("bench", bundles.path("tiny-16"), *arguments, "--dry-run").returncode == code
    assert snapshot(tmp_path) == before


def test_a_bench_says_what_it_would_time(bundles: Bundles) -> None:
    result = run_cli("bench", bundles.path("tiny-16"), "--dry-run", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["plan"] == "fp32"


def test_outputs_that_cannot_be_written(tiny_path: Path, tmp_path: Path) -> None:
    profile = write_profile(tmp_path / "mine.toml", 16)
    with mounted(tmp_path / "fixed", "ro") as disk:
        for call in (
            ("import", tiny_path, "--out", disk / "x.safetensors"),
            ("build", tiny_path, "--profile", profile, "--out", disk / "deep" / "out"),
            ("build", tiny_path, "--profile", profile, "--out", tmp_path / "out", "--store", disk / "store"),
            ("train", "corpus", "--count", "1", "--out", disk / "corpus"),
            ("train", "source", "--out", disk / "source"),
        ):
            result = run_cli(*call, "--dry-run")
            assert result.returncode == 3, result.stderr
            assert "cannot write" in result.stderr
            assert "hint: choose another --" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_store_that_is_none(tiny_path: Path, tmp_path: Path) -> None:
    profile = write_profile(tmp_path / "mine.toml", 16)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes").touch()
    (tmp_path / "file").touch()
    for store in (tmp_path / "file", tmp_path / "folder"):
        call = ("build", tiny_path, "--profile", profile, "--out", tmp_path / "out", "--store", store)
        for dry in ((), ("--dry-run",)):
            result = run_cli(*call, *dry)
            assert (result.returncode, "is no store and not empty" in result.stderr) == (2, True), result.stderr


def test_captions_that_cannot_be_rendered(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\na photograph of the sea\n")
    call = ("train", "corpus", "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "out")
    for dry in ((), ("--dry-run",)):
        result = run_cli(*call, *dry)
        assert (result.returncode, "photograph" in result.stderr) == (2, True), result.stderr
    assert not (tmp_path / "out").exists()


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    call = ("generate", "--server", "http://127.0.0.1:9", "--prompt", "a circle", "--out", tmp_path / "x.png")
    for dry in ((), ("--dry-run",)):
        result = run_cli(*call, *dry)
        assert (result.returncode, "no server answers" in result.stderr) == (3, True), result.stderr


def test_a_source_to_begin_with_that_is_none(tiny_path: Path, tmp_path: Path) -> None:
    call = ("train", "source", "--out", tmp_path / "out", "--init", tiny_path.parent)
    for dry in ((), ("--dry-run",)):
        result = run_cli(*call, *dry)
        assert (result.returncode, "is no pipeline folder" in result.stderr) == (2, True), result.stderr


def test_a_check_of_a_store_that_removes_nothing(tmp_path: Path) -> None:
    store = tmp_path / "store"
    with open_store(store):
        pass
    (store / "graphs").mkdir()
    (store / "graphs" / "left.onnx").write_bytes(b"x")
    (store / ".work" / ("0" * 64)).mkdir(parents=True)
    partial_path(store / ".work" / "x").touch()
    (store / "bundles" / "dead.json").write_text("{}")
    (store / "stages").mkdir()
    (store / "stages" / "damaged.json").write_text("{")
    # The lock of whoever used the store last; a check removes its own.
    (store / ".lock").unlink()
    before = snapshot(store)
    result = run_cli("store", "check", store, "--dry-run", "--remove")
    assert result.returncode == 4, result.stderr
    assert result.stdout.count("would remove a leftover") == 4
    assert "damaged: stages/damaged.json" in result.stdout
    assert snapshot(store) == before
    assert run_cli("store", "check", store, "--remove").stdout.count("removed a leftover") == 4
    assert not (store / "graphs" / "left.onnx").exists()
