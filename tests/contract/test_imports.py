"""What may be imported when, in fresh processes."""

from __future__ import annotations

import ast
import json
import pathlib
import pkgutil
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from typing import Any

import pytest

import l2p_calib
import l2p_engines
import l2p_export
import l2p_runtime

OURS = {"l2p_export", "l2p_calib", "l2p_engines"}
HEAVY = {"torch", "onnx", "onnxscript", "onnx_ir", "onnxruntime", "transformers", "diffusers", "safetensors", "scipy"}
HEAVY |= {"cuda", "ml_dtypes", "polygraphy", "tensorrt", "tensorrt_rtx", "tritonclient", "grpc", "google", "gevent"}

PACKAGES = (l2p_calib, l2p_engines, l2p_export, l2p_runtime)

FORKS = """
import json, os, sys
codes, before = json.load(sys.stdin), set(sys.modules)
out = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
for code in codes:
    pid = os.fork()
    if pid == 0:
        error = ""
        try:
            exec(code, {})
        except BaseException as caught:
            error = f"{code}: {type(caught).__name__}: {caught}"
        names = sorted({name.partition(".")[0] for name in set(sys.modules) - before})
        out.write(json.dumps({"loaded": names, "error": error}) + "\\n")
        out.flush()
        os._exit(0)
    os.waitpid(pid, 0)
"""

RUNTIME = sorted(module.name for module in pkgutil.walk_packages(l2p_runtime.__path__, "l2p_runtime."))


def test_the_runtime_root_imports_the_standard_library_alone() -> None:
    loaded = _loaded_by("import l2p_runtime")
    foreign = {name for name in loaded if name not in sys.stdlib_module_names and not name.startswith("_")}
    assert foreign == {"l2p_runtime"}


def test_the_pipeline_imports_numpy_and_nothing_else() -> None:
    loaded = _loaded_by("from l2p_runtime import Pipeline; import l2p_runtime.noise, l2p_runtime.images.png")
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


@pytest.mark.parametrize(
    "command", ["build", "doctor", "farm", "generate", "inspect", "plan", "triton", "verify", "worker"]
)
def test_help_of_a_command_imports_nothing_heavy(command: str) -> None:
    code = f"import l2p_export.cli.{command} as c; c.command.main(['--help'], standalone_mode=False)"
    assert not _loaded_by(code) & (HEAVY | {"numpy"})


def test_no_runtime_module_imports_the_other_packages_or_a_framework() -> None:
    for module, result in zip(RUNTIME, _forked([f"import {name}" for name in RUNTIME]), strict=True):
        assert not result["error"]
        assert not set(result["loaded"]) & (OURS | HEAVY | {"click"}), module


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [(l2p_calib, {"l2p_export", "l2p_engines", "torch"}), (l2p_engines, {"l2p_export", "l2p_calib", "torch"})],
)
def test_imports_go_one_way(package: object, forbidden: set[str]) -> None:
    path, name = package.__path__, package.__name__  # type: ignore[attr-defined]
    names = [module.name for module in pkgutil.walk_packages(path, f"{name}.")]
    for module, result in zip(names, _forked([f"import {name}" for name in names]), strict=True):
        assert not result["error"]
        assert not set(result["loaded"]) & forbidden, module


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


@pytest.mark.parametrize("module", ["client.health", "client.page", "worker"])
def test_what_other_programs_import_needs_the_standard_library_alone(module: str) -> None:
    loaded = _loaded_by(f"import l2p_runtime.{module}")
    foreign = {name for name in loaded if name not in sys.stdlib_module_names and not name.startswith("_")}
    assert foreign == {"l2p_runtime"}


