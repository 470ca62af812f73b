"""The wheel as a stranger gets it: built from the tree, installed alone, tried.

Environments have no pip of their own, which takes as long to install as all that they hold: that of the tests fills
them. What is installed is compiled when it is imported, as little of it is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Bundles

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _build_wheel(tmp_path_factory.mktemp("wheel"), {"L2P_REQUIRE_NATIVE": "1"})


@pytest.fixture(scope="module")
def lean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment that holds the base install alone."""
    return _environment(tmp_path_factory.mktemp("lean"), str(wheel))


def test_the_wheel_holds_four_packages_and_the_native_library(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    roots = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    assert roots == {"l2p_export", "l2p_runtime", "l2p_calib", "l2p_engines"}
    assert "l2p_runtime/lib/libl2p_native.so" in names
    assert {"l2p_runtime/data/normal_table.f64", "l2p_runtime/data/kernels.cu"} <= set(names)
    assert {
        f"l2p_runtime/client/page/{name}" for name in ("page.html", "page.css", "page.js", "beyond.js", "icon.svg")
    } <= set(names)
    assert {f"l2p_engines/profiles/{name}.toml" for name in ("1k", "4k", "8k", "8k-zeroshot", "10k")} <= set(names)
    assert {
        f"l2p_export/data/triton_models/{name}" for name in ("glue.py", "l2p/model.py", "l2p_stream/model.py")
    } <= set(names)
    demo = {f"l2p_export/data/demo/{name}" for name in ("README.md", "demo-1k.safetensors", "demo-4k.safetensors")}
    assert demo | {"l2p_export/data/demo/source/model_index.json"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if "csrc" in name or "test" in name.lower()]
    assert "-py3-none-" in wheel.name


def test_a_pure_wheel_is_made_on_request_and_holds_no_library(tmp_path: Path) -> None:
    names = zipfile.ZipFile(_build_wheel(tmp_path, {"L2P_PURE": "1"})).namelist()
    assert not [name for name in names if name.endswith(".so")]
    assert "l2p_export/data/triton_models/glue.py" in names


def test_without_a_compiler_the_install_falls_back_and_says_so(tmp_path: Path) -> None:
    environment = {"CXX": str(tmp_path / "no-such-compiler"), "L2P_REQUIRE_NATIVE": ""}
    result = _run_build(tmp_path, environment, verbose=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "built without the native kernels" in result.stdout + result.stderr
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert not [name for name in names if name.endswith(".so")]


def test_with_native_required_a_missing_compiler_fails(tmp_path: Path) -> None:
    result = _run_build(tmp_path, {"CXX": str(tmp_path / "no-such-compiler"), "L2P_REQUIRE_NATIVE": "1"})
    assert result.returncode != 0


def test_the_base_install_is_numpy_and_click(lean: Path) -> None:
    command = [*_pip(lean), "list", "--format=json"]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    names = {entry["name"] for entry in json.loads(result.stdout)}
    assert names == {"click", "l2p-export", "numpy"}


def test_the_base_install_uses_its_native_library(lean: Path) -> None:
    code = "from l2p_runtime.native import native_status; s = native_status(); assert s.available, s.reason"
    subprocess.run([lean, "-c", code], check=True)


def test_help_works_with_nothing_else_installed(lean: Path) -> None:
    for command in ([], ["build"], ["generate"], ["verify"], ["inspect"], ["doctor"], ["farm"], ["worker", "start"]):
        result = subprocess.run(
            [lean, "-m", "l2p_export", *command, "--help"], capture_output=True, text=True, check=True
        )
        assert "Usage:" in result.stdout


def test_what_the_base_install_lacks_is_named(lean: Path, tmp_path: Path) -> None:
    doctor = subprocess.run([lean, "-m", "l2p_export", "doctor"], capture_output=True, text=True, check=False)
    assert doctor.returncode == 3
    assert "pip install 'l2p-export[cpu]'" in doctor.stderr
    command = [lean, "-m", "l2p_export", "build", "--profile", "1k", "--out", tmp_path / "out"]
    build = subprocess.run(command, capture_output=True, text=True, check=False)
    assert build.returncode == 3
    assert "`torch`" in build.stderr
    assert "[export,cpu]" in build.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        (("train", "source", "--out", "x", "--dry-run"), "export"),
        (("train", "corpus", "--count", "1", "--out", "x"), "train"),
        (("train", "transfer", "x", "--corpus", "x", "--out", "x.safetensors"), "export"),
        (("eval", "x", "--out", "y"), "train"),
        (("judge", "x.png", "--prompt", "a red circle"), "train"),
    ],
)
def test_what_any_other_command_lacks_is_named_too(
    command: tuple[str, ...], extra: str, lean: Path, tmp_path: Path
) -> None:
    (tmp_path / "x.png").write_bytes(b"")
    (tmp_path / "x").mkdir()
    result = subprocess.run(
        [lean, "-m", "l2p_export", *command], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert result.returncode == 3, result.stderr
    assert f"pip install 'l2p-export[{extra}" in result.stderr


def test_a_render_machine_draws_and_verifies_without_torch(
    wheel: Path, bundles: Bundles, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("render")
    python = _environment(folder, f"{wheel}[cpu,text]")
    bundle, out = bundles.path("tiny-16-fused"), folder / "x.png"
    assert subprocess.run([python, "-c", "import torch"], capture_output=True, check=False).returncode != 0
    for command in (
        ["doctor"],
        ["verify", bundle],
        ["generate", bundle, "--prompt", "a red circle", "--size", "64x32", "--out", out],
    ):
        result = subprocess.run([python, "-m", "l2p_export", *command], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
    assert out.read_bytes()[:4] == b"\x89PNG"


def _environment(folder: Path, wanted: str) -> Path:
    """Python of a new environment that holds a wheel and what it asks for."""
    venv.create(folder)
    python = folder / "bin" / "python"
    command = [*_pip(python), "install", "-q", "--no-compile", "-c", ROOT / "constraints.txt", wanted]
    subprocess.run(command, check=True)
    return python


def _pip(python: Path) -> tuple[str | Path, ...]:
    return (sys.executable, "-m", "pip", "--python", python)


def _build_wheel(folder: Path, environment: dict[str, str]) -> Path:
    result = _run_build(folder, environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return next(folder.glob("*.whl"))


def _run_build(folder: Path, environment: dict[str, str], *, verbose: bool = False) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, ROOT]
    return subprocess.run(
        [*map(str, command), *(["-v"] if verbose else [])],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
