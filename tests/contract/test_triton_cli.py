"""Writing a model repository, and finding faults in one, without a server."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from conftest import run_cli
from fakes.engine_bundles import add_engines
from l2p_export.cli.triton import command
from l2p_export.serving.configs import NETWORK_PREFIX, Placement
from l2p_export.serving.lint import lint_repository
from l2p_export.serving.repository import RepositorySpec, template, write_repository
from l2p_runtime import UsageError
from l2p_runtime.bundle import file_digest, file_record, open_bundle
from l2p_runtime.contract import NETWORKS, manifest_to_bytes
from l2p_runtime.files import is_partial_of, partial_path
from l2p_runtime.progress import Silent
from l2p_runtime.serving import Limits, ServiceSpec

if TYPE_CHECKING:
    from conftest import Bundles

TARGETS = {"tensorrt11.0-sm90": "11.0.0.1", "tensorrt11.0-sm120": "11.0.0.1", "rtx1.7-sm89": "1.7.1.116"}


@pytest.fixture(scope="module")
def written(bundles: Bundles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("triton") / "repository"
    result = run_cli(
        "triton", bundles.path("tiny-16-fused"), "--out", root, "--warm-up", "64x32", "--max-pixels", "4096"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("version 1") == 3
    return root


@pytest.fixture
def repository(written: Path, tmp_path: Path) -> Path:
    """A repository to break; the bundle's files are links, to be replaced and not written to."""

    def copy(source: str, target: str) -> None:
        (os.link if "/bundle/" in source else shutil.copy2)(source, target)

    return Path(shutil.copytree(written, tmp_path / "repository", copy_function=copy))


@pytest.fixture
def engines(bundles: Bundles, tmp_path: Path) -> Path:
    """A bundle with fake TensorRT engines for two GPUs and one of TensorRT for RTX."""
    root = Path(shutil.copytree(bundles.path("tiny-16-fused"), tmp_path / "engines"))
    plain = (root / "bundle.json").read_bytes()
    records, files = [], []
    for target, version in TARGETS.items():
        (root / "bundle.json").write_bytes(plain)
        add_engines(root, "fp32", target=target, version=version)
        manifest = open_bundle(root).manifest
        for record in manifest.engines:
            path = root / record.engine
            kept = path.rename(path.with_name(f"{path.stem}.{target}.engine"))
            records.append(replace(record, engine=f"engines/{kept.name}"))
            files.append(file_record(root, kept, file_digest(kept)))
    others = [record for record in manifest.files if not record.path.startswith("engines/")]
    every = tuple(sorted((*others, *files), key=lambda record: record.path))
    (root / "bundle.json").write_bytes(manifest_to_bytes(replace(manifest, engines=tuple(records), files=every)))
    return root


def config(repository: Path, model: str) -> Any:
    text = (repository / model / "config.pbtxt").read_text()
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def test_both_spellings_write_the_same(bundles: Bundles, written: Path, tmp_path: Path) -> None:
    asked = ("--out", tmp_path / "r", "--warm-up", "64x32", "--max-pixels", "4096", "--json")
    result = run_cli("triton", "write", bundles.path("tiny-16-fused"), *asked)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["new"] == ["l2p", "l2p_stream", "l2p_embeddings"]
    for model in ("l2p", "l2p_stream", "l2p_embeddings"):
        assert (tmp_path / "r" / model / "config.pbtxt").read_text() == (written / model / "config.pbtxt").read_text()


def test_a_written_repository_says_what_it_is(written: Path) -> None:
    assert run_cli("triton", "lint", written).returncode == 0
    found = config(written, "l2p")
    bundle = open_bundle(written / "l2p" / "1" / "bundle")
    assert found.parameters["bundle_digest"].string_value == bundle.digest
    assert found.parameters["max_pixels"].string_value == "4096"
    assert found.model_warmup[0].batch_size == 1
    assert (written / "l2p" / "warmup" / "width").read_bytes() == (64).to_bytes(4, "little")
    assert config(written, "l2p_stream").model_transaction_policy.decoupled
    assert found.instance_group[0].kind == found.instance_group[0].KIND_AUTO
    for model in ("l2p", "l2p_stream"):
        assert len(template(f"{model}/model.py").splitlines()) < 120


