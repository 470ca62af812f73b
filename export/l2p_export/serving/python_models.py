"""Reads the code of a Python model without running it, for what a server finds only while it loads the model."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MODEL_FILE = "model.py"
MODEL_CLASS = "TritonPythonModel"
_SOURCE_BYTES_MAX = 4 << 20


@dataclass(frozen=True, slots=True)
class CodeFault:
    """What is wrong in a file of a version folder."""

    file: str
    text: str


def code_faults(version: Path, model_folder: Path, file: str = MODEL_FILE) -> Iterator[CodeFault]:
    """Why a server could not start a Python model.

    The code is parsed, never executed, so a class that is made by calls (`globals()[...] = ...`) is not seen.

    Args:
        version: folder of the version, which has the file.
        model_folder: folder of the model, whose modules can be imported too.
        file: name of the file that the server runs.
    """
    try:
        tree = _parsed(version / file)
    except _Unreadable as error:
        yield CodeFault(file, str(error))
        return
    if not _binds(tree, MODEL_CLASS):
        yield CodeFault(file, f"defines no class `{MODEL_CLASS}`")
    elif any(_lacks_execute(node) for node in tree.body):
        yield CodeFault(file, f"`{MODEL_CLASS}` has no method `execute`")
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from _import_faults(node, [version, model_folder])


def _import_faults(node: ast.ImportFrom, folders: list[Path]) -> Iterator[CodeFault]:
    """Names that the model imports of a module beside it, and which that does not define."""
    name = f"{node.module}.py"
    path = next((folder / name for folder in folders if (folder / name).is_file()), None)
    if path is None:
        return  # a package of the server's Python
    try:
        tree = _parsed(path)
    except _Unreadable as error:
        yield CodeFault(name, str(error))
        return
    absent = [alias.name for alias in node.names if alias.name != "*" and not _binds(tree, alias.name)]
    if absent:
        yield CodeFault(name, f"does not define {', '.join(f'`{name}`' for name in absent)}, which the model imports")


class _Unreadable(Exception):  # noqa: N818 - a reason, caught in this file
    pass


def _parsed(path: Path) -> ast.Module:
    try:
        if path.stat().st_size > _SOURCE_BYTES_MAX:
            raise _Unreadable(f"has {path.stat().st_size:,} bytes, expected up to {_SOURCE_BYTES_MAX:,}")
        source = path.read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # The compiler sees more than the parser: `return` outside a function. Neither runs anything.
            compile(source, path.name, "exec", dont_inherit=True)
            return ast.parse(source, path.name)
    except SyntaxError as error:
        place = f"line {error.lineno}: " if error.lineno else ""
        raise _Unreadable(f"is not Python: {place}{error.msg}") from error
    except (ValueError, RecursionError, MemoryError) as error:
        raise _Unreadable(f"is not Python: {error or 'nested too deeply'}") from error
    except OSError as error:
        raise _Unreadable(f"cannot be read: {error.strerror}") from error


def _binds(tree: ast.Module, name: str) -> bool:
    """Whether a module may define a name; `import *` may define any."""
    if any(isinstance(node, ast.Global) and name in node.names for node in ast.walk(tree)):
        return True
    found: set[str] = set()
    left: list[ast.AST] = list(tree.body)
    while left:
        node = left.pop()
        match node:
            case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                found.add(node.name)
                continue  # what it defines is not the module's
            case ast.Lambda():
                continue
            case ast.Import() | ast.ImportFrom():
                found |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
            case ast.Name(ctx=ast.Store()):
                found.add(node.id)
        left.extend(ast.iter_child_nodes(node))
    return name in found or "*" in found


def _lacks_execute(node: ast.stmt) -> bool:
    """Whether this is the model's class without `execute`; one with bases or decorators may get it there."""
    if not isinstance(node, ast.ClassDef) or node.name != MODEL_CLASS:
        return False
    if node.bases or node.keywords or node.decorator_list:
        return False
    return not _binds(ast.Module(node.body, []), "execute")
