"""The examples of docs/embedding.md, with stand-ins for the host applications."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from fakes.hosts import Houdini, Nuke
from l2p_runtime import CancelledError, HostError

if TYPE_CHECKING:
    from conftest import Bundles

PAGE = Path(__file__).parents[2] / "docs/embedding.md"
KIND = "tiny-16-fused"
SIZE = {"height": 32, "width": 48}


@pytest.fixture
def example(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Runs the example below a heading with modules of a host; gives what it defines."""
    blocks = re.findall(r"^## (.+?)$.*?^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4

    def run(heading: str, *hosts: types.ModuleType) -> types.SimpleNamespace:
        for host in hosts:
            monkeypatch.setitem(sys.modules, host.__name__, host)
        names: dict[str, Any] = {}
        exec(dict(blocks)[heading], names)  # noqa: S102 - our own page
        return types.SimpleNamespace(**names)

    return run


def test_in_the_hosts_python(example: Any, bundles: Bundles, tmp_path: Path) -> None:
    out = tmp_path / "x.png"
    example("In the host's Python").draw_image(bundles.path(KIND), "a red circle", out, **SIZE)
    with Image.open(out) as image:
        assert image.size == (48, 32)
        assert image.text["prompt"] == "a red circle"


def test_houdini_shows_progress_and_interrupts(example: Any, bundles: Bundles, tmp_path: Path) -> None:
    hou, out = Houdini(), tmp_path / "x.png"
    example("Progress and cancel in Houdini", hou).draw_with_bar(bundles.path(KIND), "a red circle", out, **SIZE)
    assert hou.shares == sorted(hou.shares)
    assert {0.0, 0.5} <= set(hou.shares)
    assert out.is_file()
    out.unlink()
    hou = Houdini(interrupt_after=2)
    with pytest.raises(CancelledError):
        example("Progress and cancel in Houdini", hou).draw_with_bar(bundles.path(KIND), "a red circle", out, **SIZE)
    assert hou.open_bars == 0
    assert not out.exists()


def test_nuke_draws_in_a_thread_and_makes_a_node(example: Any, bundles: Bundles, tmp_path: Path) -> None:
    for nuke, prompt, files, messages in (
        (Nuke(), "a red circle", 1, 0),
        (Nuke(cancel_after=2), "a red circle", 0, 0),
        (Nuke(), "a circle " * 600, 0, 1),
    ):
        out = tmp_path / f"{files}{messages}.exr"
        module = example("Progress and cancel in Nuke", nuke)
        module.draw_into_read_node(bundles.path(KIND), prompt, out, **SIZE).join(60)
        assert nuke.files == [str(out)] * files
        assert len(nuke.messages) == messages
        assert out.exists() == bool(files)
        assert nuke.percents == ([50, 100] if files else [])


def test_in_another_process(example: Any, bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As a host sets them; the worker would not start with either.
    monkeypatch.setenv("PYTHONHOME", str(tmp_path))
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    module, bundle, socket = example("In another process"), bundles.path(KIND), tmp_path / "own" / "socket"
    out, shares = tmp_path / "x.png", []
    module.start(str(Path(sys.executable).with_name("l2p-export")), str(bundle), str(socket))
    try:
        module.draw_outside(bundle, socket, "a red circle", out, size="48x32", progress=shares.append)
        assert shares == [0.5, 1.0]
        with Image.open(out) as image:
            assert image.size == (48, 32)
        with pytest.raises(CancelledError):
            module.draw_outside(bundle, socket, "a red circle", out, size="48x32", cancelled=lambda: True)
        facts = module.draw(socket, bundle, tmp_path / "y.##.png", frames="3-4", prompt="x", size="32x32")
        assert (facts["written"], facts["failed"]) == (2, [])
        again = module.draw(
            socket, bundle, tmp_path / "y.##.png", frames="3-4", prompt="x", size="32x32", skip_existing=True
        )
        assert again["skipped"] == 2
    finally:
        module.stop(socket)
    with pytest.raises(HostError, match="no worker listens"):
        module.draw_outside(bundle, socket, "a red circle", out)