def test_no_folder_beside_a_package_can_be_taken_for_a_library() -> None:
    # Any folder on the path is a namespace package: torch took `runtime/triton` for the compiler, and broke.
    # `tests/contract/test_imports.py` lies in the repository, whose folders these are.
    roots = [pathlib.Path(__file__).parents[2] / name for name in ("runtime", "export", "calib", "engines")]
    names = {entry.name for root in roots for entry in root.iterdir() if entry.is_dir()}
    assert names - {"__pycache__"} <= {"l2p_runtime", *OURS, "csrc"}


def test_every_package_is_typed() -> None:
    for package in PACKAGES:
        assert any((pathlib.Path(p) / "py.typed").is_file() for p in package.__path__)


IMPORT_NAMES = {
    "cuda-bindings": "cuda.bindings.driver",
    "nvidia-cuda-nvrtc": "cuda.bindings.nvrtc",
    "onnxruntime-gpu": "onnxruntime",
    "scikit-image": "skimage",
    "tensorrt-rtx-cu13": "tensorrt_rtx",
}
"""Distribution to the name that it is imported by, or that needs it, where that is another."""


def test_every_extra_is_imported_by_something() -> None:
    root = pathlib.Path(__file__).parents[2]
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    sources = [path.read_text() for package in PACKAGES for place in package.__path__ for path in _files(place)]
    for extra in extras.keys() - {"dev"}:
        for requirement in extras[extra]:
            name = re.split(r"[\[<>=~! ]", requirement)[0]
            module = re.escape(IMPORT_NAMES.get(name, name.replace("-", "_")))
            used = re.compile(
                rf"""^\s*(?:import|from) {module}\b|(?:import_module|engine_backend)\([^)]*"{module}["]""", re.MULTILINE
            )
            assert any(used.search(text) for text in sources), f"nothing imports {name} of [{extra}]"


def _files(place: str) -> Iterator[pathlib.Path]:
    return pathlib.Path(place).rglob("*.py")


def test_imports_make_no_circle() -> None:
    # A circle breaks the command that enters it at the wrong module: `verify` did so where `build` did not.
    graph = _imports()
    assert len(graph) > 200
    TopologicalSorter(graph).prepare()


def _imports() -> dict[str, set[str]]:
    """Each module of ours to those of ours that it imports when it is imported itself."""
    roots = [pathlib.Path(str(package.__file__)).parent for package in PACKAGES]
    files = {
        ".".join(file.relative_to(root.parent).with_suffix("").parts).removesuffix(".__init__"): file
        for root in roots
        for file in root.rglob("*.py")
    }
    graph: dict[str, set[str]] = {}
    for name, file in files.items():
        graph[name] = set()
        for imported in _imported(ast.parse(file.read_text(encoding="utf-8")).body):
            # Packages are imported before what is in them; a module's own are under way already.
            parts = imported.split(".")
            above = {".".join(parts[:length]) for length in range(1, len(parts) + 1)} & files.keys()
            graph[name] |= {module for module in above if not f"{name}.".startswith(f"{module}.")}
    return graph


def _imported(body: list[ast.stmt]) -> Iterator[str]:
    """Full names in the import statements that run with the module: not in functions, not for type checkers."""
    for node in body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from _imported(node.orelse)
        elif isinstance(node, (ast.If, ast.Try, ast.With, ast.ClassDef)):
            yield from _imported([*node.body, *getattr(node, "orelse", []), *getattr(node, "handlers", [])])
        elif isinstance(node, ast.ExceptHandler):
            yield from _imported(node.body)


def _loaded_by(code: str) -> set[str]:
    """Top-level packages that a fresh interpreter has loaded after `code`, beyond what it starts with."""
    (result,) = _forked([code])
    assert not result["error"], result["error"]
    return set(result["loaded"])


def _forked(codes: list[str]) -> list[dict[str, Any]]:
    """What each code has loaded, or its error, in a fork of one fresh interpreter."""
    command = [sys.executable, "-c", FORKS]
    result = subprocess.run(command, input=json.dumps(codes), check=True, capture_output=True, text=True)
    return [json.loads(line) for line in result.stdout.splitlines()]
