"""Reading a Python model without running it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from l2p_export.serving.python_models import code_faults

GOOD = "class TritonPythonModel:\n    def execute(self, requests):\n        return []\n"

FOUND = {
    "in a branch": "try:\n    import x\nexcept ImportError:\n    class TritonPythonModel:\n        execute = None\n",
    "assigned": "Own = object\nTritonPythonModel = Own\n",
    "renamed": "from somewhere import Own as TritonPythonModel\n",
    "inherited": "class TritonPythonModel(Base):\n    pass\n",
    "decorated": "@served\nclass TritonPythonModel:\n    pass\n",
    "global": "def make():\n    global TritonPythonModel\n    TritonPythonModel = object\nmake()\n",
    "asynchronous": GOOD.replace("def", "async def"),
    "warns": f'{GOOD}x = "\\d"\n',
}

MISSED = {
    "": "defines no class",
    "class Triton_Python_Model: pass": "defines no class",
    "def f():\n    class TritonPythonModel: pass\n": "defines no class",
    "class A:\n    class TritonPythonModel: pass\n": "defines no class",
    "import TritonPythonModel.x as y\n": "defines no class",
    "class TritonPythonModel:\n    def excute(self, requests): pass\n": "no method `execute`",
    f"{GOOD}\tx = 1\n": "is not Python: line 4",
    f"{GOOD}await x\n": "is not Python: line 4",
    "(" * 5000: "is not Python",
    "-" * 200_000 + "1": "is not Python",
    "# " + "x" * (5 << 20): "expected up to",
}


def _said(tmp_path: Path, source: str | bytes) -> str:
    (tmp_path / "model.py").write_bytes(source.encode() if isinstance(source, str) else source)
    return "\n".join(f"{fault.file}: {fault.text}" for fault in code_faults(tmp_path, tmp_path))


@pytest.mark.parametrize("case", FOUND)
def test_the_class_is_found(case: str, tmp_path: Path) -> None:
    assert not _said(tmp_path, FOUND[case])


@pytest.mark.parametrize("source", MISSED, ids=lambda source: repr(source[:30]))
def test_what_is_missing_is_said(source: str, tmp_path: Path) -> None:
    assert MISSED[source] in _said(tmp_path, source)


def test_nothing_is_run(tmp_path: Path) -> None:
    assert not _said(tmp_path, f"{GOOD}open('{tmp_path}/ran', 'w').close()\nraise SystemExit(1)\n")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("glue", "text"),
    [("def Host(): pass\n", ""), ("def Hosts(): pass\n", "glue.py: does not define `Host`"), ("(", "glue.py: is not")],
)
def test_names_of_a_module_beside_it_are_looked_up(glue: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "glue.py").write_text(glue)
    said = _said(tmp_path, f"import json\nfrom glue import Host\nfrom elsewhere import thing\n{GOOD}")
    assert said.startswith(text)
    assert bool(said) == bool(text)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(source=st.one_of(st.binary(max_size=60), st.text(max_size=60).map(lambda text: f"{GOOD}{text}".encode())))
def test_python_agrees_on_what_is_python(source: bytes, tmp_path: Path) -> None:
    said = _said(tmp_path, source)
    try:
        compile(source, "model.py", "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        assert "is not Python" in said
    else:
        assert "is not Python" not in said


def test_deep_code_does_not_end_the_process(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("x" + ".a" * 100_000 + "\n")
    read = "from pathlib import Path; from l2p_export.serving.python_models import code_faults; "
    read += f"folder = Path({str(tmp_path)!r}); print(len(list(code_faults(folder, folder))))"
    done = subprocess.run([sys.executable, "-c", read], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
