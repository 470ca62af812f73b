"""Bad checkpoints, profiles and output folders: a code, the name of the thing, and nothing left behind."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from conftest import Bundles, run_cli, write_profile
from fakes.traces import copy_traces
from golden import tiny_checkpoint
from l2p_engines.profiles import load_profile
from l2p_engines.store.output import open_output
from l2p_export.checkpoint.loading import load_model
from l2p_export.tensors.metadata import sampling_defaults
from l2p_export.tensors.writing import write_weights
from l2p_runtime.contract import Sampling
from l2p_runtime.errors import ArtifactError, L2PError, UsageError
from l2p_runtime.tensorfile import open_tensorfile

Entries = dict[str, Any]

BIG = "layers.2.feed_forward.w1.weight"


def raw(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A file from its parts; a header in bytes is taken as it is."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> Entries:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def layout(shapes: dict[str, tuple[int, ...]], dtype: str = "F32", item_bytes: int = 4) -> Entries:
    """Header entries of tensors one behind the other."""
    entries: Entries = {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + item_bytes * int(np.prod(shape))
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    return entries


def write_sparse(path: Path, entries: Entries, metadata: dict[str, str] | None = None) -> Path:
    """A file whose values are all zero and take no room on the disk."""
    path.write_bytes(raw({"__metadata__": metadata or {}} | entries))
    os.truncate(path, path.stat().st_size + max(item["data_offsets"][1] for item in entries.values()))
    return path


def shapes_with(change: Callable[[dict[str, tuple[int, ...]]], None]) -> dict[str, tuple[int, ...]]:
    shapes = dict(tiny_checkpoint.shapes())
    change(shapes)
    return shapes


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    return write_profile(tmp_path / "mine.toml", 16)


def refuse(checkpoint: Path, profile: Path | str, code: int, *needles: str, options: tuple[str, ...] = ()) -> str:
    """Build, expect a refusal that says each needle, and no output folder; the message."""
    out = Path(f"{checkpoint}.out")
    result = run_cli("build", checkpoint, "--profile", profile, "--backend", "onnx", "--out", out, *options)
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    assert "Warning" not in result.stderr
    assert result.stderr.startswith(("error: ", "fp"))
    assert result.stdout == ""
    for needle in needles:
        assert needle in result.stderr
    assert not out.exists()
    return result.stderr


HEADERS: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "empty": (b"", ("is empty", "bad.safetensors")),
    "three bytes": (b"abc", ("has 3 bytes", "too short")),
    "longer than the file": (raw({}, length=1000), ("header of 1000 bytes", "the file has 10 bytes")),
    "length beyond all": (raw({}, length=2**63), (f"header of {2**63} bytes", "limit")),
    "not JSON": (raw(b'{"a": '), ("not JSON",)),
    "not UTF-8": (raw(b'{"\xff": 1}'), ("not JSON",)),
    "nested": (raw(b"[" * 100_000), ("not JSON",)),
    "digits": (raw(b'{"a": ' + b"9" * 5000 + b"}"), ("not JSON",)),
    "a list": (raw([1, 2]), ("a list", "object of tensors")),
    "no tensors": (raw({}), ("holds no tensors",)),
    "duplicate": (
        raw(b'{"layers.0.x": %b, "layers.0.x": %b}' % ((json.dumps(entry(0, 4)).encode(),) * 2), b"1234"),
        ("layers.0.x", "twice"),
    ),
    "outside": (raw({"layers.0.x": entry(0, 4000)}, b"1234"), ("`layers.0.x` ends at byte", "truncated")),
    "negative": (raw({"layers.0.x": entry(-4, 0, [1])}, b"1234"), ("`layers.0.x`", "[-4, 0]")),
    "begin after end": (raw({"layers.0.x": entry(4, 0, [1])}, b"1234"), ("`layers.0.x`", "[4, 0]")),
    "offsets not numbers": (raw({"a.x": entry(0, 4) | {"data_offsets": ["0", 4]}}, b"1234"), ("`a.x`", "data_offsets")),
    "offsets true": (raw({"a.x": entry(0, 1, [1], "U8") | {"data_offsets": [False, True]}}, b"1"), ("`a.x`", "True")),
    "overlap": (
        raw({"first.x": entry(0, 8), "second.x": entry(4, 12)}, bytes(12)),
        ("`first.x` and `second.x` overlap",),
    ),
    "gap": (raw({"first.x": entry(0, 4), "second.x": entry(8, 12)}, bytes(12)), ("4 bytes before tensor `second.x`",)),
    "gap at the front": (raw({"first.x": entry(4, 8)}, bytes(8)), ("4 bytes before tensor `first.x`",)),
    "trailing": (raw({"first.x": entry(0, 4)}, bytes(7)), ("3 bytes after the last tensor",)),
    "shape contradicts": (raw({"a.x": entry(0, 8, [3])}, bytes(8)), ("`a.x` F32 [3] needs 12 bytes", "hold 8")),
    "negative shape": (raw({"a.x": entry(0, 8, [-1, -2])}, bytes(8)), ("`a.x` has shape [-1, -2]",)),
    "fractional shape": (raw({"a.x": entry(0, 8) | {"shape": [2.0]}}, bytes(8)), ("`a.x` has shape [2.0]",)),
    "overflowing shape": (raw({"a.x": entry(0, 0, [2**62, 2**62])}), ("`a.x` F32", "needs", "hold 0")),
    "wrapping shape": (raw({"a.x": entry(0, 0, [2**32, 2**32])}), ("`a.x` F32", f"needs {2**66} bytes")),
    "size beyond 64 bits": (raw({"a.x": entry(0, 0, [2**64])}), ("`a.x` has shape",)),
    "zero hides overflow": (raw({"a.x": entry(0, 0, [2**62, 2**62, 0])}), ("`a.x`", "no machine can hold")),
    "many axes": (raw({"a.x": entry(0, 4, [1] * 40)}, bytes(4)), ("`a.x` has shape", "up to 8 sizes")),
    "unknown dtype": (raw({"a.x": entry(0, 4, [1], "F4_E2M1X")}, bytes(4)), ("`a.x` has unknown dtype 'F4_E2M1X'",)),
    "dtype a list": (raw({"a.x": entry(0, 4) | {"dtype": ["F32"]}}, bytes(4)), ("`a.x` has unknown dtype",)),
    "entry a number": (raw({"a.x": 5}), ("`a.x` lacks dtype, shape or data_offsets",)),
    "entry without shape": (raw({"a.x": {"dtype": "F32", "data_offsets": [0, 0]}}), ("`a.x` lacks",)),
    "metadata a list": (raw({"__metadata__": ["x"], "a.x": entry(0, 4)}, bytes(4)), ("`__metadata__`", "strings")),
    "metadata numbers": (raw({"__metadata__": {"n": 5}, "a.x": entry(0, 4)}, bytes(4)), ("`__metadata__`", "strings")),
    "metadata surrogate": (
        raw(b'{"__metadata__": {"license": "\\ud800"}, "a.x": %b}' % json.dumps(entry(0, 4)).encode(), bytes(4)),
        ("`__metadata__`", "license"),
    ),
    "name an escape": (raw({"layers.\x1b[2J": entry(0, 4)}, bytes(4)), (r"layers.\x1b[2J", "printed")),
    "name endless": (raw({"layers." + "x" * 100_000: entry(0, 4)}, bytes(4)), ("layers.xxx", "512 characters")),
    "pickle": (pickle.dumps({"state_dict": [1.0] * 10}), ("is a pickle", "convert it")),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", ("Git LFS pointer", "git lfs pull")),
}


@pytest.mark.parametrize("case", HEADERS)
def test_header(case: str, tmp_path: Path, profile: Path) -> None:
    content, needles = HEADERS[case]
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(content)
    message = refuse(bad, profile, 4, "bad.safetensors", *needles)
    assert "hint: " in message
    assert len(message) < 2000


def test_truncated_data(tmp_path: Path, tiny_path: Path, profile: Path) -> None:
    bad = tmp_path / "cut.safetensors"
    content = tiny_path.read_bytes()
    bad.write_bytes(content[: len(content) * 2 // 3])
    refuse(bad, profile, 4, "ends at byte", f"the file has {bad.stat().st_size} bytes", "download it again")


def test_zip_under_a_safetensors_name(tmp_path: Path, profile: Path) -> None:
    bad = tmp_path / "archive.safetensors"
    with zipfile.ZipFile(bad, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02.")
    refuse(bad, profile, 4, "archive.safetensors", "is a pickle", "weights_only=True")


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".PTH", ".bin"])
def test_pickle_by_name(suffix: str, tmp_path: Path, profile: Path) -> None:
    bad = tmp_path / f"model{suffix}"
    bad.write_bytes(pickle.dumps([1]))
    refuse(bad, profile, 4, f"model{suffix}", "refused", "weights_only=True")


@pytest.mark.parametrize(("dtype", "item_bytes"), [("I8", 1), ("I64", 8), ("U8", 1), ("BOOL", 1)])
def test_weights_that_are_no_floats(dtype: str, item_bytes: int, tmp_path: Path, profile: Path) -> None:
    entries = layout(dict(tiny_checkpoint.shapes()), dtype, item_bytes)
    bad = write_sparse(tmp_path / "quantized.safetensors", entries)
    refuse(bad, profile, 4, f"({dtype})", "fetch the original file", f"and {len(entries) - 8} more")


def test_one_tensor_quantized(tmp_path: Path, profile: Path) -> None:
    shapes = shapes_with(lambda s: s.pop(BIG) and None)
    entries = layout(shapes)
    end = max(item["data_offsets"][1] for item in entries.values())
    entries[BIG] = {"dtype": "I8", "shape": [170, 64], "data_offsets": [end, end + 170 * 64]}
    refuse(write_sparse(tmp_path / "mixed.safetensors", entries), profile, 4, f"`{BIG}` (I8)")


def test_every_fault_in_one_message(tmp_path: Path, profile: Path) -> None:
    def spoil(shapes: dict[str, tuple[int, ...]]) -> None:
        del shapes["layers.1.attention.to_q.weight"]
        del shapes["x_pad_token"]
        del shapes["local_decoder.up3.1.bias"]
        shapes["layers.1.attention.to_x.weight"] = (64, 64)
        shapes["vae.decoder.weight"] = (3,)
        shapes[BIG] = (171, 64)
        shapes["local_decoder.out_conv.weight"] = (4, 64, 1, 1)

    bad = write_sparse(tmp_path / "spoilt.safetensors", layout(shapes_with(spoil)))
    refuse(
        bad,
        profile,
        4,
        "spoilt.safetensors",
        "6 layers",
        "missing `layers.1.attention.to_q.weight`",
        "missing `x_pad_token`",
        "missing `local_decoder.up3.1.bias`",
        "unknown `layers.1.attention.to_x.weight`",
        "unknown `vae.decoder.weight`",
        f"`{BIG}` has shape [171, 64], expected [170, 64]",
        "`local_decoder.out_conv.weight` has shape [4, 64, 1, 1], expected [3, 64, 1, 1]",
    )


def drop(prefix: str) -> Callable[[dict[str, tuple[int, ...]]], None]:
    def change(shapes: dict[str, tuple[int, ...]]) -> None:
        for name in [name for name in shapes if name.startswith(prefix)]:
            del shapes[name]

    return change


def stray(prefix: str, target: str) -> Callable[[dict[str, tuple[int, ...]]], None]:
    def change(shapes: dict[str, tuple[int, ...]]) -> None:
        for name in [name for name in shapes if name.startswith(prefix)]:
            shapes[target + name.removeprefix(prefix)] = shapes[name]

    return change


def reshape(shape: tuple[int, ...], *names: str) -> Callable[[dict[str, tuple[int, ...]]], None]:
    return lambda shapes: shapes.update(dict.fromkeys(names, shape))


ARCHITECTURES: dict[str, tuple[Callable[[dict[str, tuple[int, ...]]], None], tuple[str, ...]]] = {
    "gap in the layers": (drop("layers.3."), ("missing `layers.3`, all 15 tensors", "6 layers")),
    "no layers": (drop("layers."), ("no main layers", "layers.0")),
    "no head": (drop("local_decoder."), ("not an L2P checkpoint", "local_decoder")),
    "no embedder": (drop("all_x_embedder."), ("not an L2P checkpoint", "all_x_embedder")),
    "no time embedder": (drop("t_embedder."), ("no tensor `t_embedder.mlp.0.weight`",)),
    "one head stage missing": (drop("local_decoder.enc2"), ("local_decoder.enc2.0.weight",)),
    "another patch": (
        stray("all_x_embedder.16-1", "all_x_embedder.32-1"),
        ("patches of 16, 32 px", "16, 64, 128, 160"),
    ),
    "endless patch": (stray("all_x_embedder.16-1", "all_x_embedder." + "9" * 400 + "-1"), ("unknown `all_x_embedder",)),
    "no width": (
        reshape((0,), *(name for name in tiny_checkpoint.shapes() if name.endswith("_norm1.weight"))),
        ("tensors of size 0",),
    ),
    "no caption width": (reshape((0,), "cap_embedder.0.weight", "cap_embedder.1.weight"), ("size 0",)),
}


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_architecture(case: str, tmp_path: Path, profile: Path) -> None:
    change, needles = ARCHITECTURES[case]
    bad = write_sparse(tmp_path / "bad.safetensors", layout(shapes_with(change)))
    refuse(bad, profile, 4, *needles)


def test_stray_layer_is_unknown_and_no_table_of_missing_ones(tmp_path: Path, profile: Path) -> None:
    shapes = shapes_with(stray("layers.0.", "layers.9999."))
    message = refuse(
        write_sparse(tmp_path / "stray.safetensors", layout(shapes)),
        profile,
        4,
        "6 layers",
        "unknown `layers.9999.attention.to_q.weight`",
    )
    assert "missing" not in message


def latent(shapes: dict[str, tuple[int, ...]]) -> None:
    drop("local_decoder.")(shapes)
    drop("all_x_embedder.")(shapes)
    shapes["all_x_embedder.2-1.weight"] = (64, 64)
    shapes["all_x_embedder.2-1.bias"] = (64,)
    shapes["all_final_layer.2-1.linear.weight"] = (64, 64)


@pytest.mark.parametrize("fused", [False, True])
def test_latent_checkpoint(fused: bool, tmp_path: Path, profile: Path) -> None:
    shapes = shapes_with(latent)
    if fused:
        state = tiny_checkpoint.fused({name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
        shapes = {name: value.shape for name, value in state.items() if "final_layer" not in name}
        assert shapes["model.diffusion_model.x_embedder.weight"] == (64, 64)
    bad = write_sparse(tmp_path / "z_image.safetensors", layout(shapes))
    refuse(bad, profile, 4, "latent Z-Image checkpoint", "local_decoder")


def test_fused_rows_that_do_not_split(tmp_path: Path, profile: Path) -> None:
    state = tiny_checkpoint.fused(tiny_checkpoint.checkpoint())
    shapes = {name: value.shape for name, value in state.items()}
    shapes["model.diffusion_model.layers.1.attention.qkv.weight"] = (191, 64)
    bad = write_sparse(tmp_path / "bad.safetensors", layout(shapes))
    refuse(bad, profile, 4, "layers.1.attention.qkv.weight", "do not split in three")


def test_one_tensor_under_two_spellings(tmp_path: Path, profile: Path) -> None:
    shapes = shapes_with(reshape((192, 64), "layers.1.attention.qkv.weight"))
    bad = write_sparse(tmp_path / "bad.safetensors", layout(shapes))
    refuse(bad, profile, 4, "layers.1.attention.qkv.weight", "both hold `layers.1.attention.to_q.weight`")


def test_another_model(tmp_path: Path, profile: Path) -> None:
    bad = write_sparse(tmp_path / "llm.safetensors", layout({"model.embed_tokens.weight": (4, 4)}))
    refuse(bad, profile, 4, "no known family", "model.embed_tokens.weight", "z_image_l2p")


def test_absent_file(tmp_path: Path, profile: Path) -> None:
    refuse(tmp_path / "nowhere.safetensors", profile, 2, "there is no checkpoint", "nowhere.safetensors")


def test_endless_file_name(profile: Path) -> None:
    result = run_cli("build", "x" * 5000 + ".safetensors", "--profile", profile, "--out", profile.with_name("out"))
    assert result.returncode == 2
    assert "there is no checkpoint" in result.stderr
    assert not profile.with_name("out").exists()


def test_empty_folder(tmp_path: Path, profile: Path) -> None:
    (tmp_path / "model").mkdir()
    refuse(tmp_path / "model", profile, 4, "holds 0 .safetensors files", "model")


def test_folder_with_two_files(tmp_path: Path, tiny_path: Path, profile: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("one", "two"):
        (folder / f"{name}.safetensors").symlink_to(tiny_path)
    refuse(folder, profile, 4, "holds 2 .safetensors files", "one.safetensors, two.safetensors")


def test_folder_named_like_a_file(tmp_path: Path, profile: Path) -> None:
    (tmp_path / "x.safetensors").mkdir()
    refuse(tmp_path / "x.safetensors", profile, 4, "the folder", "x.safetensors", "holds 0")


def special_file(kind: str, folder: Path) -> Path:
    path = folder / f"{kind}.safetensors"
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to({"zero": "/dev/zero", "null": "/dev/null"}[kind])
    return path


@pytest.mark.parametrize("kind", ["fifo", "zero", "null"])
def test_special_file_does_not_hang(kind: str, tmp_path: Path, profile: Path) -> None:
    command = [sys.executable, "-m", "l2p_export", "build", str(special_file(kind, tmp_path)), "--profile"]
    command += [str(profile), "--out", str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    assert result.returncode == 4
    assert f"{kind}.safetensors` is not a regular file" in result.stderr
    assert not (tmp_path / "out").exists()


def test_unreadable_file(tmp_path: Path, tiny_path: Path, profile: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root reads every file")
    bad = tmp_path / "locked.safetensors"
    shutil.copy(tiny_path, bad)
    bad.chmod(0)
    refuse(bad, profile, 4, "cannot read", "locked.safetensors", "Permission denied")


def write_spoilt(path: Path, name: str, value: float) -> Path:
    """The tiny checkpoint with one value in the middle of a tensor replaced."""
    state = tiny_checkpoint.checkpoint()
    state[name].reshape(-1)[state[name].size // 2] = value
    save_file(state, path)
    return path


@pytest.mark.slow
def test_nan_at_the_command_line(tmp_path: Path, profile: Path) -> None:
    bad = write_spoilt(tmp_path / "nan.safetensors", "cap_embedder.1.weight", float("nan"))
    refuse(bad, profile, 4, "weight `cap_embedder.1.weight` holds NaN or Inf")


def test_nan_keeps_nothing(tmp_path: Path) -> None:
    name = "cap_embedder.1.weight"
    bad = load_model(write_spoilt(tmp_path / "nan.safetensors", name, float("nan")))
    out, tensors = tmp_path / "out", {name: bad.checkpoint.tensors[name]}

    def write() -> None:
        with open_output(out) as output:
            (output.root / "graphs").mkdir()
            write_weights(output.root / "graphs" / "x.partial", tensors, {name: "F32"}, lambda n: None)

    with pytest.raises(ArtifactError, match=f"`{name}` holds NaN or Inf"):
        write()
    assert not out.exists()


def test_nan_over_a_good_bundle_leaves_it(tmp_path: Path, profile: Path, bundles: Bundles) -> None:
    out = tmp_path / "bundle"
    shutil.copytree(bundles.path("tiny-16"), out)
    # What a build that was stopped has finished stays too.
    copy_traces(bundles.store, out, "caption.fp32")
    before = {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    bad = write_spoilt(tmp_path / "nan.safetensors", "cap_embedder.1.weight", float("nan"))
    result = run_cli("build", bad, "--profile", profile, "--out", out)
    assert result.returncode == 4
    assert "cap_embedder.1.weight" in result.stderr
    assert {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["F32", "F16"])
def test_one_bad_value_in_a_large_tensor(value: float, dtype: str, tmp_path: Path) -> None:
    path = write_spoilt(tmp_path / "bad.safetensors", "local_decoder.dec4.0.weight", value)
    tensors = load_model(path).checkpoint.tensors
    names = ["local_decoder.dec4.0.bias", "local_decoder.dec4.0.weight"]
    with pytest.raises(ArtifactError, match=r"`local_decoder.dec4.0.weight` holds NaN or Inf"):
        write_weights(
            tmp_path / "x", {name: tensors[name] for name in names}, dict.fromkeys(names, dtype), lambda n: None
        )


def test_value_beyond_float16(tmp_path: Path) -> None:
    tensors = load_model(write_spoilt(tmp_path / "bad.safetensors", BIG, -7e4)).checkpoint.tensors
    with pytest.raises(ArtifactError, match=f"`{BIG}` reaches 7e\\+04"):
        write_weights(tmp_path / "x", {BIG: tensors[BIG]}, {BIG: "F16"}, lambda n: None)
    write_weights(tmp_path / "x", {BIG: tensors[BIG]}, {BIG: "F32"}, lambda n: None)


def test_float64_beyond_float32_is_refused_without_a_warning(tmp_path: Path) -> None:
    state = {name: value.astype(np.float64) for name, value in tiny_checkpoint.checkpoint().items()}
    state[BIG][3, 3] = 1e300
    save_file(state, tmp_path / "bad.safetensors")
    tensors = load_model(tmp_path / "bad.safetensors").checkpoint.tensors
    with pytest.raises(ArtifactError, match=f"`{BIG}` holds NaN or Inf"):
        write_weights(tmp_path / "x", {BIG: tensors[BIG]}, {BIG: "F32"}, lambda n: None)


BAD_SAMPLING = [
    {"l2p.steps": "many"},
    {"l2p.steps": "0"},
    {"l2p.steps": "-4"},
    {"l2p.steps": "2.5"},
    {"l2p.steps": "9" * 5000},
    {"l2p.guidance": "nan"},
    {"l2p.guidance": "inf"},
    {"l2p.shift": "0"},
]


@pytest.mark.parametrize("metadata", BAD_SAMPLING)
def test_bad_sampling_metadata(metadata: dict[str, str]) -> None:
    with pytest.raises(ArtifactError, match="the checkpoint's sampling metadata is wrong"):
        sampling_defaults(metadata, Sampling())


def test_bad_sampling_metadata_at_the_command_line(tmp_path: Path, profile: Path) -> None:
    save_file(tiny_checkpoint.checkpoint(), tmp_path / "bad.safetensors", {"l2p.steps": "many"})
    refuse(tmp_path / "bad.safetensors", profile, 4, "sampling metadata", "many")


def test_patch_that_does_not_fit_the_profile(tmp_path: Path, tiny_path: Path) -> None:
    bad = tmp_path / "tiny.safetensors"
    bad.symlink_to(tiny_path)
    profile = write_profile(tmp_path / "wrong.toml", 64)
    refuse(bad, profile, 2, "`wrong` is for 64 px patches, the checkpoint has 16 px", "patch_px = 16", "`1k`")


GOOD = {
    "patch_px": "16",
    "height_px": "{ min = 16, opt = 32, max = 64 }",
    "width_px": "{ min = 16, opt = 32, max = 64 }",
}


def toml(**changes: str) -> str:
    return "".join(f"{key} = {value}\n" for key, value in (GOOD | changes).items())


PROFILES: dict[str, tuple[str, tuple[str, ...]]] = {
    "not TOML": ("patch_px = = 16", ("is not TOML",)),
    "nested": ("x = " + "[" * 50_000, ("is not TOML",)),
    "digits": ("patch_px = " + "9" * 5000, ("is not TOML",)),
    "unknown key": (toml(height="5"), ("unknown keys height", "the keys are")),
    "missing key": ("patch_px = 16", ("lacks height_px, width_px",)),
    "wrong type": (toml(patch_px='"16"'), ("patch_px is '16', expected int",)),
    "bool": (toml(patch_px="true"), ("patch_px is True, expected int",)),
    "float": (toml(patch_px="16.0"), ("patch_px is 16.0, expected int",)),
    "patch 0": (toml(patch_px="0"), ("patch_px is 0",)),
    "min equals max": (toml(height_px="{ min = 32, opt = 32, max = 32 }"), ("height_px min equals max (32)",)),
    "order": (toml(width_px="{ min = 64, opt = 32, max = 96 }"), ("width_px: min 64, opt 32, max 96",)),
    "not divisible": (toml(width_px="{ min = 16, opt = 33, max = 64 }"), ("width_px 33 not a multiple of 16 px",)),
    "beyond the positions": (toml(width_px="{ min = 16, opt = 32, max = 16000000 }"), ("the model reaches 8192 px",)),
    "caption": (toml(caption_tokens="{ min = 1, opt = 2, max = 3 }"), ("caption_tokens must be multiples of 32",)),
    "positions": (toml(positions='"rope"'), ("positions is 'rope'", "'native', 'linear', 'ntk', 'yarn'")),
    "steps": (toml(sampling="{ steps = 0 }"), ("steps is 0, expected 1 to 1000",)),
    "guidance nan": (toml(sampling="{ guidance = nan }"), ("guidance is nan",)),
    "guidance huge": (toml(sampling=f"{{ guidance = {10**400} }}"), ("guidance is 1000", "finite")),
    "name climbs": (toml(name='"../../elsewhere"'), ("'../../elsewhere' is refused",)),
}


@pytest.mark.parametrize("case", PROFILES)
def test_bad_profile(case: str, tmp_path: Path, tiny_path: Path) -> None:
    text, needles = PROFILES[case]
    (tmp_path / "bad.toml").write_text(text)
    checkpoint = tmp_path / "tiny.safetensors"
    checkpoint.symlink_to(tiny_path)
    message = refuse(checkpoint, tmp_path / "bad.toml", 2, *needles)
    assert "bad" in message


def test_good_profile_of_these_tests_is_good(tmp_path: Path) -> None:
    (tmp_path / "good.toml").write_text(toml())
    assert load_profile(str(tmp_path / "good.toml")).name == "good"


def test_absent_profile(tmp_path: Path, tiny_path: Path) -> None:
    checkpoint = tmp_path / "tiny.safetensors"
    checkpoint.symlink_to(tiny_path)
    refuse(checkpoint, "16k", 2, "there is no profile `16k`", "1k, ", "8k-zeroshot")


def test_profile_that_is_binary(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="is UTF-16, expected UTF-8"):
        load_profile(str(tmp_path / "bad.toml"))


@pytest.mark.parametrize("name", ["", "x" * 5000, "..", "/dev/zero", "4k\n"])
def test_profile_names_that_are_none(name: str) -> None:
    with pytest.raises(UsageError, match="there is no profile"):
        load_profile(name)


def test_unknown_precision(tmp_path: Path, tiny_path: Path, profile: Path) -> None:
    checkpoint = tmp_path / "tiny.safetensors"
    checkpoint.symlink_to(tiny_path)
    refuse(checkpoint, profile, 2, "there is no precision `int3`", "fp32", options=("--precision", "int3"))


def test_out_is_a_file(tmp_path: Path, tiny_path: Path, profile: Path) -> None:
    out = tmp_path / "out"
    out.write_text("precious")
    result = run_cli("build", tiny_path, "--profile", profile, "--out", out)
    assert result.returncode == 2
    assert f"`{out}` is not a folder" in result.stderr
    assert "Traceback" not in result.stderr
    assert out.read_text() == "precious"


@pytest.mark.parametrize("foreign", ["graphs.txt", "Documents/thesis.pdf"])
def test_out_with_foreign_files(foreign: str, tmp_path: Path, tiny_path: Path, profile: Path) -> None:
    out = tmp_path / "out"
    (out / foreign).parent.mkdir(parents=True)
    (out / foreign).write_text("precious")
    result = run_cli("build", tiny_path, "--profile", profile, "--out", out)
    assert result.returncode == 2
    assert "holds other files" in result.stderr
    assert Path(foreign).parts[0] in result.stderr
    assert [path for path in out.rglob("*") if path.is_file()] == [out / foreign]
    assert (out / foreign).read_text() == "precious"


def test_out_below_a_file(tmp_path: Path, tiny_path: Path, profile: Path) -> None:
    (tmp_path / "file").write_text("precious")
    result = run_cli("build", tiny_path, "--profile", profile, "--out", tmp_path / "file" / "out")
    assert result.returncode in (2, 3)
    assert "file/out" in result.stderr
    assert "Traceback" not in result.stderr
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("arguments", [("build",), ("build", "--profile"), ("build", "x", "--nonsense"), ("bild",)])
def test_usage(arguments: tuple[str, ...]) -> None:
    result = run_cli(*arguments)
    assert result.returncode == 2
    assert "Error" in result.stderr
    assert "Traceback" not in result.stderr


# Fuzzing: a small valid header, spoilt at random.

ENTRIES = layout(dict(list(tiny_checkpoint.shapes().items())[:3]) | {"local_decoder.out_conv.bias": (3,)})
HEADER = json.dumps({"__metadata__": {"l2p.steps": "4"}} | ENTRIES).encode()
DATA_BYTES = max(item["data_offsets"][1] for item in ENTRIES.values())

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**31, 2**32, 2**62, 2**63, 2**64, 10**40, -1, 0])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["F32", "BF16", "F8_E4M3", "BOOL"])
)
LISTS = st.lists(SCALARS, max_size=4)
VALUES = (
    SCALARS | LISTS | st.lists(LISTS, max_size=2) | st.dictionaries(st.text(max_size=4), SCALARS | LISTS, max_size=3)
)


def open_or_refuse(path: Path, content: bytes) -> None:
    """Either it opens, or the error is one of ours; what opens can be read."""
    path.write_bytes(content)
    try:
        file = open_tensorfile(path)
    except L2PError:
        pass
    else:
        for name, info in file.tensors.items():
            assert file.read(name).nbytes == info.size_bytes
    load_or_refuse(path)


def load_or_refuse(path: Path) -> None:
    with suppress(L2PError):
        load_model(path)


@pytest.fixture(scope="module")
def fuzz_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "fuzz.safetensors"


def test_fuzz_seed_is_valid(fuzz_path: Path) -> None:
    fuzz_path.write_bytes(raw(HEADER, bytes(DATA_BYTES)))
    assert open_tensorfile(fuzz_path).tensors.keys() == ENTRIES.keys()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_fuzz_header_bytes(data: st.DataObject, fuzz_path: Path) -> None:
    content = bytearray(raw(HEADER, bytes(DATA_BYTES)))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(HEADER) + 8))
        content[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    open_or_refuse(fuzz_path, bytes(content))


@settings(max_examples=200, deadline=None)
@given(name=st.sampled_from(sorted(ENTRIES)), key=st.sampled_from(["dtype", "shape", "data_offsets"]), value=VALUES)
def test_fuzz_entry_values(name: str, key: str, value: object, fuzz_path: Path) -> None:
    entries = ENTRIES | {name: ENTRIES[name] | {key: value}}
    open_or_refuse(fuzz_path, raw(entries, bytes(DATA_BYTES)))


@settings(max_examples=100, deadline=None)
@given(header=VALUES, metadata=VALUES, data=st.binary(max_size=32))
def test_fuzz_whole_header(header: object, metadata: object, data: bytes, fuzz_path: Path) -> None:
    open_or_refuse(fuzz_path, raw(header, data))
    open_or_refuse(fuzz_path, raw({"__metadata__": metadata} | ENTRIES, bytes(DATA_BYTES)))


@settings(max_examples=150, deadline=None)
@given(
    names=st.lists(st.sampled_from(sorted(tiny_checkpoint.shapes())), min_size=1, max_size=4, unique=True),
    shape=st.lists(st.sampled_from([0, 1, 2, 3, 64, 65, 768]), max_size=4),
    zero=st.booleans(),
)
def test_fuzz_shapes(names: list[str], shape: list[int], zero: bool, fuzz_path: Path) -> None:
    shapes = {name: (0, *size[1:]) if zero else size for name, size in tiny_checkpoint.shapes().items()}
    entries = layout(shapes | dict.fromkeys(names, tuple(shape)))
    write_sparse(fuzz_path, entries)
    load_or_refuse(fuzz_path)
