"""Every file goes through `l2p_runtime/files.py`: nothing else in the packages creates, moves or syncs one unseen."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = (
    "export/l2p_export",
    "calib/l2p_calib",
    "engines/l2p_engines",
    "runtime/l2p_runtime",
)
HELPER = "runtime/l2p_runtime/files.py"

CALLS = {
    "io.open", "os.fdatasync", "os.fdopen", "os.fsync", "os.link", "os.open", "os.rename", "os.renames", "os.replace",
    "os.symlink", "os.sync", "os.write", "shutil.copy", "shutil.copy2", "shutil.copyfile", "shutil.copyfileobj",
    "shutil.copytree", "shutil.move", "tempfile.NamedTemporaryFile", "tempfile.TemporaryFile", "tempfile.mkdtemp",
    "tempfile.mkstemp", "tempfile.mktemp",
}  # fmt: skip
METHODS = {
    "hardlink_to", "print_png", "rename", "save", "save_pretrained", "savefig", "symlink_to", "tofile", "touch",
    "write_bytes", "write_text",
}  # fmt: skip
FUNCTIONS = {"NamedTemporaryFile", "mkstemp", "save_file"}

A_STAGE = "in the work folder of a stage, which syncs its files before it is recorded"
A_FOLDER = "in an atomic folder, which is synced with all that is in it"
A_CLAIM = "a lock of a file system without locks; it ends with its process"
A_LOG = "a log grows by appending"
A_HELPER = "into a file that the helper opened"
NO_FILE = "not a file on a disk"

ALLOWED = {
    ("engines/l2p_engines/builders/compiling.py", "open"): "the file of a worker, which its parent commits",
    ("engines/l2p_engines/builders/compiling.py", "os.fsync"): "a full disk is the worker's to explain",
    ("engines/l2p_engines/builders/worker.py", "os.write"): NO_FILE,
    ("engines/l2p_engines/store/claims.py", "os.fdopen"): A_CLAIM,
    ("engines/l2p_engines/store/claims.py", "os.open"): A_CLAIM,
    ("engines/l2p_engines/store/locks.py", "os.open"): "a lock holds nothing",
    ("engines/l2p_engines/store/stages.py", "replace"): A_STAGE,
    ("export/l2p_export/build/text.py", "write_bytes"): A_STAGE,
    ("export/l2p_export/cli/streams.py", "os.open"): NO_FILE,
    ("export/l2p_export/performance/bench.py", "write_text"): NO_FILE,
    ("export/l2p_export/precision/plans.py", "write_bytes"): A_STAGE,
    ("export/l2p_export/precision/sweep_plot.py", "print_png"): A_HELPER,
    ("export/l2p_export/serving/repository.py", "os.link"): A_FOLDER,
    ("export/l2p_export/serving/repository.py", "shutil.copy2"): A_FOLDER,
    ("export/l2p_export/serving/repository.py", "shutil.copyfile"): A_FOLDER,
    ("export/l2p_export/serving/repository.py", "shutil.copytree"): A_FOLDER,
    ("export/l2p_export/training/corpus/corpus.py", "open"): A_LOG,
    ("export/l2p_export/training/corpus/corpus.py", "save"): NO_FILE,
    ("export/l2p_export/training/loop/loop.py", "open"): A_LOG,
    ("export/l2p_export/training/loop/states.py", "open"): A_FOLDER,
    ("export/l2p_export/training/loop/states.py", "write_text"): A_FOLDER,
    ("export/l2p_export/training/sheet.py", "open"): A_LOG,
    ("export/l2p_export/training/sheet.py", "print_png"): A_HELPER,
    ("export/l2p_export/training/sheet.py", "save"): A_HELPER,
    ("export/l2p_export/training/source/folder.py", "save_pretrained"): "in a temporary folder; each file is committed",
    ("runtime/l2p_runtime/client/regions.py", "os.open"): NO_FILE,
    ("runtime/l2p_runtime/worker/sockets.py", "os.open"): "a folder, to lock it",
}
"""Module and call to the reason why it need not go through the helper."""


def writes(tree: ast.AST) -> Iterator[str]:
    """Calls that create, move or sync a file, by name."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        spelled = ast.unparse(node.func)
        if spelled in CALLS | FUNCTIONS or (spelled == "open" and _is_for_writing(node, 1)):
            yield spelled
        elif isinstance(node.func, ast.Attribute):
            name = node.func.attr
            # Strings are replaced with two arguments, fields with keywords, and paths with one argument.
            moves = name == "replace" and len(node.args) == 1 and not node.keywords
            if name in METHODS or moves or (name == "open" and _is_for_writing(node, 0)):
                yield name


def _is_for_writing(call: ast.Call, place: int) -> bool:
    """Whether `open` has a mode for writing, at this place or by name. Other things are opened with other arguments."""
    modes = [*call.args[place : place + 1], *(word.value for word in call.keywords if word.arg == "mode")]
    texts = [mode.value for mode in modes if isinstance(mode, ast.Constant) and isinstance(mode.value, str)]
    return any(set(mode) & set("wax+") and set(mode) <= set("wax+rbt") for mode in texts)


def test_no_module_writes_a_file_past_the_helper() -> None:
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    found = {
        (name, call)
        for path in paths
        if (name := path.relative_to(ROOT).as_posix()) != HELPER
        for call in writes(ast.parse(path.read_bytes()))
    }
    assert len(paths) > 100
    assert found - ALLOWED.keys() == set(), "write it with `l2p_runtime.files`, or say in ALLOWED why not"
    assert ALLOWED.keys() - found == set(), "these are gone: take them out of ALLOWED"


@pytest.mark.parametrize(
    ("code", "call"),
    [
        ("partial.replace(path)", "replace"),
        ("Path(a).rename(b)", "rename"),
        ("os.replace(a, b)", "os.replace"),
        ("path.open('wb')", "open"),
        ("path.open(mode='a')", "open"),
        ("open(path, 'r+')", "open"),
        ("path.write_text(text)", "write_text"),
        ("tempfile.mkstemp()", "tempfile.mkstemp"),
        ("save_file(tensors, path)", "save_file"),
    ],
)
def test_such_a_call_is_seen(code: str, call: str) -> None:
    assert list(writes(ast.parse(code))) == [call]


@pytest.mark.parametrize(
    "code",
    [
        "text.replace(a, b)",
        "replace(spec, name=a)",
        "path.open('rb')",
        "path.open()",
        "Image.open(file)",
        "write_text(p, t)",
    ],
)
def test_reading_and_strings_are_no_such_calls(code: str) -> None:
    assert list(writes(ast.parse(code))) == []
