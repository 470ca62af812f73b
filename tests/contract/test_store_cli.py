"""Stores as a user meets them: a trunk stored once, bundles that find their store; listing, pruning and checking."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from conftest import run_cli, seed_store, write_profile
from l2p_engines.store.shared import open_store
from l2p_engines.store.stages import stages
from l2p_runtime import Pipeline
from l2p_runtime.bundle import open_bundle

if TYPE_CHECKING:
    from conftest import Bundles

BOTH = ("--precision", "fp32", "--precision", "fp16")
HEAD_BIAS = "local_decoder.out_conv.bias"


@dataclass(frozen=True)
class Home:
    """A folder with a store, a profile, checkpoints and the bundles built from them."""

    root: Path

    @property
    def store(self) -> Path:
        return self.root / "store"

    def command(self, name: str, *options: str | Path, out: Path | None = None) -> list[str | Path]:
        """Build `NAME.safetensors` to the folder NAME; options given last win."""
        checkpoint, profile = self.root / f"{name}.safetensors", self.root / "mine.toml"
        out = out or self.root / name
        return ["build", checkpoint, "--profile", profile, "--store", self.store, "--out", out, *options]

    def build(self, name: str, *options: str | Path, out: Path | None = None) -> subprocess.CompletedProcess[str]:
        result = run_cli(*self.command(name, *options, out=out))
        assert "Traceback" not in result.stderr
        return result


@pytest.fixture(scope="module")
def adapters(bundles: Bundles, tmp_path_factory: pytest.TempPathFactory) -> tuple[Home, dict[str, str]]:
    """Bundles `one` and `other` of two checkpoints that differ in a bias of the head; what each build said."""
    home = Home(tmp_path_factory.mktemp("adapters"))
    checkpoint = bundles.checkpoint("tiny-16")
    seed_store(bundles.store, home.store)
    write_profile(home.root / "mine.toml", 16)
    shutil.copyfile(checkpoint, home.root / "one.safetensors")
    state = load_file(checkpoint)
    save_file(state | {HEAD_BIAS: state[HEAD_BIAS] + np.float32(0.125)}, home.root / "other.safetensors")
    logs = {}
    for name, options in (("one", BOTH), ("other", ())):
        result = home.build(name, *options)
        assert result.returncode == 0, result.stderr
        logs[name] = result.stderr
    return home, logs


@pytest.fixture
def home(adapters: tuple[Home, dict[str, str]], tmp_path: Path) -> Home:
    """A store that has all stages, and the bundle `one`, built there in no time."""
    source, mine = adapters[0], Home(tmp_path / "home")
    mine.root.mkdir()
    seed_store(source.store, mine.store)
    for name in ("one.safetensors", "other.safetensors", "mine.toml"):
        shutil.copyfile(source.root / name, mine.root / name)
    result = mine.build("one", *BOTH)
    assert result.returncode == 0, result.stderr
    return mine


def manifest(bundle: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((bundle / "bundle.json").read_bytes())
    return data


def graphs(bundle: Path, plan: str = "fp32") -> dict[str, tuple[str, str]]:
    return {g["network"]: (g["graph"], g["weights"]) for g in manifest(bundle)["graphs"] if g["plan"] == plan}


def snapshot(*folders: Path) -> dict[Path, tuple[int, int]]:
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in files}


def flip_middle(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    path.write_bytes(content)


def refuse(result: subprocess.CompletedProcess[str], code: int, *needles: str) -> None:
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    for needle in needles:
        assert needle in result.stderr


def test_two_adapters_share_all_but_the_head(adapters: tuple[Home, dict[str, str]]) -> None:
    home, logs = adapters
    one, other = graphs(home.root / "one"), graphs(home.root / "other")
    assert [network for network in one if one[network] != other[network]] == ["head"]
    assert one["head"][1] != other["head"][1]
    for name in ("one", "other"):
        assert sorted(path.name for path in (home.root / name).iterdir()) == [".store", "bundle.json"]
        assert all(record["in_store"] for record in manifest(home.root / name)["files"])
    assert "fp32 graph of `head`: done" in logs["other"]
    assert "reference in torch float32: done" in logs["other"]
    for network in ("caption", "stem", "trunk", "tail"):
        assert f"graph of `{network}`" not in logs["other"]
        assert f"tracing `{network}`" not in logs["other"]
    used = {path for bundle in (one, other) for pair in bundle.values() for path in pair}
    assert len([path for path in used if path.endswith(".safetensors")]) == 6
    assert all((home.store / path).is_file() for path in used)


def test_a_bundle_of_a_store_draws_and_verifies(adapters: tuple[Home, dict[str, str]]) -> None:
    home = adapters[0]
    call = {"prompt_embeds": np.ones((5, 40), np.float32), "height": 32, "width": 32, "seed": 1}
    pictures = []
    for name in ("one", "other"):
        result = run_cli("verify", home.root / name, "--plan", "fp32", "--quiet")
        assert result.returncode == 0, result.stderr
        with Pipeline.open(home.root / name) as pipe:
            pictures.append(pipe.generate(**call))
    assert (pictures[0] != pictures[1]).any()


def test_a_bundle_copied_elsewhere_finds_its_store(adapters: tuple[Home, dict[str, str]], tmp_path: Path) -> None:
    home = adapters[0]
    shutil.copytree(home.root / "one", tmp_path / "copy")
    assert open_bundle(tmp_path / "copy").store == home.store
    assert run_cli("inspect", tmp_path / "copy").returncode == 0


def test_a_store_that_moved_has_to_be_told(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = tmp_path / "moved"
    home.store.rename(moved)
    np.save(tmp_path / "e.npy", np.ones((5, 40), np.float32))
    drawing = ("--embeddings", tmp_path / "e.npy", "--size", "16x16", "--steps", "1", "--out", tmp_path / "x.png")
    commands: dict[str, tuple[str | Path, ...]] = {
        "inspect": (),
        "verify": ("--plan", "fp32"),
        "generate": drawing,
        "pack": ("--out", tmp_path / "packed"),
    }
    for name, options in commands.items():
        told = run_cli(name, home.root / "one", *options)
        refuse(told, 4, "keeps 33 files in a shared store and the one it points to does not know it", str(home.store))
        refuse(told, 4, "hint: give the store with --store DIR", "l2p-export pack")
        result = run_cli(name, home.root / "one", *options, "--store", moved)
        assert result.returncode == 0, result.stderr
    refuse(run_cli("inspect", home.root / "one", "--store", tmp_path), 3, f"`{tmp_path}` is no store")
    monkeypatch.setenv("L2P_STORE", str(moved))
    for name, options in commands.items():
        result = run_cli(name, home.root / "one", *options)
        assert result.returncode == 0, result.stderr


def test_a_strangers_bundle_cannot_point_into_a_store(home: Home) -> None:
    # Otherwise a bundle from anywhere could tell which files are on this machine, and have them run.
    path = home.root / "one" / "bundle.json"
    path.write_text(json.dumps(manifest(home.root / "one") | {"producer": "a stranger"}))
    refuse(run_cli("inspect", home.root / "one"), 4, "does not know it", str(home.store))
    assert run_cli("inspect", home.root / "one", "--store", home.store).returncode == 0


POINTERS = {
    "relative": b"store\n",
    "climbing": b"one/../store\n",
    "empty": b"",
    "empty lines": b"\n\n\n\n\n",
    "another folder": b"/\n",
    "garbage": bytes(range(256)) * 9,
    "NUL": b"/tmp\0/x\n",
    "no UTF-8": b"/\xff\xfe\n",
    "escapes": b"/\x1b[2J\x1b[31mgone\n",
    "1 MB": b"x" * 1_000_000,
    "1 MB from the root": b"/" + b"x" * 1_000_000,
    "1 MB of lines": b"/tmp\n" * 200_000,
    "the store after too many": b"/a\n/b\n/c\n/d\nSTORE\n",
}


@pytest.mark.parametrize("case", POINTERS)
def test_a_pointer_that_leads_nowhere_is_refused(
    case: str, adapters: tuple[Home, dict[str, str]], tmp_path: Path
) -> None:
    home = adapters[0]
    shutil.copytree(home.root / "one", tmp_path / "one")
    (tmp_path / "one" / ".store").write_bytes(POINTERS[case].replace(b"STORE", os.fsencode(home.store)))
    result = run_cli("inspect", tmp_path / "one", cwd=home.root)
    refuse(result, 4, "keeps 33 files in a shared store", "hint: give the store with --store DIR")
    assert len(result.stderr) < 2000
    assert "\x1b" not in result.stderr


def test_a_pointer_that_is_no_file_is_refused(home: Home) -> None:
    pointer = home.root / "one" / ".store"
    pointer.unlink()
    refuse(run_cli("inspect", home.root / "one"), 4, "does not say which")
    os.mkfifo(pointer)
    refuse(run_cli("inspect", home.root / "one"), 4, "does not say which")


def test_an_unchanged_build_does_nothing_and_says_so(home: Home) -> None:
    before = snapshot(home.root)
    result = home.build("one", *BOTH, "--json")
    assert result.returncode == 0, result.stderr
    assert result.stderr == f"`{home.root / 'one'}` is up to date: nothing to do\n"
    facts = json.loads(result.stdout)
    assert facts["changed"] is False
    assert facts["digest"] == open_bundle(home.root / "one").digest
    assert facts["bytes_in_store"] == facts["bytes"] > 0
    assert snapshot(home.root) == before


def test_a_touched_checkpoint_is_hashed_and_nothing_else(home: Home) -> None:
    os.utime(home.root / "one.safetensors")
    before = snapshot(home.root / "one", home.store / "graphs", home.store / "reference")
    result = home.build("one", *BOTH)
    assert result.returncode == 0, result.stderr
    lines = result.stderr.splitlines()
    assert re.fullmatch(r"\[0 done, \d+ left\] hashing one\.safetensors \.\.\.", lines[0])
    assert re.match(r"\[0 done, \d+ left\] hashing one\.safetensors: done in", lines[1])
    assert lines[2:] == [f"`{home.root / 'one'}` is up to date: nothing to do"]
    assert snapshot(home.root / "one", home.store / "graphs", home.store / "reference") == before


def test_a_new_bundle_of_known_stages_says_that_it_is_new(home: Home) -> None:
    result = home.build("one", "--json", *BOTH, out=home.root / "again")
    assert json.loads(result.stdout)["changed"] is True
    assert "graph of" not in result.stderr
    assert open_bundle(home.root / "again").digest == open_bundle(home.root / "one").digest


def test_a_build_into_another_store_lets_the_first_one_go(home: Home) -> None:
    seed_store(home.store, home.root / "second")
    result = home.build("one", *BOTH, "--store", home.root / "second")
    assert result.returncode == 0, result.stderr
    shutil.rmtree(home.store)
    result = run_cli("inspect", home.root / "one")
    assert result.returncode == 0, result.stderr


def test_a_build_over_a_bundle_of_its_own_files_leaves_them_to_the_store(home: Home) -> None:
    packed = home.root / "packed"
    assert run_cli("pack", home.root / "one", "--out", packed).returncode == 0
    result = home.build("one", *BOTH, out=packed)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in packed.iterdir()) == [".store", "bundle.json"]
    assert open_bundle(packed).store == home.store


def test_a_build_repairs_a_lost_pointer(home: Home) -> None:
    (home.root / "one" / ".store").unlink()
    assert home.build("one", *BOTH).returncode == 0
    result = run_cli("inspect", home.root / "one")
    assert result.returncode == 0, result.stderr


def test_a_moved_bundle_counts_again_once_it_is_built(home: Home) -> None:
    (home.root / "one").rename(home.root / "moved")
    assert home.build("one", *BOTH, out=home.root / "moved").returncode == 0
    assert run_cli("store", "prune", home.store).returncode == 0
    result = run_cli("inspect", home.root / "moved")
    assert result.returncode == 0, result.stderr


def test_names_that_are_no_utf8(home: Home) -> None:
    name = os.fsdecode(b"m\xffdel")
    (home.root / "one.safetensors").rename(home.root / f"{name}.safetensors")
    result = home.build(name, *BOTH)
    assert result.returncode == 0, result.stderr
    assert run_cli("inspect", home.root / name).returncode == 0
    assert run_cli("store", "prune", home.store).returncode == 0
    assert run_cli("inspect", home.root / name).returncode == 0


def test_builds_at_once_make_each_stage_once(home: Home) -> None:
    state = load_file(home.root / "one.safetensors")
    save_file(state | {HEAD_BIAS: state[HEAD_BIAS] - np.float32(0.25)}, home.root / "third.safetensors")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    builds = [
        subprocess.Popen([sys.executable, "-m", "l2p_export", *home.command("third", out=home.root / name)], **pipes)
        for name in ("a", "b")
    ]
    logs = [process.communicate()[1] for process in builds]
    assert [process.returncode for process in builds] == [0, 0], logs
    text = "".join(logs)
    ledgers = ("ledger fp32", "ledger fp32, fused")
    for stage in ("hashing third.safetensors", "fp32 graph of `head`", "reference in torch float32", *ledgers):
        assert text.count(f"{stage}: done") == 1, text
    assert text.count(": done") == 5
    assert manifest(home.root / "a") == manifest(home.root / "b")
    for name in ("a", "b"):
        open_bundle(home.root / name)
    assert run_cli("store", "check", home.store).returncode == 0
    assert list((home.store / ".work").glob("*")) == []


def test_a_store_has_to_be_one(home: Home, tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").touch()
    (tmp_path / "file").touch()
    for path in (tmp_path / "foreign", tmp_path / "file"):
        refuse(home.build("one", "--store", path, out=tmp_path / "out"), 2, f"`{path}` is no store and not empty")
        for arguments in (("ls",), ("prune",), ("prune", "--dry-run"), ("check",), ("check", "--remove")):
            refuse(run_cli("store", *arguments, path), 3, f"`{path}` is no store", "hint: give the folder")
    assert not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "foreign").iterdir()] == ["notes.txt"]


def test_a_dry_run_makes_no_store(home: Home, tmp_path: Path) -> None:
    result = home.build("one", "--store", tmp_path / "new", "--dry-run", out=tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "out").exists()


def test_a_list_says_what_is_used_and_by_whom(home: Home) -> None:
    result = run_cli("store", "ls", home.store, "--json")
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["store"] == str(home.store)
    listed = facts["stages"]
    assert {stage["key"] for stage in listed} == {stage.key for stage in stages(home.store)}
    sizes = [stage["bytes"] for stage in listed]
    assert sizes == sorted(sizes, reverse=True)
    used = {path for stage in listed if stage["used_by"] for path in stage["files"]}
    assert used == {record["path"] for record in manifest(home.root / "one")["files"]}
    assert {tuple(stage["used_by"]) for stage in listed} == {(), (str(home.root / "one"),)}
    assert {stage["kind"] for stage in listed} >= {"graph", "trace", "digests", "proof"}

    text = run_cli("store", "ls", home.store)
    assert text.stderr == ""
    lines = text.stdout.splitlines()
    assert lines[0].split() == ["kind", "what", "bytes", "age", "used", "by"]
    assert lines[-1].startswith(f"{len(listed)} stages, ")
    assert any(line.startswith("graph    head.fp16") and line.endswith(str(home.root / "one")) for line in lines)
    assert any(line.startswith("trace    head.fp16") and line.endswith("-") for line in lines)
    home.build("one", out=home.root / "fp32")
    trunk = graphs(home.root / "one")["trunk"][0]
    (users,) = (
        stage["used_by"]
        for stage in json.loads(run_cli("store", "ls", home.store, "--json").stdout)["stages"]
        if trunk in stage["files"]
    )
    assert users == [str(home.root / "fp32"), str(home.root / "one")]
    assert "  2 bundles\n" in run_cli("store", "ls", home.store).stdout


def test_pruning_says_what_goes_and_keeps_what_is_used(home: Home) -> None:
    before = snapshot(home.root)
    would = run_cli("store", "prune", home.store, "--dry-run")
    assert would.returncode == 0, would.stderr
    assert "would remove trace head.fp16, " in would.stdout
    assert would.stdout.splitlines()[-1].startswith("would remove ")
    facts = json.loads(run_cli("store", "prune", home.store, "--dry-run", "--json").stdout)
    assert facts["bytes"] == sum(stage["bytes"] for stage in facts["stages"]) > 0
    assert all(stage["used_by"] == [] for stage in facts["stages"])
    # The session's store may hold graphs of this name that another test made: files tell them apart.
    used = {record["path"] for record in manifest(home.root / "one")["files"]}
    assert any(path.startswith("graphs/trunk.fp16.") for path in used)
    assert used.isdisjoint(path for stage in facts["stages"] for path in stage["files"])
    assert snapshot(home.root) == before

    assert run_cli("store", "prune", home.store, "--older-than", "30d").stdout == "removed 0 stages, 0 B\n"
    assert snapshot(home.root) == before

    gone = run_cli("store", "prune", home.store)
    assert gone.stdout == would.stdout.replace("would remove", "removed")
    stored = [path for path in home.store.glob("*/*.*") if path.parent.name not in ("bundles", "stages")]
    assert {path.relative_to(home.store).as_posix() for path in stored} == used
    assert run_cli("verify", home.root / "one", "--plan", "fp32", "--quiet").returncode == 0
    again = home.build("one", *BOTH)
    assert "is up to date" in again.stderr
    assert "graph of" not in again.stderr
    shutil.rmtree(home.root / "one")
    assert run_cli("store", "prune", home.store).returncode == 0
    assert json.loads(run_cli("store", "ls", home.store, "--json").stdout)["stages"] == []


@pytest.mark.parametrize("age", ["soon", "-1d", "1", "1.5h", "1y", "", "9999999999d", "\u0661d"])
def test_an_age_is_a_number_and_a_unit(age: str, adapters: tuple[Home, dict[str, str]]) -> None:
    result = run_cli("store", "prune", adapters[0].store, "--dry-run", "--older-than", age)
    refuse(result, 2, "--older-than", "expected a number")


def test_a_store_in_use_is_left_alone(home: Home) -> None:
    before = snapshot(home.root)
    with open_store(home.store):
        for arguments in (("prune",), ("check",), ("check", "--remove")):
            refuse(run_cli("store", *arguments, home.store), 3, f"a build is using the store `{home.store}`", "wait")
        assert run_cli("store", "ls", home.store).returncode == 0
    assert snapshot(home.root) == before


def test_a_damaged_store_is_told_checked_and_mended(home: Home) -> None:
    name = graphs(home.root / "one")["head"][1]
    whole = (home.store / name).read_bytes()
    flip_middle(home.store / name)
    hint = f"`l2p-export store check {home.store} --remove`"
    refuse(home.build("one", *BOTH), 4, f"the store `{home.store}` is damaged", name, hint)
    assert (home.root / "one" / "bundle.json").exists()

    checked = run_cli("store", "check", home.store)
    refuse(checked, 4, f"damaged files in the store `{home.store}`: 1\n", hint)
    assert f"damaged: {name}: " in checked.stdout
    assert checked.stdout.splitlines()[-1].endswith(", 1 damaged")
    checked = run_cli("store", "check", home.store, "--json", "--quiet")
    refuse(checked, 4)
    assert json.loads(checked.stdout)["damaged"].keys() == {name}

    removed = run_cli("store", "check", home.store, "--remove")
    refuse(removed, 4, "now removed", "hint: build the bundles that used them again")
    assert f"removed: {name}: " in removed.stdout
    clean = run_cli("store", "check", home.store)
    assert clean.returncode == 0, clean.stderr
    assert clean.stdout.endswith(", 0 damaged\n")
    refuse(run_cli("inspect", home.root / "one"), 4, f"lacks `{name}`")

    result = home.build("one", *BOTH)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("graph of") == 2, "one graph, begun and done"
    assert "fp32 graph of `head`: done" in result.stderr
    assert (home.store / name).read_bytes() == whole
    assert run_cli("inspect", home.root / "one").returncode == 0
