"""What an engine's key is made of."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from l2p_engines.builders import stage as engine_stages
from l2p_engines.builders.compiling import compile_engine
from l2p_engines.builders.readback import read_back
from l2p_engines.builders.request import EngineSpec
from l2p_engines.builders.stage import GraphToBuild
from l2p_engines.builders.trt import apply_settings
from l2p_runtime.contract import EngineProfile, FileRecord, InputShapes, NetworkSpec, Target, TensorSpec

NETWORK = NetworkSpec("toy", (TensorSpec("x", "float32", ("n", 4)),), (TensorSpec("z", "float32", ("n", 4)),))
SPEC = EngineSpec(
    NETWORK, "fp16", Target("rtx", "1.7", "sm89"), (EngineProfile((InputShapes("x", (1, 4), (8, 4), (64, 4)),)),)
)
GRAPH, WEIGHTS = (
    FileRecord(f"graphs/toy.{kind}", 1, digit * 64, digit * 64) for kind, digit in (("onnx", "a"), ("bin", "b"))
)


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the builders' code, which keys are made of instead of the code itself."""
    folder = Path(inspect.getfile(engine_stages)).parent
    for path in folder.glob("*.py"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr("l2p_engines.builders.stage.resources.files", lambda package: tmp_path)
    engine_stages._recipe_digest.cache_clear()
    yield tmp_path
    engine_stages._recipe_digest.cache_clear()


def key() -> str:
    engine_stages._recipe_digest.cache_clear()
    return GraphToBuild(SPEC, GRAPH, WEIGHTS, "1.7.1.116").key


def test_the_copy_gives_the_key_of_the_code_itself(monkeypatch: pytest.MonkeyPatch, sources: Path) -> None:
    copied = key()
    monkeypatch.undo()
    assert key() == copied


@pytest.mark.parametrize("part", [compile_engine, apply_settings, read_back])
def test_engines_are_built_again_when_what_decides_them_changes(sources: Path, part: Any) -> None:
    before = key()
    path = sources / Path(inspect.getfile(part)).name
    path.write_text(path.read_text().replace("DETAILED", "LAYER_NAMES_ONLY") + "\n")
    assert key() != before


def test_they_are_kept_when_anything_else_does(sources: Path) -> None:
    before = key()
    (sources / "watching.py").write_text("")
    assert key() == before
