"""SIGKILL at random moments of a small build, then a build again: the old bundle or the new one, and no work twice."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from conftest import Bundles, run_cli, write_profile
from l2p_engines.store.stages import FOLDERS, stages
from l2p_runtime.bundle import open_bundle

PROGRAM = (sys.executable, "-m", "l2p_export")
MOMENTS = 50
IN_CI = 4


@dataclass(frozen=True)
class Case:
    """An old checkpoint and a new one, the manifest that each builds to, and how long the new one takes."""

    root: Path
    old: Path
    new: Path
    profile: Path
    old_manifest: bytes
    new_manifest: bytes
    seconds: float

    def command(self, checkpoint: Path, folder: Path, *, shares: bool) -> list[str]:
        command = ["build", str(checkpoint), "--profile", str(self.profile)]
        command += ["--store", str(folder / "store")] if shares else []
        return [*command, "--out", str(folder / "out")]


@pytest.fixture(scope="module")
def case(bundles: Bundles, tmp_path_factory: pytest.TempPathFactory) -> Case:
    root = tmp_path_factory.mktemp("killed")
    old = bundles.checkpoint("tiny-16")
    state = load_file(old)
    for name in ("local_decoder.out_conv.bias", "all_x_embedder.16-1.bias"):
        state[name] = state[name] + 0.125
    save_file(state, root / "new.safetensors")
    profile = write_profile(root / "mine.toml", 16)
    half = Case(root, old, root / "new.safetensors", profile, b"", b"", 0.0)
    prepare(half, bundles, root / "whole", shares=True)
    manifest = (root / "whole" / "out" / "bundle.json").read_bytes()
    started = time.monotonic()
    subprocess.run([*PROGRAM, *half.command(half.new, root / "whole", shares=True)], check=True, capture_output=True)
    seconds = time.monotonic() - started
    return Case(root, old, half.new, profile, manifest, (root / "whole" / "out" / "bundle.json").read_bytes(), seconds)


def prepare(case: Case, bundles: Bundles, folder: Path, *, shares: bool) -> None:
    """The old bundle in a folder of its own; in a store, all that it can share but one trace."""
    folder.mkdir()
    if shares:
        subprocess.run(["cp", "-r", str(bundles.store), str(folder / "store")], check=True)
        built = run_cli(*case.command(case.old, folder, shares=True))
        assert built.returncode == 0, built.stderr
        for stage in stages(folder / "store"):
            if (stage.kind, stage.label) == ("trace", "caption.fp32"):
                (folder / "store" / "stages" / f"{stage.key}.json").unlink()


@pytest.mark.parametrize(
    "moment", [pytest.param(moment, marks=[] if moment < IN_CI else pytest.mark.slow) for moment in range(MOMENTS)]
)
def test_a_killed_build_is_gone_on_with(moment: int, case: Case, bundles: Bundles, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    # One in ten has no store and no bundle yet; it also traces every network, which takes longer.
    shares = moment % 10 != 9
    prepare(case, bundles, folder, shares=shares)
    home = folder / "store" if shares else folder / "out"
    before = {stage.key for stage in stages(home)}
    command = case.command(case.new, folder, shares=shares)

    killed_after = random.Random(moment).uniform(0.0, case.seconds * (1 if shares else 3))  # noqa: S311 - no secret
    with subprocess.Popen([*PROGRAM, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:
            process.communicate(timeout=killed_after)
        except subprocess.TimeoutExpired:
            process.kill()

    manifest = folder / "out" / "bundle.json"
    if shares or manifest.exists():
        open_bundle(folder / "out")
        assert without_store(manifest) in (without_store(case.old_manifest), without_store(case.new_manifest))
    finished = {stage.key: (home / "stages" / f"{stage.key}.json").stat().st_mtime_ns for stage in stages(home)}

    again = run_cli(*command)
    assert again.returncode == 0, again.stderr
    assert without_store(manifest) == without_store(case.new_manifest)
    left = {stage.key: (home / "stages" / f"{stage.key}.json").stat().st_mtime_ns for stage in stages(home)}
    redone = [key for key in finished if key in left and left[key] != finished[key]]
    assert redone == [], f"of {len(finished.keys() - before)} finished stages"
    assert run_cli("verify", folder / "out", "--quiet").returncode == 0
    if shares:
        checked = run_cli("store", "check", home, "--json", "--quiet")
        assert checked.returncode == 0, checked.stderr
    assert_no_strays(home)
    assert_no_strays(folder / "out")


def without_store(manifest: Path | bytes) -> object:
    """A manifest by content alone, whether its files are shared or not."""
    data = json.loads(manifest if isinstance(manifest, bytes) else manifest.read_bytes())
    for record in data["files"]:
        record["in_store"] = False
    return data


def assert_no_strays(home: Path) -> None:
    """Every file of a home is named by a stage or a manifest, and nothing is half-done."""
    named = {record.path for stage in stages(home) for record in stage.files}
    found = {f"{folder}/{path.name}" for folder in FOLDERS for path in (home / folder).glob("*")}
    assert found <= named
    assert not (home / ".work").exists() or not list((home / ".work").iterdir())
    assert not list(home.rglob("*.partial"))
    assert not list(home.rglob("*.lock")) or list(home.rglob("*.lock")) == [home / ".lock"]
