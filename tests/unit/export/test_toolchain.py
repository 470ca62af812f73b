"""What makes a stage stale: the code of some rooms, and the versions of some tools."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from l2p_export import toolchain as module
from l2p_export.toolchain import ROOMS, TOOLS, code_files, toolchain

DECIDES_NOTHING = (
    "l2p_calib.sensitivity",  # ranks what a sweep measured; a sweep is no stage
    "l2p_engines",  # keeps stages and sizes machines; engine stages take in a digest of the builders' code
    "l2p_export.toolchain",
    "l2p_export.world",  # judges pictures of a sweep
    "l2p_runtime",  # the package's own name: version and errors
    "l2p_runtime.backends",  # a proof takes in the identity of the backend that ran it
    "l2p_runtime.bundle",
    "l2p_runtime.errors",
    "l2p_runtime.files",
    "l2p_runtime.memory",
    "l2p_runtime.native",  # the same bits as `noise.py`, tested there
    "l2p_runtime.networks",
    "l2p_runtime.progress",
    "l2p_runtime.stripes",
)
"""What the rooms import from outside: modules, and packages with all that is in them, whose code decides no stage."""


def test_imports_of_the_rooms_stay_inside_them() -> None:
    files = dict(code_files())
    inside = {name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in files}
    outside = {
        (name, imported)
        for name, path in files.items()
        for imported in imports(path)
        if imported.startswith("l2p_") and imported not in inside and not is_apart(imported)
    }
    assert not outside


@pytest.mark.parametrize("name", ["l2p_runtime/positions.py", "l2p_runtime/noise.py", "l2p_export/graphs/trace.py"])
def test_what_makes_the_inputs_and_graphs_of_a_proof_counts(name: str) -> None:
    assert dict(code_files())[name].is_file()


def test_what_only_reads_a_bundle_does_not_count() -> None:
    apart = ("l2p_export/serving", "l2p_export/cli", "l2p_export/training", "l2p_export/evaluation", "l2p_engines")
    assert not [name for name, _ in code_files() if name.startswith(apart)]


def test_every_room_exists() -> None:
    names = [name for name, _ in code_files()]
    for package, rooms in ROOMS.items():
        for room in rooms:
            assert any(name.startswith(f"{package}/{room}") for name in names), room


def test_other_code_makes_other_digests(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = toolchain()
    assert before.keys() == {"l2p-export", *TOOLS}
    copy = tmp_path / "trace.py"
    original = dict(code_files())
    copy.write_bytes(original["l2p_export/graphs/trace.py"].read_bytes() + b"# another comment\n")
    monkeypatch.setattr(module, "code_files", lambda: iter((original | {"l2p_export/graphs/trace.py": copy}).items()))
    module._code_digest.cache_clear()
    after = toolchain()
    module._code_digest.cache_clear()
    assert after["l2p-export"] != before["l2p-export"]
    assert {name: after[name] for name in TOOLS} == {name: before[name] for name in TOOLS}


def imports(path: Path) -> set[str]:
    """Modules that a file imports, or takes types from: `from package import module` names the module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules = {f"{node.module}.{alias.name}" for alias in node.names}
            known = {name.removesuffix(".py").replace("/", ".") for name, _ in code_files()}
            found |= (modules & known) or {node.module}
    return found


def is_apart(name: str) -> bool:
    return name in DECIDES_NOTHING or name.startswith(
        tuple(f"{part}." for part in DECIDES_NOTHING if part != "l2p_runtime")
    )
