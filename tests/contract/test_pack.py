"""`pack`: a copy that needs no store, with only what a target needs."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from conftest import run_cli
from l2p_export.build.pack import pack, pack_manifest
from l2p_runtime import Pipeline
from l2p_runtime.bundle import open_bundle, verify_files
from l2p_runtime.contract import Manifest, manifest_from_bytes
from l2p_runtime.errors import ArtifactError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from conftest import Bundles


class Silent:
    """A reporter that shows nothing."""

    @contextmanager
    def task(self, title: str, total: int = 0, unit: str = "bytes") -> Iterator[Callable[[int], None]]:
        yield lambda amount: None

    def note(self, text: str) -> None:
        raise AssertionError(text)


@dataclass(frozen=True)
class Shared:
    """A bundle and its store."""

    bundle: Path
    store: Path


@pytest.fixture(scope="module")
def whole(bundles: Bundles) -> Path:
    return bundles.path("tiny-16")


@pytest.fixture
def shared(bundles: Bundles, whole: Path, tmp_path: Path) -> Shared:
    """A copy of a bundle that was built in a store, and of what it uses there."""
    copy = Shared(tmp_path / "shared", tmp_path / "store")
    shutil.copytree(bundles.shared("tiny-16"), copy.bundle)
    opened = open_bundle(copy.bundle)
    (registration,) = bundles.store.glob(f"bundles/{opened.digest}.*.json")
    for name in ("l2p-store.json", f"bundles/{registration.name}", *(r.path for r in opened.manifest.files)):
        (copy.store / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundles.store / name, copy.store / name)
    (copy.bundle / ".store").write_bytes(os.fsencode(copy.store))
    return copy


@pytest.fixture
def own(whole: Path, tmp_path: Path) -> Path:
    """A copy of a bundle that has all its files."""
    shutil.copytree(whole, tmp_path / "own")
    return tmp_path / "own"


def data_of(bundle: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((bundle / "bundle.json").read_bytes())
    return data


def files_of(bundle: Path) -> list[str]:
    return sorted(path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file())


def flip_middle(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def head(folder: Path) -> Path:
    return next((folder / "graphs").glob("head.fp32.*.safetensors"))


def packed(bundle: Path, out: Path, *options: str) -> Path:
    result = run_cli("pack", bundle, "--out", out, "--quiet", *options)
    assert result.returncode == 0, result.stderr
    assert (result.stdout, result.stderr) == (f"{out}\n", "")
    return out


def assert_whole(bundle: Path) -> None:
    """It holds the files that its manifest names, unchanged, and nothing else."""
    opened = open_bundle(bundle)
    verify_files(opened, lambda size: None)
    assert opened.store is None
    assert not any(record.in_store for record in opened.manifest.files)
    assert files_of(bundle) == sorted(["bundle.json", *(record.path for record in opened.manifest.files)])


def test_a_pack_needs_no_store(shared: Shared, whole: Path, tmp_path: Path) -> None:
    call = {"prompt_embeds": np.ones((5, 40), np.float32), "height": 48, "width": 32, "seed": 3}
    with Pipeline.open(shared.bundle) as pipe:
        expected = pipe.generate(**call)
    out = packed(shared.bundle, tmp_path / "packed")
    shutil.rmtree(shared.store)
    assert_whole(out)
    result = run_cli("verify", out, "--quiet")
    assert result.returncode == 0, result.stderr
    with Pipeline.open(out) as pipe:
        assert (pipe.generate(**call) == expected).all()
    assert (out / "bundle.json").read_bytes() == (whole / "bundle.json").read_bytes()


def test_a_store_that_moved_can_be_told(shared: Shared, tmp_path: Path) -> None:
    shared.store.rename(tmp_path / "moved")
    result = run_cli("pack", shared.bundle, "--out", tmp_path / "packed")
    assert result.returncode == 4
    assert "hint: give the store with --store DIR" in result.stderr
    assert not (tmp_path / "packed").exists()
    assert_whole(packed(shared.bundle, tmp_path / "packed", "--store", str(tmp_path / "moved")))


def test_a_pack_of_everything_is_the_same_bundle_and_draws_the_same_file(whole: Path, tmp_path: Path) -> None:
    out = packed(whole, tmp_path / "packed")
    assert files_of(out) == files_of(whole)
    assert (out / "bundle.json").read_bytes() == (whole / "bundle.json").read_bytes()
    np.save(tmp_path / "e.npy", np.random.default_rng(0).standard_normal((9, 40)).astype(np.float32))
    pictures = []
    for bundle in (whole, out):
        options = ("--embeddings", tmp_path / "e.npy", "--size", "32x48", "--seed", "5", "--out", tmp_path / "x.png")
        result = run_cli("generate", bundle, *options)
        assert result.returncode == 0, result.stderr
        pictures.append((tmp_path / "x.png").read_bytes())
    assert pictures[0] == pictures[1]


def test_a_pack_of_one_plan_has_nothing_of_the_other(shared: Shared, whole: Path, tmp_path: Path) -> None:
    out = packed(shared.bundle, tmp_path / "packed", "--plan", "fp32")
    shutil.rmtree(shared.store)
    assert_whole(out)
    data, before = data_of(out), data_of(whole)
    assert [plan["name"] for plan in data["plans"]] == ["fp32"]
    assert {graph["plan"] for graph in data["graphs"]} == {"fp32"}
    assert not [name for name in files_of(out) if "fp16" in name]
    assert data["references"] == before["references"]
    assert data["ledger"] == [entry for entry in before["ledger"] if entry["comparison"]["plan"] != "fp16"]
    assert {entry["network"] for entry in data["ledger"]} >= {"caption", "stem", "trunk", "tail", "head", "end-to-end"}
    result = run_cli("verify", out)
    assert result.returncode == 0, result.stderr
    assert "fp16" not in result.stdout
    assert run_cli("generate", out, "--plan", "fp16", "--embeddings", "x", "--out", "x.png").returncode == 2


def test_a_plan_named_twice_is_kept_once_and_the_first_plan_stays_first(whole: Path, tmp_path: Path) -> None:
    out = packed(whole, tmp_path / "packed", "--plan", "fp16", "--plan", "fp32", "--plan", "fp16")
    assert (out / "bundle.json").read_bytes() == (whole / "bundle.json").read_bytes()


def test_a_text_encoder_goes_along(bundles: Bundles, tmp_path: Path) -> None:
    source = bundles.path("tiny-16-fused")
    out = packed(source, tmp_path / "packed", "--target", "onnx-cpu", "--plan", "fp32")
    assert_whole(out)
    assert data_of(out)["text"] == data_of(source)["text"]
    assert [name for name in files_of(out) if name.startswith("text/")]


def test_the_cpu_runs_fp32_and_fp16(whole: Path, tmp_path: Path) -> None:
    out = packed(whole, tmp_path / "packed", "--target", "onnx-cpu")
    assert (out / "bundle.json").read_bytes() == (whole / "bundle.json").read_bytes()


@pytest.fixture
def with_bf16(whole: Path) -> Manifest:
    return manifest_from_bytes((whole / "bundle.json").read_bytes().replace(b"fp16", b"bf16"))


def test_the_cpu_does_not_run_bf16(with_bf16: Manifest) -> None:
    kept = pack_manifest(with_bf16, "onnx-cpu", ())
    assert [plan.name for plan in kept.plans] == ["fp32"]
    assert not [record for record in kept.files if "bf16" in record.path]
    assert len(kept.files) == 10 + 5 + len(kept.references), "five networks of two files, five fused graphs"
    assert pack_manifest(with_bf16, "onnx-cpu", ["fp32", "bf16"]) == kept
    assert pack_manifest(with_bf16, None, ()) == with_bf16
    with pytest.raises(UsageError, match="none of bf16 runs on `onnx-cpu`"):
        pack_manifest(with_bf16, "onnx-cpu", ["bf16"])


@pytest.mark.parametrize(
    ("options", "needles"),
    [
        (("--target", "abacus"), ("nothing for a target `abacus`", "hint: it can be packed for onnx-cpu")),
        (("--plan", "int8"), ("the bundle has no plan `int8`", "it has fp32, fp16")),
        (("--plan", "fp32", "--plan", "int8"), ("no plan `int8`",)),
        (("--target", ""), ("nothing for a target",)),
    ],
)
def test_what_there_is_not_is_refused(
    options: tuple[str, ...], needles: tuple[str, ...], whole: Path, tmp_path: Path
) -> None:
    for more in ((), ("--dry-run",)):
        result = run_cli("pack", whole, "--out", tmp_path / "packed", *options, *more)
        assert result.returncode == 2, result.stderr
        for needle in needles:
            assert needle in result.stderr
    assert not (tmp_path / "packed").exists()


def test_a_dry_run_tells_the_size_and_writes_nothing(whole: Path, tmp_path: Path) -> None:
    result = run_cli("pack", whole, "--out", tmp_path / "packed", "--plan", "fp32", "--dry-run", "--json")
    facts = json.loads(result.stdout)
    assert facts["plans"] == ["fp32"]
    assert "digest" not in facts
    assert not (tmp_path / "packed").exists()
    result = run_cli("pack", whole, "--out", tmp_path / "packed", "--plan", "fp32", "--json", "--quiet")
    real = json.loads(result.stdout)
    assert real.pop("digest") == open_bundle(tmp_path / "packed").digest
    assert real == facts
    assert facts["bytes"] == sum(path.stat().st_size for path in (tmp_path / "packed").glob("*/*"))


def test_a_bundle_is_not_packed_onto_itself(own: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    for out in (own, own / "." / ".." / "own", tmp_path / "link" / "own", Path("own")):
        for plan in ((), ("--plan", "fp32")):
            result = run_cli("pack", own, "--out", out, *plan, cwd=tmp_path)
            assert result.returncode == 2, result.stderr
            assert "(BUNDLE), which is read" in result.stderr
    assert_whole(own)


def test_a_pack_writes_over_nothing_but_a_bundle(shared: Shared, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "new")
    before = files_of(tmp_path)
    for out, needle in (
        (tmp_path / "foreign", "holds other files (notes.txt)"),
        (tmp_path / "file", "is not a folder"),
        (tmp_path / "link", "is not a folder"),
        (shared.store, "holds other files"),
    ):
        for more in ((), ("--dry-run",)):
            result = run_cli("pack", whole, "--out", out, *more)
            assert result.returncode == 2, result.stderr
            assert needle in result.stderr
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("damage", ["flipped", "short", "missing"])
def test_a_changed_file_is_not_packed(shared: Shared, tmp_path: Path, damage: str) -> None:
    path = head(shared.store)
    if damage == "flipped":
        flip_middle(path)
    elif damage == "short":
        os.truncate(path, path.stat().st_size - 1)
    else:
        path.unlink()
    result = run_cli("pack", shared.bundle, "--out", tmp_path / "packed")
    assert result.returncode == 4, result.stderr
    assert path.name in result.stderr
    assert not (tmp_path / "packed").exists()


def test_a_file_that_changes_after_the_bundle_was_opened_is_not_packed(own: Path, tmp_path: Path) -> None:
    # As a large one does, of which opening reads the ends alone.
    opened = open_bundle(own)
    flip_middle(head(own))
    with pytest.raises(ArtifactError, match=rf"{head(own).name}` was changed after it was built"):
        pack(opened, pack_manifest(opened.manifest, None, ()), tmp_path / "packed", Silent())
    assert not (tmp_path / "packed").exists()


def test_a_file_that_changes_leaves_the_older_pack_whole(own: Path, tmp_path: Path) -> None:
    out = packed(own, tmp_path / "packed")
    opened = open_bundle(own)
    flip_middle(head(own))
    with pytest.raises(ArtifactError, match="was changed after it was built"):
        pack(opened, pack_manifest(opened.manifest, None, ()), out, Silent())
    assert_whole(out)


def test_a_pack_over_hard_links_leaves_the_bundle_whole(own: Path, tmp_path: Path) -> None:
    shutil.copytree(own, tmp_path / "packed", copy_function=os.link)
    assert_whole(packed(own, tmp_path / "packed"))
    assert_whole(own)


def test_a_pack_over_an_older_one_replaces_it(own: Path, tmp_path: Path) -> None:
    out = packed(own, tmp_path / "packed")
    packed(own, out, "--plan", "fp32")
    assert_whole(out)
    assert not [name for name in files_of(out) if "fp16" in name]
    packed(own, out, "--plan", "fp16")
    assert_whole(out)
    assert not [name for name in files_of(out) if "fp32" in name]


def test_a_pack_over_a_bundle_of_a_store_frees_it_from_the_store(shared: Shared, whole: Path) -> None:
    assert_whole(packed(whole, shared.bundle))
    assert not (shared.bundle / ".store").exists()


def test_a_pack_mends_a_damaged_one(own: Path, tmp_path: Path) -> None:
    out = packed(own, tmp_path / "packed")
    flip_middle(head(out))
    assert_whole(packed(own, out))


def test_what_a_killed_pack_left_is_swept(own: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    (out / "graphs").mkdir(parents=True)
    (out / "graphs" / head(own).name).write_bytes(b"half a file")
    (out / "graphs" / "head.fp32.0123456789abcdef.onnx").write_bytes(b"of another bundle")
    (out / ".build.lock").touch()
    assert_whole(packed(own, out))