def test_models_share_the_bundles_files_on_the_disk(written: Path) -> None:
    bundle = open_bundle(written / "l2p" / "1" / "bundle")
    path = bundle.manifest.files[0].path
    inodes = {(written / model / "1" / "bundle" / path).stat().st_ino for model in ("l2p", "l2p_stream")}
    assert len(inodes) == 1


def test_writing_again_changes_nothing_and_another_bundle_is_the_next_version(
    bundles: Bundles, repository: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(bundles.path("tiny-16-fused"), tmp_path / "bundle"))
    spec = RepositorySpec(models=("l2p",))
    assert not write_repository(open_bundle(bundle), repository, spec, Silent()).new
    for steps, versions in ((3, ["1", "2"]), (4, ["2", "3"])):
        manifest = open_bundle(bundle).manifest
        other = replace(manifest, sampling=replace(manifest.sampling, steps=steps))
        (bundle / "bundle.json").write_bytes(manifest_to_bytes(other))
        planned = write_repository(open_bundle(bundle), repository, spec, Silent(), dry_run=True)
        done = write_repository(open_bundle(bundle), repository, spec, Silent())
        assert planned == done
        assert done.versions["l2p"] == int(versions[-1])
        folders = sorted(entry.name for entry in (repository / "l2p").iterdir() if entry.is_dir())
        assert folders == [*versions, "warmup"]
        assert not [f for f in lint_repository(repository) if f.model == "l2p"]


def test_what_a_killed_command_left_is_swept(bundles: Bundles, repository: Path) -> None:
    left = [partial_path(repository / "l2p" / name) for name in ("config.pbtxt", "2", "warmup/width")]
    left[0].write_bytes(b"half")
    left[1].mkdir()
    left[2].write_bytes(b"half")
    foreign = partial_path(repository / "other" / "x")
    foreign.parent.mkdir()
    foreign.touch()
    opened, spec = open_bundle(bundles.path("tiny-16-fused")), RepositorySpec(models=("l2p",))
    assert not write_repository(opened, repository, spec, Silent()).new
    assert [path for path in repository.rglob("*") if is_partial_of(path.name)] == [foreign]


def test_a_damaged_copy_is_written_again(bundles: Bundles, repository: Path) -> None:
    next((repository / "l2p" / "1" / "bundle" / "graphs").glob("head*.onnx")).unlink()
    opened = open_bundle(bundles.path("tiny-16-fused"))
    written = write_repository(opened, repository, RepositorySpec(models=("l2p",)), Silent())
    assert written.versions == {"l2p": 2}
    assert not [f for f in lint_repository(repository) if f.model == "l2p"]


def test_a_bundle_without_a_text_encoder_serves_embeddings(bundles: Bundles, tmp_path: Path) -> None:
    opened = open_bundle(bundles.path("tiny-16"))
    written = write_repository(opened, tmp_path / "r", RepositorySpec(), Silent())
    assert list(written.versions) == ["l2p_stream", "l2p_embeddings"]
    assert not lint_repository(tmp_path / "r")
    assert "prompt" not in {tensor.name for tensor in config(tmp_path / "r", "l2p_stream").input}
    with pytest.raises(UsageError, match="it has no text encoder"):
        write_repository(opened, tmp_path / "r", RepositorySpec(models=("l2p",)), Silent())


def test_a_bundle_may_stay_where_it_is(bundles: Bundles, tmp_path: Path) -> None:
    asked = ("--bundle-at", "/models/bundle", "--model", "l2p", "--out", tmp_path / "r")
    assert run_cli("triton", bundles.path("tiny-16-fused"), *asked).returncode == 0
    assert sorted(entry.name for entry in (tmp_path / "r" / "l2p" / "1").iterdir()) == ["glue.py", "model.py"]
    assert not lint_repository(tmp_path / "r")
    copied = write_repository(
        open_bundle(bundles.path("tiny-16-fused")), tmp_path / "r", RepositorySpec(models=("l2p",)), Silent()
    )
    assert copied.versions == {"l2p": 2}


