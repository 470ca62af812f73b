"""The command line as a user meets it: data on stdout, talk on stderr, JSON, dry runs."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from conftest import link_traces, run_cli, seed_store

if TYPE_CHECKING:
    from conftest import Bundles

ROOT = Path(__file__).parents[2]


@pytest.fixture
def embeddings(tmp_path: Path) -> Path:
    path = tmp_path / "prompt.npy"
    np.save(path, np.random.default_rng(0).standard_normal((9, 40)).astype(np.float32))
    return path


def test_build_prints_the_bundle_and_nothing_else(bundles: Bundles) -> None:
    path = bundles.path("tiny-16")
    assert bundles.logs["tiny-16"].stdout == f"{bundles.shared('tiny-16')}\n"
    assert "fp16 graph of `trunk`: done in" in bundles.logs["tiny-16"].stderr
    assert sorted(entry.name for entry in path.iterdir()) == ["bundle.json", "graphs", "plans", "reference"]


def test_untrained_weights_say_so_wherever_they_show(bundles: Bundles, tmp_path: Path) -> None:
    path = bundles.path("demo-160")
    assert "untrained" in bundles.logs["demo-160"].stderr
    assert json.loads(run_cli("inspect", path, "--json").stdout)["checkpoint"]["trained"] is False
    dry = run_cli("build", "--profile", "10k", "--dry-run")
    assert "untrained" in dry.stdout
    np.save(tmp_path / "e.npy", np.zeros((3, 64), np.float32))
    drawn = run_cli(
        "generate",
        path,
        "--embeddings",
        tmp_path / "e.npy",
        "--size",
        "320x640",
        "--out",
        tmp_path / "x.png",
        "--steps",
        1,
    )
    assert "untrained" in drawn.stderr
    with Image.open(tmp_path / "x.png") as image:
        assert image.size == (320, 640)
        assert json.loads(image.text["parameters"])["trained"] is False


def test_generate_writes_a_picture_that_says_how_it_was_made(
    bundles: Bundles, embeddings: Path, tmp_path: Path
) -> None:
    bundle, out = bundles.path("tiny-16"), tmp_path / "x.png"
    arguments = ("--embeddings", embeddings, "--prompt", "ein Kreis, \u5706", "--size", "64x32", "--seed", 2**64 - 1)
    result = run_cli("generate", bundle, *arguments, "--out", out, "--json", "--quiet")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    facts = json.loads(result.stdout)
    with Image.open(out) as image:
        assert image.size == (64, 32)
        assert image.text["prompt"] == "ein Kreis, \u5706"
        assert image.text["seed"] == str(2**64 - 1)
        assert (
            image.text["bundle"] == facts["bundle"] == json.loads(run_cli("inspect", bundle, "--json").stdout)["digest"]
        )
        parameters = json.loads(image.text["parameters"])
    assert parameters["seed"] == 2**64 - 1
    assert parameters["steps"] == 2
    assert parameters["guidance"] == 1.0


def test_the_same_seed_draws_the_same_picture_and_another_another(
    bundles: Bundles, embeddings: Path, tmp_path: Path
) -> None:
    pictures = []
    for seed in (1, 1, 2):
        out = tmp_path / "x.png"
        run_cli(
            "generate",
            bundles.path("tiny-16"),
            "--embeddings",
            embeddings,
            "--size",
            "48x48",
            "--seed",
            seed,
            "--out",
            out,
        )
        pictures.append(out.read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


def test_16_bits_hold_what_8_bits_round(bundles: Bundles, embeddings: Path, tmp_path: Path) -> None:
    from l2p_runtime import Pipeline

    call = {"prompt_embeds": np.load(embeddings), "height": 32, "width": 32, "seed": 1}
    with Pipeline.open(bundles.path("tiny-16")) as pipe:
        eight, sixteen = (pipe.generate(**call, dtype=dtype) for dtype in ("uint8", "uint16"))
    assert np.abs(eight.astype(np.float64) * 257 - sixteen).max() <= 129
    out = tmp_path / "x.png"
    run_cli(
        "generate", bundles.path("tiny-16"), "--embeddings", embeddings, "--size", "32x32", "--bits", "16", "--out", out
    )
    assert out.read_bytes()[24] == 16


@pytest.fixture(scope="module")
def tall() -> dict[str, bytes]:
    """The picture without options, once it is drawn."""
    return {}


@pytest.mark.parametrize(
    "arguments", [("--positions", "yarn"), ("--plan", "fp16"), ("--rng", "torch-cpu"), ("--shift", "5")]
)
def test_options_reach_the_picture(
    bundles: Bundles, embeddings: Path, tmp_path: Path, arguments: tuple[str, str], tall: dict[str, bytes]
) -> None:
    """A picture of more token rows than the model was made for, where the positions' policy shows."""
    out = tmp_path / "x.png"
    base = (
        "generate",
        bundles.path("tiny-16"),
        "--embeddings",
        embeddings,
        "--size",
        "32x2048",
        "--seed",
        1,
        "--out",
        out,
    )
    if not tall:
        run_cli(*base)
        tall["png"] = out.read_bytes()
    plain = np.asarray(Image.open(io.BytesIO(tall["png"])))
    assert run_cli(*base, *arguments).returncode == 0
    with Image.open(out) as image:
        assert (np.asarray(image) != plain).any()
        assert str(arguments[1]) in image.text["parameters"]


