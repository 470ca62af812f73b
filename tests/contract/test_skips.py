"""In CI, a test that is skipped because something is missing fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
CODE = """
import pytest

def test_tool():
    pytest.skip("there is no abacus on this machine")

def test_rights():
    pytest.skip("root reads every file")

@pytest.mark.skipif(True, reason="nothing compiles here")
def test_mark():
    pass
"""
MODULE = "import pytest\npytest.importorskip('a_module_that_nobody_has')\n"


@pytest.mark.parametrize(("ci", "found"), [("true", "1 failed, 1 skipped, 2 errors"), ("", "4 skipped")])
def test_what_is_missing(tmp_path: Path, ci: str, found: str) -> None:
    (tmp_path / "test_code.py").write_text(CODE, encoding="utf-8")
    (tmp_path / "test_module.py").write_text(MODULE, encoding="utf-8")
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "conftest", "--continue-on-collection-errors"]
    environment = os.environ | {"CI": ci, "PYTHONPATH": str(TESTS)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.stdout.splitlines()[-1].startswith(f"{found} in "), result.stdout
    assert ("in CI nothing may be missing: there is no abacus" in result.stdout) == bool(ci)
