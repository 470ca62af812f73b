"""Folders as people have them: caches of links, variants, shards without an index, what macOS leaves behind."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from l2p_export.tensors.files import open_folder_tensors, open_weights
from l2p_export.tensors.folders import set_name
from l2p_export.tensors.sources import read_tensor
from l2p_runtime.errors import ArtifactError
from l2p_runtime.foreign import ForeignFileError

STEM = "diffusion_pytorch_model"


def save(path: Path, *names: str, value: float = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.full(2, value, np.float32) for name in names}, path)
    return path


def save_shards(folder: Path, shard: str, index: str, count: int = 2) -> Path:
    """Shards with one tensor each, named by the pattern `shard` of `{i}`, and an index if it has a name."""
    weight_map = {}
    for i in range(1, count + 1):
        name = shard.format(i=f"{i:05d}", n=f"{count:05d}")
        save(folder / name, f"t{i}", value=i)
        weight_map[f"t{i}"] = name
    if index:
        (folder / index).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def message(path: Path) -> tuple[str, str]:
    with pytest.raises(ArtifactError) as caught:
        open_weights(path)
    return str(caught.value), caught.value.hint


def value(path: Path, name: str = "t1") -> float:
    return float(read_tensor(open_weights(path).tensors[name])[0])


class TestVariants:
    @pytest.mark.parametrize(
        ("shard", "index"),
        [
            ("model-{i}-of-{n}.safetensors", "model.safetensors.index.json"),
            ("model-{i}-of-{n}.bf16.safetensors", "model.safetensors.index.bf16.json"),
            ("model.bf16-{i}-of-{n}.safetensors", "model.safetensors.index.bf16.json"),
            ("model.bf16-{i}-of-{n}.safetensors", "model.bf16.safetensors.index.json"),
            ("model-{i}-of-{n}.bf16.safetensors", ""),
            (
                "diffusion_pytorch_model.fp16-{i}-of-{n}.safetensors",
                "diffusion_pytorch_model.safetensors.index.fp16.json",
            ),
            ("anything-{i}-of-{n}.safetensors", "anything.safetensors.index.json"),
            ("anything-{i}-of-{n}.safetensors", ""),
        ],
    )
    def test_every_spelling_of_shards_is_read(self, tmp_path: Path, shard: str, index: str) -> None:
        save_shards(tmp_path, shard, index)
        assert [value(tmp_path, name) for name in ("t1", "t2")] == [1, 2]

    @pytest.mark.parametrize("name", ["diffusion_pytorch_model.bf16", "model.fp16", "model", "z_image_bf16"])
    def test_the_only_file_is_taken(self, tmp_path: Path, name: str) -> None:
        save(tmp_path / f"{name}.safetensors", "t1")
        assert value(tmp_path) == 1

    def test_the_usual_file_goes_before_its_variants_and_those_before_others(self, tmp_path: Path) -> None:
        save(tmp_path / "lora.safetensors", "t1", value=3)
        save(tmp_path / "model.fp16.safetensors", "t1", value=2)
        assert value(tmp_path) == 2
        save(tmp_path / "model.safetensors", "t1", value=1)
        assert value(tmp_path) == 1

    def test_several_variants_are_refused_and_each_path_of_the_hint_opens(self, tmp_path: Path) -> None:
        save(tmp_path / "model.fp16.safetensors", "t1", value=5)
        save_shards(tmp_path, "model-{i}-of-{n}.bf16.safetensors", "model.safetensors.index.bf16.json")
        save_shards(tmp_path, "model.fp32-{i}-of-{n}.safetensors", "")
        found, hint = message(tmp_path)
        assert "holds 3 .safetensors files or sets of shards" in found
        paths = [Path(path) for path in hint.partition("one of: ")[2].split(", ")]
        assert sorted(len(open_weights(path).tensors) for path in paths) == [1, 2, 2]

    def test_a_text_encoder_may_be_a_variant(self, tmp_path: Path) -> None:
        save_shards(tmp_path, "model-{i}-of-{n}.bf16.safetensors", "model.safetensors.index.bf16.json")
        assert open_folder_tensors(tmp_path, "model").keys() == {"t1", "t2"}
        with pytest.raises(ArtifactError, match=r"has neither `other\.safetensors`"):
            open_folder_tensors(tmp_path, "other")

    @given(
        st.text("abcz_.-0123456789", min_size=1, max_size=12).filter(lambda text: not text.endswith(".")),
        st.integers(1, 99999),
        st.sampled_from(["", "bf16", "fp8_e4m3fn"]),
    )
    def test_shards_and_their_index_have_one_name(self, stem: str, number: int, variant: str) -> None:
        dotted = f".{variant}" if variant else ""
        names = {
            set_name(f"{stem}-{number:05d}-of-99999{dotted}.safetensors"),
            set_name(f"{stem}{dotted}-{number:05d}-of-99999.safetensors"),
            set_name(f"{stem}.safetensors.index{dotted}.json"),
            set_name(f"{stem}{dotted}.safetensors.index.json"),
            set_name(f"{stem}{dotted}.safetensors"),
        }
        assert names == {f"{stem}{dotted}"}


class TestShards:
    def test_one_shard_or_the_index_stands_for_all(self, tmp_path: Path) -> None:
        save_shards(tmp_path, "model-{i}-of-{n}.safetensors", "model.safetensors.index.json")
        for name in ("model-00002-of-00002.safetensors", "model.safetensors.index.json"):
            assert open_weights(tmp_path / name).tensors.keys() == {"t1", "t2"}

    def test_a_missing_shard_is_named_without_an_index(self, tmp_path: Path) -> None:
        save_shards(tmp_path, "x-{i}-of-{n}.safetensors", "", 3)
        (tmp_path / "x-00002-of-00003.safetensors").unlink()
        found, hint = message(tmp_path)
        assert "holds 2 of 3 shards of `x`; missing: 00002 of 00003" in found
        assert "fetch the folder again" in hint
        assert "missing: 00002" in message(tmp_path / "x-00001-of-00003.safetensors")[0]

    def test_two_splits_are_refused(self, tmp_path: Path) -> None:
        save_shards(tmp_path, "x-{i}-of-{n}.safetensors", "", 2)
        save_shards(tmp_path, "x-{i}-of-{n}.safetensors", "", 3)
        assert "split into 2 and into 3 files" in message(tmp_path)[0]

    def test_a_number_beyond_the_count(self, tmp_path: Path) -> None:
        save_shards(tmp_path, "x-{i}-of-{n}.safetensors", "", 2)
        save(tmp_path / "x-00003-of-00002.safetensors", "t3")
        assert "numbered beyond that" in message(tmp_path)[0]

    def test_shards_that_hold_one_tensor_twice(self, tmp_path: Path) -> None:
        for i in (1, 2):
            save(tmp_path / f"x-0000{i}-of-00002.safetensors", "t")
        assert "both hold `t`" in message(tmp_path)[0]

    def test_two_models_of_usual_stems_are_refused(self, tmp_path: Path) -> None:
        save_shards(tmp_path, "model-{i}-of-{n}.safetensors", "model.safetensors.index.json")
        save_shards(tmp_path, STEM + "-{i}-of-{n}.safetensors", f"{STEM}.safetensors.index.json")
        found, hint = message(tmp_path)
        assert "holds 2 .safetensors files or sets" in found
        assert value(Path(hint.partition("one of: ")[2].split(", ")[1])) == 1

    def test_two_indices_of_one_variant(self, tmp_path: Path) -> None:
        save_shards(tmp_path, "model.bf16-{i}-of-{n}.safetensors", "model.bf16.safetensors.index.json")
        other = tmp_path / "model.safetensors.index.bf16.json"
        other.write_text((tmp_path / "model.bf16.safetensors.index.json").read_text())
        assert value(tmp_path) == 1
        other.write_text(json.dumps({"weight_map": {"t1": "model.bf16-00001-of-00002.safetensors"}}))
        assert "are indices of one model and disagree" in message(tmp_path)[0]


class TestHidden:
    def test_what_macos_leaves_and_other_hidden_files_are_passed_over(self, tmp_path: Path) -> None:
        save(tmp_path / "x.safetensors", "t1")
        (tmp_path / "._x.safetensors").write_bytes(b"\x00\x05\x16\x07" + bytes(100))
        (tmp_path / ".x.safetensors.tmp").write_bytes(b"half")
        save(tmp_path / ".hidden.safetensors", "t1")
        assert value(tmp_path) == 1

    def test_given_itself_it_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "._x.safetensors").write_bytes(b"\x00\x05\x16\x07" + bytes(100))
        found, hint = message(tmp_path / "._x.safetensors")
        assert "macOS metadata" in found
        assert "without `._`" in hint

    def test_a_folder_named_like_a_file_does_not_count(self, tmp_path: Path) -> None:
        save(tmp_path / "x.safetensors", "t1")
        (tmp_path / "y.safetensors").mkdir()
        assert value(tmp_path) == 1


class TestCache:
    """A Hugging Face cache: `models--org--name` with `refs`, `blobs`, and snapshots whose files are links to blobs."""

    @pytest.fixture
    def model(self, tmp_path: Path) -> Path:
        model = tmp_path / "hub" / "models--org--name"
        self.snapshot(model, "c1", value=1)
        (model / "refs").mkdir()
        (model / "refs" / "main").write_text("c1")
        return model

    def snapshot(self, model: Path, commit: str, *, value: float) -> Path:
        """A pipeline folder of links, two folders above which the blobs are."""
        folder = model / "snapshots" / commit / "transformer"
        folder.mkdir(parents=True)
        save_shards(model / "made", STEM + "-{i}-of-{n}.safetensors", f"{STEM}.safetensors.index.json")
        for number, file in enumerate(sorted((model / "made").iterdir())):
            blob = model / "blobs" / f"{commit}{number}"
            blob.parent.mkdir(exist_ok=True)
            file.rename(blob)
            (folder / file.name).symlink_to(os.path.relpath(blob, folder))
        (model / "made").rmdir()
        if value != 1:
            save(model / "blobs" / "other", "t1", value=value)
            for link in folder.iterdir():
                link.unlink()
            (folder / "model.safetensors").symlink_to("../../../blobs/other")
        return folder.parent

    def test_each_folder_of_it_opens(self, model: Path) -> None:
        snapshot = model / "snapshots" / "c1"
        shard = snapshot / "transformer" / "diffusion_pytorch_model-00001-of-00002.safetensors"
        for path in (model.parent, model, model / "snapshots", snapshot, snapshot / "transformer", shard):
            assert [value(path, name) for name in ("t1", "t2")] == [1, 2], path

    def test_main_decides_between_snapshots(self, model: Path) -> None:
        self.snapshot(model, "c2", value=7)
        assert value(model) == 1
        (model / "refs" / "main").write_text("c2\n")
        assert value(model) == 7

    @pytest.mark.parametrize("main", [None, "c9", "../../elsewhere", "", "\xff"])
    def test_without_a_valid_main_each_path_of_the_hint_opens(self, model: Path, main: str | None) -> None:
        self.snapshot(model, "c2", value=7)
        (model / "refs" / "main").unlink()
        if main is not None:
            (model / "refs" / "main").write_text(main, encoding="latin-1")
        found, hint = message(model)
        assert "holds 2 snapshots" in found
        assert [value(Path(path)) for path in hint.partition("one of: ")[2].split(", ")] == [1, 7]

    def test_the_only_snapshot_needs_no_main(self, model: Path) -> None:
        (model / "refs" / "main").unlink()
        assert value(model) == 1
        (model / "refs" / "main").write_text("c9")
        assert "names snapshot c9, which is not among them" in message(model)[0]

    def test_a_cache_of_several_models(self, model: Path) -> None:
        other = model.parent / "models--org--other"
        self.snapshot(other, "c1", value=7)
        found, hint = message(model.parent)
        assert "a Hugging Face cache of 2 models" in found
        assert [value(Path(path)) for path in hint.partition("one of them: ")[2].split(", ")] == [1, 7]

    def test_a_deleted_blob_is_named(self, model: Path) -> None:
        shard = model / "snapshots" / "c1" / "transformer" / "diffusion_pytorch_model-00002-of-00002.safetensors"
        blob = shard.resolve()
        blob.unlink()
        for path in (model, shard):
            found, hint = message(path)
            assert str(blob) in found
            assert "download the model again" in hint

    def test_no_snapshot_at_all(self, tmp_path: Path) -> None:
        (tmp_path / "models--org--name" / "snapshots").mkdir(parents=True)
        assert "hf download org/name" in message(tmp_path / "models--org--name")[1]

    @pytest.mark.parametrize("target", ["outside", "other model", "blobs linked away"])
    def test_links_beyond_the_blobs_of_the_model_are_refused(self, model: Path, tmp_path: Path, target: str) -> None:
        folder = model / "snapshots" / "c1" / "transformer"
        secret = save(tmp_path / "secret", "t1")
        for link in folder.iterdir():
            link.unlink()
        if target == "outside":
            (folder / "model.safetensors").symlink_to(secret)
        elif target == "other model":
            save(model.parent / "models--org--other" / "blobs" / "b", "t1")
            (folder / "model.safetensors").symlink_to("../../../../models--org--other/blobs/b")
        else:
            for blob in (model / "blobs").iterdir():
                blob.unlink()
            (model / "blobs").rmdir()
            (model / "blobs").symlink_to(tmp_path)
            (folder / "model.safetensors").symlink_to("../../../blobs/secret")
        assert "a link that leaves its folder" in message(model)[0]

    def test_a_transformer_folder_linked_away(self, tmp_path: Path) -> None:
        save(tmp_path / "elsewhere" / "model.safetensors", "t1")
        (tmp_path / "pipe").mkdir()
        (tmp_path / "pipe" / "transformer").symlink_to(tmp_path / "elsewhere")
        assert "a link that leaves its folder" in message(tmp_path / "pipe")[0]

    def test_a_loop_of_links(self, tmp_path: Path) -> None:
        (tmp_path / "model.safetensors").symlink_to("model.safetensors")
        assert "is a link to" in message(tmp_path)[0]
        assert "is a link to" in message(tmp_path / "model.safetensors")[0]


class TestNothingToOpen:
    def test_weights_of_other_formats_are_named(self, tmp_path: Path) -> None:
        (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00." + bytes(20))
        with pytest.raises(ForeignFileError, match="pickle"):
            open_weights(tmp_path)

    def test_a_clone_without_large_files(self, tmp_path: Path) -> None:
        save_shards(tmp_path, "model-{i}-of-{n}.safetensors", "model.safetensors.index.json")
        for shard in tmp_path.glob("*.safetensors"):
            shard.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
        with pytest.raises(ForeignFileError, match="Git LFS pointer"):
            open_weights(tmp_path)

    def test_unfinished_downloads(self, tmp_path: Path) -> None:
        half = tmp_path / "x.safetensors.part"
        half.write_bytes(b"half")
        assert "finish the download of `x.safetensors.part`" in message(tmp_path)[1]
        assert "unfinished download by its name (.part)" in message(half)[0]
        assert "its download did not finish" in message(tmp_path / "x.safetensors")[1]

    def test_weights_further_down_are_found(self, tmp_path: Path) -> None:
        save(tmp_path / "split_files" / "diffusion_models" / "x.safetensors", "t1")
        assert value(Path(message(tmp_path)[1].removeprefix("give one of: "))) == 1

    def test_a_name_on_hugging_face_is_no_path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert "hf download zhen-nan/L2P --local-dir L2P" in message(Path("zhen-nan/L2P"))[1]
        assert "hf download" not in message(Path("nowhere.safetensors"))[1]

    def test_safetensors_under_the_name_of_a_pickle_are_read(self, tmp_path: Path) -> None:
        save(tmp_path / "model.ckpt", "t1")
        assert value(tmp_path / "model.ckpt") == 1