def test_dry_runs_do_nothing(bundles: Bundles, embeddings: Path, tiny_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "never"
    result = run_cli("build", "--profile", "4k", "--precision", "fp16", "--out", out, "--dry-run", "--json")
    facts = json.loads(result.stdout)
    assert facts["variant"] == "4k"
    assert facts["weight_bytes"]["fp16"] > 0
    drawn = run_cli(
        "generate",
        bundles.path("tiny-16"),
        "--embeddings",
        embeddings,
        "--size",
        "32x32",
        "--out",
        tmp_path / "x.png",
        "--dry-run",
    )
    assert drawn.returncode == 0
    assert "would draw 32x32" in drawn.stdout
    assert not out.exists()
    assert not (tmp_path / "x.png").exists()
    assert not Path("demo-4k.bundle").exists()


def test_inspect_tells_a_checkpoint_from_its_header(tiny_path: Path) -> None:
    facts = json.loads(run_cli("inspect", tiny_path, "--json").stdout)
    assert (facts["family"], facts["variant"], facts["tensors"]) == ("z_image_l2p", "1k", 185)
    assert facts["model"]["width"] == 64
    assert facts["dtypes"]["layers"] == {"F32": 90}
    text = run_cli("inspect", tiny_path).stdout
    assert "variant: 1k" in text
    assert "9,159,147" in text


def test_inspect_recognises_the_published_header(tmp_path: Path) -> None:
    from l2p_export.families.z_image_l2p.dimensions import expected_shapes, published_dimensions
    from l2p_runtime.tensorfile import header_bytes

    shapes = expected_shapes(published_dimensions("4k"))
    header, places = header_bytes([(name, "BF16", shape) for name, shape in shapes.items()])
    path = tmp_path / "l2p_4k_sft.safetensors"
    with path.open("wb") as file:
        file.write(header)
        file.truncate(max(info.offset + info.size_bytes for info in places.values()))
    facts = json.loads(run_cli("inspect", path, "--json").stdout)
    assert facts["known_as"] == "L2P 4K"
    assert facts["parameters"] == 6_210_711_491


def test_inspect_describes_a_bundle(bundles: Bundles) -> None:
    facts = json.loads(run_cli("inspect", bundles.path("tiny-64"), "--json").stdout)
    assert facts["variant"] == "4k"
    assert facts["plans"] == ["fp32"]
    assert "image [B, 3, 64*h, 64*w] float32" in facts["networks"]["stem"]


def test_verify_runs_the_stored_cases_and_admits_what_it_did_not_run(bundles: Bundles) -> None:
    result = run_cli("verify", bundles.path("tiny-16"), "--json")
    assert result.returncode == 0, result.stderr
    ledger = json.loads(result.stdout)["ledger"]
    statuses = {(entry["case"], entry["status"]) for entry in ledger}
    assert {("padded", "passed"), ("full", "passed"), ("16x16", "passed"), ("128x16", "not run")} <= statuses
    assert {entry["network"] for entry in ledger} >= {"caption", "stem", "trunk", "tail", "head", "end-to-end"}
    assert all(entry["relative"] <= entry["threshold"] for entry in ledger if entry["status"] == "passed")


def test_the_build_ran_the_corners_it_could(bundles: Bundles) -> None:
    manifest = json.loads((bundles.path("tiny-16") / "bundle.json").read_text())
    ran = {entry["case"] for entry in manifest["ledger"] if entry["status"] == "passed"}
    assert ran >= {"padded", "full", "16x16", "128x16", "16x128", "128x128"}
    assert {case["name"] for case in manifest["references"]} == {"padded", "full", "16x16"}
    wide = json.loads((bundles.path("demo-160") / "bundle.json").read_text())["ledger"]
    assert {entry["status"] for entry in wide if entry["case"] == "2560x2560"} == {"not run"}


def test_a_case_that_is_stored_by_its_seed_runs_again(bundles: Bundles) -> None:
    bundle = bundles.path("demo-160")
    (path,) = (bundle / "reference").glob("full.*")
    assert "noise_seed" in load_file(path)
    result = run_cli("verify", bundle, "--json")
    assert result.returncode == 0, result.stderr
    ledger = json.loads(result.stdout)["ledger"]
    passed = {entry["network"] for entry in ledger if (entry["case"], entry["status"]) == ("full", "passed")}
    assert passed >= {"caption", "stem", "trunk", "tail", "head", "end-to-end"}


def test_bundles_are_reproducible(bundles: Bundles) -> None:
    plain, fused = (
        json.loads((bundles.path(kind) / "bundle.json").read_text()) for kind in ("tiny-16", "tiny-16-fused")
    )
    assert plain["checkpoint"]["trunk_sha256"] == fused["checkpoint"]["trunk_sha256"]
    graphs = [
        {g["network"]: (g["graph"], g["weights"]) for g in m["graphs"] if g["plan"] == "fp32"} for m in (plain, fused)
    ]
    assert graphs[0] == graphs[1]


def test_nothing_of_this_machine_is_in_a_bundle(bundles: Bundles) -> None:
    for file in bundles.path("tiny-64").rglob("*"):
        if file.suffix in (".onnx", ".json"):
            data = file.read_bytes()
            assert str(ROOT).encode() not in data
            assert b"site-packages" not in data
            assert str(bundles.root).encode() not in data


def test_a_moved_bundle_still_works(bundles: Bundles, embeddings: Path, tmp_path: Path) -> None:
    moved = tmp_path / "else where" / "b\u00fcndel"
    shutil.copytree(bundles.path("tiny-16-fused"), moved)
    out = tmp_path / "x.png"
    result = run_cli("generate", moved, "--embeddings", embeddings, "--size", "16x16", "--out", out)
    assert result.returncode == 0, result.stderr


def test_doctor_reports() -> None:
    result = run_cli("doctor", "--json")
    assert result.returncode == 0
    facts = json.loads(result.stdout)
    assert facts["can"]["draw"] is True
    assert facts["can"]["build"] is True
    assert "onnxruntime" in facts["libraries"]


@pytest.mark.parametrize(
    "arguments", [("frobnicate",), ("build",), ("generate", "."), ("build", "--profile", "4k", "--backend", "abacus")]
)
def test_wrong_usage_is_exit_code_2(arguments: tuple[str, ...]) -> None:
    result = run_cli(*arguments)
    assert result.returncode == 2
    assert "Usage:" in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_cancelling_stops_between_networks_and_leaves_the_pipeline_usable(bundles: Bundles, embeddings: Path) -> None:
    from l2p_runtime import CancelledError, Pipeline

    call = {"prompt_embeds": np.load(embeddings), "height": 32, "width": 32}
    asked = iter(range(100))
    steps: list[int] = []
    with Pipeline.open(bundles.path("tiny-16")) as pipe:
        with pytest.raises(CancelledError):
            pipe.generate(
                **call, steps=9, cancelled=lambda: next(asked) >= 7, progress=lambda done, total: steps.append(done)
            )
        assert steps == [1, 2]
        assert pipe.generate(**call, steps=1).shape == (32, 32, 3)


def test_every_command_in_the_readme_runs(bundles: Bundles, tmp_path: Path) -> None:
    """In order, in one folder, in the test process; the first through a shell, as a user types it.

    The builds find the traces of the 1k demo, which has all networks but the stem and the head in common with this one;
    those two are traced once, before the first command.
    """
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```(\w+)\n(.*?)```", readme, flags=re.DOTALL)
    lines = [line for language, block in blocks if language == "sh" for line in block.splitlines()]
    # The set-up commands are what runs this test, and what `make demo` in CI would repeat.
    commands = [line for line in lines if line not in ("make demo", "make demo-8k", "make test")]
    assert len(commands) >= 5
    bundles.path("demo-16")
    seed_store(bundles.demo_store, tmp_path / "shared")
    made = run_cli("build", "--profile", "4k", "--store", "shared", "--out", "before.bundle", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    link_traces(tmp_path / "shared", tmp_path / "demo-4k.bundle")
    shutil.rmtree(tmp_path / "before.bundle")
    shell = commands[0].replace("l2p-export", f"{shlex.quote(sys.executable)} -m l2p_export", 1)
    result = subprocess.run(["bash", "-c", shell], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for line in commands[1:]:
        program, *arguments = shlex.split(line)
        assert program == "l2p-export"
        done = run_cli(*arguments, cwd=tmp_path)
        assert done.returncode == 0, line + "\n" + done.stderr
    assert (tmp_path / "picture.png").is_file()
    (script,) = (block for language, block in blocks if language == "python")
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    (profile,) = (block for language, block in blocks if language == "toml")
    assert tomllib.loads(profile)["name"] == "poster"
    (tmp_path / "poster.toml").write_text(profile)
    assert run_cli("build", "--profile", "poster.toml", "--dry-run", cwd=tmp_path).returncode == 0


def test_make_demo_runs_what_the_readme_shows() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "l2p-export build --profile 4k" in makefile
    assert "l2p-export generate" in makefile
