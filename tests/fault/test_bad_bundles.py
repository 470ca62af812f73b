"""Bundles that were damaged, edited or forged: every command refuses them with code 4 and names the place."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import Bundles, run_cli
from l2p_runtime import Pipeline
from l2p_runtime.bundle import FULL_HASH_BYTES, check_file, file_record, open_bundle, verify_files
from l2p_runtime.contract import MANIFEST_NAME, FileRecord, manifest_from_bytes, manifest_to_bytes
from l2p_runtime.errors import ArtifactError, L2PError
from l2p_runtime.requests import image_request
from l2p_runtime.tensorfile import open_tensorfile, write_tensorfile

Json = dict[str, Any]

WIDTH = 40
DIGEST = "0" * 64


@pytest.fixture(scope="module")
def good(bundles: Bundles) -> Path:
    return bundles.path("tiny-16")


@pytest.fixture
def bundle(good: Path, tmp_path: Path) -> Path:
    """A copy whose files are links to the good bundle's: replace them, never write into them."""
    shutil.copytree(good, tmp_path / "bundle", copy_function=os.link)
    return tmp_path / "bundle"


def replace(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def manifest_of(bundle: Path) -> Json:
    data: Json = json.loads((bundle / MANIFEST_NAME).read_bytes())
    return data


def rewrite(bundle: Path, change: Callable[[Json], object]) -> None:
    data = manifest_of(bundle)
    change(data)
    replace(bundle / MANIFEST_NAME, json.dumps(data).encode())


def largest(bundle: Path) -> Path:
    return next((bundle / "graphs").glob("head.fp32.*.safetensors"))


def graph(bundle: Path) -> Path:
    """What ONNX Runtime runs of the trunk on the CPU."""
    return next((bundle / "graphs").glob("trunk.fp32.*.cpu.onnx"))


def rename_file(data: Json, path: str) -> None:
    """Let the manifest call its first graph `path`, wherever it is named."""
    old = data["graphs"][0]["graph"]
    data["graphs"][0]["graph"] = path
    next(record for record in data["files"] if record["path"] == old)["path"] = path


def link_away(bundle: Path) -> None:
    path, target = largest(bundle), bundle.parent / "elsewhere"
    path.rename(target)
    path.symlink_to(target)


def link_folder(bundle: Path) -> None:
    (bundle / "graphs").rename(bundle.parent / "elsewhere")
    (bundle / "graphs").symlink_to(bundle.parent / "elsewhere")


def flip_middle(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    replace(path, bytes(content))


def make_huge(bundle: Path) -> None:
    (bundle / MANIFEST_NAME).unlink()
    with (bundle / MANIFEST_NAME).open("wb") as file:
        file.truncate(80 << 20)


def drop_graph(data: Json) -> None:
    data["graphs"] = [record for record in data["graphs"] if (record["network"], record["plan"]) != ("tail", "fp16")]


DAMAGE: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "not JSON": (lambda b: replace(b / MANIFEST_NAME, b'{"schema": 1,'), ("bundle.json", "not JSON")),
    "empty": (lambda b: replace(b / MANIFEST_NAME, b""), ("bundle.json", "not JSON")),
    "nested": (lambda b: replace(b / MANIFEST_NAME, b"[" * 100_000), ("bundle.json", "not JSON")),
    "list": (lambda b: replace(b / MANIFEST_NAME, b"[1]"), ("bundle.json", "schema version None")),
    "schema": (lambda b: rewrite(b, lambda d: d.update(schema=99)), ("schema version 99", "reads 1")),
    "unknown key": (lambda b: rewrite(b, lambda d: d.update(extra=1)), ("unknown keys extra",)),
    "missing key": (lambda b: rewrite(b, lambda d: d.pop("ledger")), ("lacks ledger",)),
    "wrong type": (
        lambda b: rewrite(b, lambda d: d["files"][3].update(size_bytes="12")),
        ("files[3].size_bytes is '12', expected int",),
    ),
    "climbing path": (
        lambda b: rewrite(b, lambda d: rename_file(d, "graphs/../../secret")),
        ("path 'graphs/../../secret' is refused",),
    ),
    "absolute path": (lambda b: rewrite(b, lambda d: rename_file(d, "/etc/passwd")), ("'/etc/passwd' is refused",)),
    "backslash": (lambda b: rewrite(b, lambda d: rename_file(d, "graphs\\x.onnx")), (r"'graphs\\x.onnx' is refused",)),
    "NUL": (lambda b: rewrite(b, lambda d: rename_file(d, "graphs/x\0.onnx")), (r"'graphs/x\x00.onnx' is refused",)),
    "symbolic link": (link_away, ("head.fp32.", "is a symbolic link")),
    "linked folder": (link_folder, ("graphs/", "is a symbolic link")),
    "file removed": (lambda b: largest(b).unlink(), ("the bundle lacks `graphs/head.fp32.",)),
    "file truncated": (
        lambda b: replace(largest(b), largest(b).read_bytes()[:-1]),
        ("head.fp32.", "bytes, the manifest says"),
    ),
    "one bit": (lambda b: flip_middle(largest(b)), ("head.fp32.", "was changed after it was built")),
    "graph replaced": (
        lambda b: replace(graph(b), graph(b).read_bytes()[::-1]),
        ("trunk.fp32.", "was changed after it was built"),
    ),
    "plan lacks a graph": (lambda b: rewrite(b, drop_graph), ("no graph for tail in fp16",)),
    "huge": (make_huge, ("bundle.json` has 83886080 bytes",)),
    "ledger failed": (
        lambda b: rewrite(b, lambda d: d["ledger"][0].update(status="failed")),
        ("ledger holds comparisons that failed: caption on ranges",),
    ),
    "file twice": (lambda b: rewrite(b, lambda d: d["files"].append(d["files"][0])), ("stands twice",)),
    "file unused": (
        lambda b: rewrite(b, lambda d: d["files"].append(d["files"][0] | {"path": "graphs/left"})),
        ("file list", "graphs/left"),
    ),
    "no SHA-256": (lambda b: rewrite(b, lambda d: d["files"][0].update(sha256="beef")), ("'beef' is no SHA-256",)),
    "key twice": (
        lambda b: replace(b / MANIFEST_NAME, b'{"schema": 1, "schema": 1}'),
        ("bundle.json", "a key twice"),
    ),
}


def commands(bundle: Path) -> dict[str, tuple[str | Path, ...]]:
    out, embeddings = bundle.parent / "x.png", bundle.parent / "embeddings.npy"
    np.save(embeddings, np.ones((7, WIDTH), np.float32))
    drawing = ("generate", bundle, "--embeddings", embeddings, "--size", "32x32", "--out", out)
    return {"generate": drawing, "verify": ("verify", bundle), "inspect": ("inspect", bundle)}


def refuse(bundle: Path, *needles: str) -> None:
    """Every command says each needle, with code 4, and writes nothing."""
    for arguments in commands(bundle).values():
        result = run_cli(*arguments)
        assert result.returncode == 4, (arguments[0], result.stdout, result.stderr)
        assert "Traceback" not in result.stderr
        assert result.stdout == ""
        for needle in needles:
            assert needle in result.stderr
    assert not (bundle.parent / "x.png").exists()


@pytest.mark.parametrize("case", DAMAGE)
def test_damage(case: str, bundle: Path) -> None:
    damage, needles = DAMAGE[case]
    damage(bundle)
    refuse(bundle, *needles)


def test_no_manifest(bundle: Path) -> None:
    (bundle / MANIFEST_NAME).unlink()
    for name, arguments in commands(bundle).items():
        result = run_cli(*arguments)
        assert result.returncode == 4
        assert ("has no bundle.json" if name != "inspect" else "holds 0 .safetensors files") in result.stderr


def test_no_folder(bundle: Path) -> None:
    shutil.rmtree(bundle)
    for arguments in commands(bundle).values():
        result = run_cli(*arguments)
        assert result.returncode == 2
        assert re.search(f"there is no (checkpoint or )?bundle `{bundle}`", result.stderr)


def test_files_of_the_good_bundle_were_not_touched(good: Path) -> None:
    verify_files(open_bundle(good), lambda size: None)


MANIFESTS: dict[str, tuple[Callable[[Json], object], str]] = {
    "no profiles": (lambda d: d.update(profiles=[]), "no profile or no precision plan"),
    "no plans": (lambda d: d.update(plans=[]), "no profile or no precision plan"),
    "other networks": (lambda d: d["networks"].pop(), "other networks than caption, stem, trunk, tail, head"),
    "dimension": (
        lambda d: d["networks"][0]["inputs"][0].update(shape=["B*B", 3]),
        r"networks\[0\].inputs\[0\].*B\*B",
    ),
    "dtype": (lambda d: d["networks"][0]["inputs"][0].update(dtype="object"), "'object', expected one of 'float32'"),
    "boolean size": (lambda d: d["files"][0].update(size_bytes=True), r"files\[0\].size_bytes is True"),
    "negative size": (lambda d: d["files"][0].update(size_bytes=-1), "size_bytes is -1"),
    "network twice": (lambda d: d["networks"].append(d["networks"][0]), "other networks than caption"),
    "width": (lambda d: d["model"].update(width=128), "width is 128, expected 2 heads of 32"),
    "patch 0": (lambda d: d["model"].update(patch_px=0), "patch_px is 0"),
    "multiple 0": (lambda d: d["model"].update(sequence_multiple=0), "sequence_multiple is 0"),
    "row multiple 0": (lambda d: d["model"]["head"].update(row_multiple=0), "row_multiple is 0"),
    "trunk": (lambda d: d["model"].update(trunk_layers=[4, 2]), "trunk_layers is 4 to 2"),
    "three trunk layers": (lambda d: d["model"].update(trunk_layers=[1, 2, 3]), "a list of 2"),
    "odd axis": (lambda d: d["model"]["rotary"].update(axis_channels=[8, 11, 13]), "must be positive and even"),
    "theta": (lambda d: d["model"]["rotary"].update(theta=0), "theta is 0"),
    "theta endless": (lambda d: d["model"]["rotary"].update(theta=10**400), "expected a finite number"),
    "theta Infinity": (lambda d: d["model"]["rotary"].update(theta=float("inf")), "expected a finite number"),
    "peak NaN": (lambda d: d["model"]["head"].update(peak_values_per_px=float("nan")), "expected a finite number"),
    "profile patch": (lambda d: d["model"].update(patch_px=64), "is for 16 px patches"),
    "profile order": (lambda d: d["profiles"][0]["height_px"].update(min=10**9), "min 1000000000"),
    "sampling": (lambda d: d["sampling"].update(steps=0), "sampling: steps is 0"),
    "surrogate": (lambda d: d.update(producer="\ud800"), "lone surrogates"),
    "status": (lambda d: d["ledger"][0].update(status="skipped"), "'skipped', expected one of 'passed'"),
    "digest of another kind": (lambda d: d["files"][0].update(stamp="A" * 64), "is no SHA-256"),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_manifest(case: str, good: Path) -> None:
    change, needle = MANIFESTS[case]
    data = manifest_of(good)
    change(data)
    with pytest.raises(L2PError, match=needle):
        manifest_from_bytes(json.dumps(data).encode())


@pytest.mark.parametrize("case", ["dimension", "patch 0", "profile patch", "sampling", "surrogate"])
def test_any_fault_of_a_manifest_is_an_artifact_error(case: str, bundle: Path) -> None:
    rewrite(bundle, MANIFESTS[case][0])
    with pytest.raises(ArtifactError, match=r"bundle\.json"):
        open_bundle(bundle)


def test_manifest_survives_its_own_bytes(good: Path) -> None:
    data = (good / MANIFEST_NAME).read_bytes()
    assert manifest_to_bytes(manifest_from_bytes(data)) == data


BAD_PATHS = [
    *("", ".", "..", "graphs", "graphs/", "graphs//x", "graphs/.", "graphs/..", "graphs/.hidden", "graphs/a/b"),
    *("graphs/../x", "./graphs/x", "/graphs/x", "graphs/a..b", "C:/x", "graphs/C:x", "file:///x", "engine/x"),
    *("graphs/x\n", "graphs/x ", "graphs/\u202ex", "graphs/" + "x" * 300, "Graphs/x", "graphs/~", "bundle.json"),
]


@pytest.mark.parametrize("path", BAD_PATHS)
def test_path(path: str) -> None:
    with pytest.raises(ArtifactError, match="is refused"):
        FileRecord(path, 0, DIGEST, DIGEST)


def test_special_file_in_a_bundle_does_not_hang(bundle: Path) -> None:
    path = graph(bundle)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ArtifactError, match=r"the bundle lacks `graphs/trunk\.fp32"):
        open_bundle(bundle)


def test_large_file_is_stamped_on_open_and_hashed_on_verify(tmp_path: Path, good: Path) -> None:
    path = tmp_path / "graphs" / "large.safetensors"
    path.parent.mkdir()
    with path.open("wb") as file:
        file.truncate(FULL_HASH_BYTES + 1)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    record = file_record(tmp_path, path, digest)
    with path.open("r+b") as file:
        file.seek(FULL_HASH_BYTES // 2)
        file.write(b"x")
    check_file(tmp_path, record, full=False)
    with pytest.raises(ArtifactError, match=r"large.safetensors` was changed"):
        check_file(tmp_path, record, full=True)
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    with pytest.raises(ArtifactError, match=r"large.safetensors` was changed"):
        check_file(tmp_path, record, full=False)


def forge(bundle: Path, path: Path, content: bytes) -> None:
    """Replace a file and write its new digests into the manifest, as somebody careless or hostile would."""
    relative = path.relative_to(bundle).as_posix()
    replace(path, content)
    digest = hashlib.sha256(content).hexdigest()
    record = file_record(bundle, path, digest)

    def change(data: Json) -> None:
        entry = next(entry for entry in data["files"] if entry["path"] == relative)
        entry.update(size_bytes=record.size_bytes, sha256=record.sha256, stamp=record.stamp)

    rewrite(bundle, change)


def test_verify_says_parity_when_expected_outputs_differ(bundle: Path, tmp_path: Path) -> None:
    path = next((bundle / "reference").glob("padded.*"))
    file = open_tensorfile(path)
    tensors = {name: file.read(name).copy() for name in file.tensors}
    tensors["head.prediction"] = tensors["head.prediction"] + np.float32(1)
    write_tensorfile(tmp_path / "altered", tensors)
    forge(bundle, path, (tmp_path / "altered").read_bytes())
    result = run_cli("verify", bundle, "--plan", "fp32")
    assert result.returncode == 5, result.stderr
    assert "Traceback" not in result.stderr
    assert "head in torch float32 -> fp32 graph on padded" in result.stderr
    assert "end-to-end" in result.stderr
    assert "on full" not in result.stderr
    assert "failed" in result.stdout


@pytest.mark.parametrize("content", [b"", b"not onnx at all", b"\x08\x0a\x12\x00" * 50])
def test_forged_graph(content: bytes, bundle: Path) -> None:
    forge(bundle, graph(bundle), content)
    with pytest.raises(ArtifactError, match=r"trunk\.fp32"):
        Pipeline.open(bundle)


def test_graphs_exchanged(bundle: Path) -> None:
    def change(data: Json) -> None:
        records = {record["network"]: record for record in data["graphs"] if record["plan"] == "fp32"}
        stem, tail = records["stem"], records["tail"]
        for key in ("graph", "fused"):
            stem[key], tail[key] = tail[key], stem[key]

    rewrite(bundle, change)
    with pytest.raises(ArtifactError, match="the manifest says"):
        Pipeline.open(bundle)


def test_forged_reference_header(bundle: Path) -> None:
    path = next((bundle / "reference").glob("padded.*"))
    forge(bundle, path, b"\x80\x02junk")
    result = run_cli("verify", bundle, "--plan", "fp32")
    assert result.returncode == 4
    assert "too short" in result.stderr or "is a pickle" in result.stderr
    assert path.name in result.stderr


VALUES = st.sampled_from(
    [
        *(None, True, 0, 1, -1, 2**31, 2**63, 10**30, 10**400, 0.5, -1.5, float("nan"), float("inf")),
        *("", "x", "\0", "\ud800", "B", "0*B", "fp32", "../x", "graphs/x", "a" * 300),
        *([], [1], [1, 2], [[]], {}, {"min": 1}),
    ]
)


def places(data: object, prefix: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """The path to every value in parsed JSON."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [place for key, value in items for place in [(*prefix, key), *places(value, (*prefix, key))]]


@pytest.fixture(scope="module")
def parsed(good: Path) -> tuple[Json, list[tuple[str | int, ...]]]:
    """A manifest without most of its ledger, and every place in it."""
    data = manifest_of(good)
    data["ledger"] = data["ledger"][:1]
    manifest_from_bytes(json.dumps(data).encode())
    return data, places(data)


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_fuzz_manifest(data: st.DataObject, parsed: tuple[Json, list[tuple[str | int, ...]]]) -> None:
    spoilt = copy.deepcopy(parsed[0])
    place = data.draw(st.sampled_from(parsed[1]))
    holder: Any = spoilt
    for key in place[:-1]:
        holder = holder[key]
    if data.draw(st.booleans()):
        holder[place[-1]] = data.draw(VALUES)
    else:
        del holder[place[-1]]
    with suppress(L2PError):
        manifest = manifest_from_bytes(json.dumps(spoilt).encode())
        manifest_to_bytes(manifest)
        embeds = np.ones((7, manifest.model.caption_width % 4096 or 1), np.float32)
        image_request(
            manifest,
            prompt=None,
            negative_prompt=None,
            prompt_embeds=embeds,
            negative_embeds=embeds,
            height=32,
            width=32,
            seed=0,
            sampling={},
            rng="philox",
            dtype="uint8",
        )