def test_a_rewritten_path_is_said(bundles: Bundles, tmp_path: Path) -> None:
    asked = ("--model", "l2p", "--out", tmp_path / "r")
    said = []
    for options in (("/a",), ("/b", "--dry-run"), ("/b",), ("/b",), ("/b", "--warm-up", "32x32"), ("/b", "--json")):
        result = run_cli("triton", bundles.path("tiny-16-fused"), *asked, "--bundle-at", *options)
        assert result.returncode == 0, result.stderr
        said.append(result.stdout)
    name = f"{tmp_path / 'r' / 'l2p'}: version 1\n"
    assert said[:5] == [
        f"wrote {name}",
        f"would update the configuration of {name}",
        f"updated the configuration of {name}",
        f"unchanged {name}",
        f"updated the configuration of {name}",
    ]
    assert (json.loads(said[5])["new"], json.loads(said[5])["updated"]) == ([], ["l2p"])
    assert config(tmp_path / "r", "l2p").parameters["bundle"].string_value == "/b"


def test_networks_become_plans_one_for_each_compute_capability(engines: Path, tmp_path: Path) -> None:
    written = write_repository(open_bundle(engines), tmp_path / "r", RepositorySpec(), Silent())
    assert {name for name in written.versions if name.startswith(NETWORK_PREFIX)} == {
        f"{NETWORK_PREFIX}{network}" for network in NETWORKS
    }
    assert not lint_repository(tmp_path / "r")
    found = config(tmp_path / "r", "l2p_network_trunk")
    assert (found.platform, found.max_batch_size) == ("tensorrt_plan", 0)
    assert dict(found.cc_model_filenames) == {"9.0": "model_sm90.plan", "12.0": "model_sm120.plan"}
    assert list(found.instance_group[0].profile) == ["0"]
    assert found.parameters["execution_context_allocation_strategy"].string_value == "STATIC"
    kinds = model_config_pb2.DataType
    inputs = {tensor.name: (kinds.Name(tensor.data_type), list(tensor.dims)) for tensor in found.input}
    width = open_bundle(engines).manifest.model.width
    assert inputs["tokens"] == ("TYPE_FP32", [-1, -1, width])
    mask = {tensor.name: tensor for tensor in config(tmp_path / "r", "l2p_network_caption").input}["caption_mask"]
    assert kinds.Name(mask.data_type) == "TYPE_BOOL"
    for capability in ("90", "120"):
        plan = tmp_path / "r" / "l2p_network_trunk" / "1" / f"model_sm{capability}.plan"
        assert plan.read_bytes() == (engines / "engines" / f"trunk.tensorrt11.0-sm{capability}.engine").read_bytes()


