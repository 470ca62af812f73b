"""ONNX Runtime is loaded in one place, without its telemetry: no command leaves anything in the home of its user."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from conftest import Bundles
from l2p_runtime import onnx_library

ROOT = Path(__file__).parents[2]
HELPER = Path(onnx_library.__file__).relative_to(ROOT)
PEERS = Path("benchmarks/peers/modelopt_peer.py")
"""A script for another tool's environment, which loads ONNX Runtime itself; the Makefile sets the switch for it."""

# Each call runs in a fork with a home of its own; one process imports torch for all of them.
FORKS = """
import json, os, sys, tempfile
import numpy, onnx, torch
from pathlib import Path
from l2p_export.cli.main import run

assert "onnxruntime" not in sys.modules and "ORT_DISABLE_TELEMETRY" not in os.environ
results = {}
for name, call in json.load(sys.stdin).items():
    home = Path(tempfile.mkdtemp(dir=sys.argv[1]))
    pid = os.fork()
    if pid == 0:
        # Where CI is set, the library reports nothing by itself.
        os.environ.pop("CI", None)
        os.environ.update({"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")} | call["environment"])
        code = 1
        try:
            sys.argv = ["l2p-export", *call["arguments"]]
            run() if call["arguments"] else exec(call["code"], {})
            code = 0
        except SystemExit as end:
            code = end.code
        finally:
            loaded = "onnxruntime" in sys.modules
            (home.parent / f"{home.name}.json").write_text(json.dumps([code, loaded]))
            sys.stdout.flush()
            os._exit(0)
    os.waitpid(pid, 0)
    code, loaded = json.loads((home.parent / f"{home.name}.json").read_text())
    left = sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.is_file())
    results[name] = {"code": code, "loaded": loaded, "left": left}
Path(sys.argv[2]).write_text(json.dumps(results))
"""


def test_no_call_leaves_anything_in_the_home(bundles: Bundles, tmp_path: Path) -> None:
    demo, tiny = str(bundles.path("demo-16")), str(bundles.path("tiny-16"))
    calls = {
        "generate": _command("generate", demo, "--prompt", "a", "--size", "64x64", "--steps", "1", "--out", "a.png"),
        "frames": _command(
            *("generate", demo, "--prompt", "a", "--size", "64x64", "--steps", "1"),
            *("--frames", "1-2", "--out", "a.##.png"),
        ),
        "verify": _command("verify", tiny),
        "bench": _command("bench", tiny, "--size", "32x32", "--runs", "1"),
        "calibrate": _command("calibrate", tiny, "--samples", "1", "--size", "32x32", "--out", "statistics.json"),
        "doctor": _command("doctor"),
        "build": _command(
            *("build", str(bundles.checkpoint("tiny-16")), "--profile", str(bundles.root / "tiny-16.toml")),
            *("--store", str(bundles.store), "--out", "built"),
        ),
        "pipeline": _code(f"from l2p_runtime import Pipeline; Pipeline.open({tiny!r}).close()"),
        "statistics": _code(
            "from l2p_calib.statistics import onnx_values\nfrom l2p_runtime.bundle import open_bundle\n"
            f"bundle = open_bundle(__import__('pathlib').Path({tiny!r}))\n"
            "graph = bundle.path(bundle.manifest.graph('head', 'fp32').graph)\n"
            "onnx_values._open(graph, [], with_own=True)"
        ),
        "service": _code(
            "from pathlib import Path\nfrom l2p_runtime.bundle import open_bundle\n"
            "from l2p_runtime.serving import Limits, Service, ServiceSpec\n"
            f"digest = open_bundle(Path({tiny!r})).digest\n"
            f"spec = ServiceSpec({tiny!r}, digest, 'auto', '', '', 'uint8', 64, Limits(4096, 2, 100))\n"
            f"Service.open(spec, Path({tiny!r}), 0).close()"
        ),
    }
    for name, result in _run(calls, tmp_path).items():
        assert result == {"code": 0, "loaded": True, "left": []}, name


def test_a_setting_of_the_user_stays(bundles: Bundles, tmp_path: Path) -> None:
    code = (
        "from l2p_runtime import Pipeline; import os\n"
        f"Pipeline.open({str(bundles.path('tiny-16'))!r}).close()\n"
        "assert os.environ['ORT_DISABLE_TELEMETRY'] == '0'"
    )
    (result,) = _run({"own": _code(code, ORT_DISABLE_TELEMETRY="0")}, tmp_path).values()
    assert result["code"] == 0
    # What the test above finds nothing of.
    assert any(name.endswith(".onnxruntime/deviceid") for name in result["left"])


def test_one_module_imports_onnx_runtime() -> None:
    found = {path for path in _sources() if "onnxruntime" in set(_imported(ROOT / path))}
    assert found == {HELPER, PEERS}


def _sources() -> Iterator[Path]:
    for folder in ("runtime", "calib", "engines", "export", "benchmarks"):
        yield from (path.relative_to(ROOT) for path in (ROOT / folder).rglob("*.py"))


def _imported(path: Path) -> Iterator[str]:
    """Top-level packages of every import statement in a file, in functions too, and of `import_module` of a name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (str(arg.value).partition(".")[0] for arg in node.args if isinstance(arg, ast.Constant))


def _command(*arguments: str) -> dict[str, Any]:
    return {"arguments": arguments, "environment": {}}


def _code(code: str, **environment: str) -> dict[str, Any]:
    return {"arguments": (), "code": code, "environment": environment}


def _run(calls: Mapping[str, Mapping[str, Any]], folder: Path) -> dict[str, dict[str, Any]]:
    """Exit code of each call, whether it loaded ONNX Runtime, and the files that it left in its home."""
    homes, results = folder / "homes", folder / "results.json"
    homes.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != onnx_library.TELEMETRY_SWITCH}
    subprocess.run(
        [sys.executable, "-c", FORKS, str(homes), str(results)],
        input=json.dumps(calls),
        text=True,
        cwd=folder,
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    found: dict[str, dict[str, Any]] = json.loads(results.read_text(encoding="utf-8"))
    return found
