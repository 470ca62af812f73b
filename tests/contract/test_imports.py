"""What may be imported when, in fresh processes."""

from __future__ import annotations

import json
import pathlib
import pkgutil
import subprocess
import sys

import pytest

import l2p_calib
import l2p_engines
import l2p_export
import l2p_runtime

OURS = {"l2p_export", "l2p_calib", "l2p_engines"}
HEAVY = {"torch", "onnx", "onnxscript", "onnx_ir", "onnxruntime", "transformers", "diffusers", "safetensors", "scipy"}
HEAVY |= {"cuda", "ml_dtypes", "polygraphy", "tensorrt", "tensorrt_rtx", "tritonclient", "grpc", "google", "gevent"}


def test_the_runtime_root_imports_the_standard_library_alone() -> None:
    loaded = _loaded_by("import l2p_runtime")
    foreign = {name for name in loaded if name not in sys.stdlib_module_names and not name.startswith("_")}
    assert foreign == {"l2p_runtime"}


def test_the_pipeline_imports_numpy_and_nothing_else() -> None:
    loaded = _loaded_by("from l2p_runtime import Pipeline; import l2p_runtime.noise, l2p_runtime.png")
    foreign = {name for name in loaded if name not in sys.stdlib_module_names and not name.startswith("_")}
    # NumPy 2.4 itself brings no other package.
    assert foreign <= {"l2p_runtime", "numpy"}


def test_listing_backends_loads_none_of_their_libraries() -> None:
    loaded = _loaded_by("from l2p_runtime.backends import backend_names; assert len(backend_names()) == 4")
    foreign = {name for name in loaded if name not in sys.stdlib_module_names and not name.startswith("_")}
    assert foreign <= {"l2p_runtime", "numpy"}


def test_help_imports_nothing_heavy() -> None:
    loaded = _loaded_by("import l2p_export.cli.main")
    foreign = {name for name in loaded if name not in sys.stdlib_module_names and not name.startswith("_")}
    assert foreign == {"l2p_export", "l2p_runtime", "click"}


@pytest.mark.parametrize("command", ["build", "doctor", "generate", "inspect", "plan", "triton", "verify"])
def test_help_of_a_command_imports_nothing_heavy(command: str) -> None:
    code = f"import l2p_export.cli.{command} as c; c.command.main(['--help'], standalone_mode=False)"
    assert not _loaded_by(code) & (HEAVY | {"numpy"})


@pytest.mark.parametrize("module", sorted(m.name for m in pkgutil.walk_packages(l2p_runtime.__path__, "l2p_runtime.")))
def test_no_runtime_module_imports_the_other_packages_or_a_framework(module: str) -> None:
    loaded = _loaded_by(f"import {module}")
    assert not loaded & (OURS | HEAVY | {"click"})


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [(l2p_calib, {"l2p_export", "l2p_engines", "torch"}), (l2p_engines, {"l2p_export", "l2p_calib", "torch"})],
)
def test_imports_go_one_way(package: object, forbidden: set[str]) -> None:
    path, name = package.__path__, package.__name__  # type: ignore[attr-defined]
    for module in pkgutil.walk_packages(path, f"{name}."):
        assert not _loaded_by(f"import {module.name}") & forbidden


def test_importing_touches_no_file_and_no_environment() -> None:
    code = (
        "import sys, builtins, os\n"
        "seen = []\n"
        "sys.addaudithook(lambda event, args: seen.append((event, str(args[0]))) if event in "
        "('socket.connect', 'os.mkdir', 'subprocess.Popen') else None)\n"
        "before = dict(os.environ)\n"
        "import l2p_runtime, l2p_export, l2p_calib, l2p_engines\n"
        "from l2p_runtime import Pipeline\n"
        "assert not seen and before == dict(os.environ), seen\n"
        "import threading; assert threading.active_count() == 1\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("module", ["health", "page"])
def test_asking_for_health_or_showing_the_page_needs_the_standard_library_alone(module: str) -> None:
    loaded = _loaded_by(f"import l2p_runtime.client.{module}")
    foreign = {name for name in loaded if name not in sys.stdlib_module_names and not name.startswith("_")}
    assert foreign == {"l2p_runtime"}


def test_no_folder_beside_a_package_can_be_taken_for_a_library() -> None:
    # Any folder on the path is a namespace package: torch took `runtime/triton` for the compiler, and broke.
    # `tests/contract/test_imports.py` lies in the repository, whose folders these are.
    roots = [pathlib.Path(__file__).parents[2] / name for name in ("runtime", "export", "calib", "engines")]
    names = {entry.name for root in roots for entry in root.iterdir() if entry.is_dir()}
    assert names - {"__pycache__"} <= {"l2p_runtime", *OURS, "csrc", "triton_models"}


def test_every_package_is_typed() -> None:
    for package in (l2p_runtime, l2p_export, l2p_calib, l2p_engines):
        assert any((pathlib.Path(p) / "py.typed").is_file() for p in package.__path__)


def _loaded_by(code: str) -> set[str]:
    """Top-level packages that a fresh interpreter has loaded after `code`, beyond what it starts with."""
    script = (
        "import sys, json\n"
        "before = set(sys.modules)\n"
        f"{code}\n"
        "names = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print('\\n' + json.dumps(sorted(names)))"
    )
    result = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return set(json.loads(result.stdout.splitlines()[-1]))