def _edit(model: str, old: str, new: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        path = root / model / "config.pbtxt"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return change


def _replace(path: Path) -> None:
    path.unlink()
    path.write_bytes(b"x")


BROKEN: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "unknown field": (_edit("l2p", "instance_group {", "instance_grp {"), "config.pbtxt", "line "),
    "unknown enum": (_edit("l2p", "TYPE_UINT8", "TYPE_BYTE"), "config.pbtxt", "TYPE_BYTE"),
    "no config": (lambda root: (root / "l2p/config.pbtxt").unlink(), "config.pbtxt", "is missing"),
    "another name": (_edit("l2p", 'name: "l2p"', 'name: "l2q"'), "name", "the folder is `l2p`"),
    "zero dim": (_edit("l2p", "dims: 3", "dims: 0"), "output image", "expected each 1 or more, or -1"),
    "negative batch": (_edit("l2p", "backend:", "max_batch_size: -1\nbackend:"), "max_batch_size", "is -1"),
    "no model.py": (lambda root: (root / "l2p/1/model.py").unlink(), "1/model.py", "wait for it for ever"),
    "no version": (lambda root: shutil.rmtree(root / "l2p/1"), "versions", "there is none"),
    "zero version": (
        lambda root: (root / "l2p/1").rename(root / "l2p/01"),
        "versions",
        "`01` because it begins with 0",
    ),
    "version policy": (
        _edit("l2p", "latest {\n    num_versions: 1", "specific {\n    versions: 7"),
        "version_policy",
        "serves none of the versions that are there (1)",
    ),
    "skipped warm-up": (_edit("l2p", "batch_size: 1", "batch_size: 0"), "model_warmup", "skips it without a word"),
    "warm-up file": (
        lambda root: (root / "l2p/warmup/height").unlink(),
        "model_warmup",
        "warmup/height, which is missing",
    ),
    "warm-up size": (
        lambda root: (root / "l2p/warmup/height").write_bytes(b"1"),
        "model_warmup",
        "of 1 byte, `height` takes 4",
    ),
    "warm-up from no size": (
        _edit(
            "l2p",
            '  inputs {\n    key: "height"',
            '  inputs { key: "coarse_width" value { data_type: TYPE_INT32 dims: 1 zero_data: true } }\n'
            '  inputs {\n    key: "height"',
        ),
        "model_warmup",
        "that the model refuses: height is 0 px",
    ),
    "instances": (_edit("l2p", "count: 1", "passive: true"), "instance_group[0]", "is passive"),
    "digest": (_edit("l2p", '"bundle_digest"', '"bundle_digets"'), "parameters", "does not say bundle_digest"),
    "limit": (_edit("l2p", '"4096"', '"many"'), "parameters", "max_pixels is 'many'"),
    "stated size": (
        _edit("l2p", '"size_multiple_px"', '"size_multiples_px"'),
        "parameters",
        "say that size_multiple_px is missing, the bundle says 16",
    ),
    "dtype": (
        _edit("l2p", 'name: "image"\n  data_type: TYPE_UINT8', 'name: "image"\n  data_type: TYPE_FP32'),
        "output image",
        "the bundle's is TYPE_UINT8",
    ),
    "embedding width": (
        _edit("l2p_embeddings", "dims: 40", "dims: 41"),
        "input prompt_embeds",
        "the bundle's is TYPE_FP32",
    ),
    "changed bundle": (
        lambda root: _replace(next((root / "l2p/1/bundle/graphs").glob("head*.onnx"))),
        "1/bundle",
        "1 byte,",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_lint_finds(case: str, repository: Path) -> None:
    change, place, needle = BROKEN[case]
    change(repository)
    found = lint_repository(repository)
    assert [f for f in found if place in f.place and needle in f.text], found


def test_lint_finds_in_networks(engines: Path, tmp_path: Path) -> None:
    root = tmp_path / "r"
    write_repository(open_bundle(engines), root, RepositorySpec(), Silent())
    (root / "l2p_network_trunk/1/model_sm90.plan").unlink()
    (root / "l2p_network_head/1/model_sm120.plan").write_bytes(b"another")
    _edit("l2p_network_stem", 'profile: "0"', 'profile: "1"')(root)
    _edit("l2p_network_caption", "TYPE_BOOL", "TYPE_INT64")(root)
    _edit("l2p_network_tail", "KIND_GPU", "KIND_CPU")(root)
    found = {(f.model.removeprefix(NETWORK_PREFIX), f.place): f.text for f in lint_repository(root)}
    assert "is missing" in found["trunk", "1/model_sm90.plan"]
    assert "its size differs" in found["head", "1/model_sm120.plan"]
    assert "names profile 1, the engines have 0 to 0" in found["stem", "instance_group"]
    assert "the bundle's is TYPE_BOOL" in found["caption", "input caption_mask"]
    assert "only on GPUs" in found["tail", "instance_group[0]"]
    assert len(found) == 5


def test_lint_at_the_command_line(repository: Path) -> None:
    (repository / "l2p/1/model.py").unlink()
    result = run_cli("triton", "lint", repository, "--json")
    assert result.returncode == 4
    assert json.loads(result.stdout)["findings"][0]["place"] == "1/model.py"
    assert "has 1 fault\n" in result.stderr
    assert run_cli("triton", "lint", repository / "absent").returncode == 2


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "networks without engines": (("--model", "networks"), "it has no TensorRT engines"),
    "unknown model": (("--model", "l2p_video"), "models are l2p, l2p_stream"),
    "instances": (("--instances", "0"), "instances is 0"),
    "queue": (("--queue-size", "0"), "queue size is 0"),
    "time-out": (("--queue-seconds", "0"), "queue time-out is 0"),
    "pixels": (("--max-pixels", "0"), "limit pixels is 0"),
    "backend": (("--backend", "abacus"), "no backend `abacus`"),
    "budget": (("--memory-budget", "12 parsecs"), "'12 parsecs' is no size"),
    "warm-up over the limit": (("--warm-up", "128x128", "--max-pixels", "256"), "the limit is 256 pixels"),
    "plan": (("--plan", "int4"), "no plan `int4`"),
    "warm-up": (("--warm-up", "large"), "'large', expected WIDTHxHEIGHT"),
    "warm-up that no request may have": (("--warm-up", "24x16"), "does not divide by 16 px"),
    "preview": (("--preview-px", "0"), "preview_px is 0"),
    "relative bundle": (("--bundle-at", "models/bundle"), "is `models/bundle`, expected an absolute path"),
    "bundle at home": (("--bundle-at", "~/bundle"), "is `~/bundle`, expected an absolute path"),
    "bundle nowhere": (("--bundle-at", ""), "is ``, expected an absolute path"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_are_refused_before_anything_is_written(case: str, bundles: Bundles, tmp_path: Path) -> None:
    options, needle = REFUSED[case]
    arguments = [str(bundles.path("tiny-16-fused")), "--out", str(tmp_path / "r"), *options]
    with pytest.raises(UsageError, match=re.escape(needle)):
        command.main(arguments, standalone_mode=False)
    assert not (tmp_path / "r").exists()


def test_a_strangers_model_is_left_alone(bundles: Bundles, tmp_path: Path) -> None:
    (tmp_path / "r" / "l2p").mkdir(parents=True)
    (tmp_path / "r" / "l2p" / "config.pbtxt").write_text('name: "l2p"\nbackend: "python"\n')
    result = run_cli("triton", bundles.path("tiny-16-fused"), "--out", tmp_path / "r")
    assert result.returncode == 2
    assert "did not write" in result.stderr
    assert [entry.name for entry in (tmp_path / "r").iterdir()] == ["l2p"]


def test_dry_run_writes_nothing(bundles: Bundles, tmp_path: Path) -> None:
    result = run_cli("triton", bundles.path("tiny-16-fused"), "--out", tmp_path / "r", "--dry-run")
    assert result.returncode == 0
    assert result.stdout.count("would write") == 3
    assert not (tmp_path / "r").exists()


def test_a_service_reads_what_it_wrote() -> None:
    spec = ServiceSpec("bundle", "0" * 64, "auto", "", "6GiB", "float16", 512, Limits(1024, 8, 100))
    assert ServiceSpec.from_parameters(spec.to_parameters()) == spec
    for name, value in (("max_steps", "0"), ("max_pixels", "1e9"), ("preview_px", "-1"), ("dtype", "float32")):
        with pytest.raises(UsageError, match=name):
            ServiceSpec.from_parameters(spec.to_parameters() | {name: value})
    with pytest.raises(UsageError, match="does not say plan"):
        ServiceSpec.from_parameters({k: v for k, v in spec.to_parameters().items() if k != "plan"})


def test_placement_takes_what_servers_take() -> None:
    assert Placement().kind == "auto"
    with pytest.raises(UsageError, match="instances is 65"):
        Placement(instances=65)
