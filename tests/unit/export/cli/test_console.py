"""Progress on terminals of any width, and errors for scripts."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import run_cli
from l2p_export.cli.console import _cut

WATCHED = """
import fcntl, struct, sys, termios, time
fcntl.ioctl(2, termios.TIOCSWINSZ, struct.pack("HHHH", 24, int(sys.argv[1]), 0, 0))
from l2p_export.cli.console import Console
console = Console(quiet=False)
with console.task("writing a file with the longest of all possible names " + sys.argv[2], 1 << 30) as advance:
    for _ in range(6):
        advance(1 << 20)
        time.sleep(0.11)
    console.note("about the result")
with console.phases("building an engine " + sys.argv[2]) as tell:
    for part in range(5):
        tell(part / 5, "a phase with a name that is long as well")
        time.sleep(0.11)
"""


def columns(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else not unicodedata.combining(c) for c in text)


def on_terminal(width: int, name: str) -> str:
    """What a terminal of a width was sent."""
    parent, child = pty.openpty()
    command = [sys.executable, "-c", WATCHED, str(width), name]
    with subprocess.Popen(command, stderr=child, env={**os.environ, "TERM": "xterm"}) as process:
        os.close(child)
        sent = b""
        try:
            while data := os.read(parent, 4096):
                sent += data
        except OSError:  # how a terminal ends
            pass
        os.close(parent)
    assert process.returncode == 0
    return sent.decode()


@pytest.mark.parametrize("width", [60, 20, 1])
def test_a_redrawn_line_fits_the_terminal(width: int) -> None:
    name = "\u7ea2\u8272" * 20
    lines = on_terminal(width, name).split("\r\n")
    # One line for each task that ended and for the note, whatever was redrawn on them.
    assert len(lines) == 4
    assert "note: about the result" in lines[0]
    redrawn = [text for line in lines for text in line.split("\r\x1b[K")[:-1]]
    assert len(redrawn) > 8
    assert all(columns(text) < width for text in redrawn if text)
    assert "note: about the result" not in redrawn


@given(st.text(max_size=80), st.integers(0, 90))
def test_cutting_keeps_what_fits(text: str, width: int) -> None:
    cut = _cut(text, width)
    assert columns(cut) <= width
    assert cut == text or ((columns(text) > width and text.startswith(cut.removesuffix("..."))) or set(cut) <= {"."})


def error(*arguments: str | Path, code: int) -> dict[str, object]:
    result = run_cli(*arguments)
    assert result.returncode == code, result.stderr
    data = json.loads(result.stdout)
    assert list(data) == ["error"]
    assert list(data["error"]) == ["code", "found", "wanted", "hint"]
    assert data["error"]["code"] == code
    assert str(data["error"]["found"]) in result.stderr
    assert data["error"]["hint"] in result.stderr.replace("Try '", "").replace("-h' for help", "-help")
    found: dict[str, object] = data["error"]
    return found


def test_an_error_is_json_for_who_asked_for_json(tmp_path: Path) -> None:
    assert (
        error("store", "ls", tmp_path, "--json", code=3)["found"]
        == f"`{tmp_path}` is no store: it has no l2p-store.json"
    )
    assert "no checkpoint or bundle `nowhere`" in str(error("inspect", "nowhere", "--json", code=2)["found"])
    size = error("plan", "--profile", "4k", "--size", "big", "--json", code=2)
    assert (size["found"], size["wanted"]) == ("--size is 'big'", "WIDTHxHEIGHT as 1024x1024")
    assert "No such option" in str(error("plan", "--nonsense", "--json", code=2)["found"])
    assert "Missing" in str(error("import", "--json", code=2)["found"])


def test_no_json_for_who_asked_for_none(tmp_path: Path) -> None:
    for arguments in (("store", "ls", tmp_path), ("plan", "--nonsense")):
        result = run_cli(*arguments)
        assert (result.returncode != 0, result.stdout) == (True, "")


def test_a_result_is_followed_by_no_second_object(tmp_path: Path) -> None:
    (tmp_path / "l2p").mkdir()
    (tmp_path / "l2p" / "config.pbtxt").write_text("name: 7")
    result = run_cli("triton", "lint", tmp_path, "--json")
    assert result.returncode == 4
    assert json.loads(result.stdout)["findings"]
