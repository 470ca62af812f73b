"""The page on a real Triton server, by hand and in a real browser: preview, picture, download, refusals."""

from __future__ import annotations

import base64
import http.client
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from conftest import run_cli
from l2p_runtime import Coarse, Pipeline
from l2p_runtime.client.page import PageServer, PageSpec, open_page
from tools.chromium import CHROMIUM, MISSING, Browser, browse
from tools.triton_server import Server, serve

if TYPE_CHECKING:
    from conftest import Bundles

PROMPT = "a red circle"
SEED = 2**64 - 1
STREAM = "/v2/models/l2p_stream/generate_stream"
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason=MISSING)


@pytest.fixture(scope="module")
def server(bundles: Bundles, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("page")
    limits = ("--max-pixels", "4096", "--max-steps", "30", "--model", "l2p_stream", "--kind", "cpu")
    written = run_cli("triton", bundles.path("tiny-16-fused"), "--out", root / "repository", *limits)
    assert written.returncode == 0, written.stderr
    (root / "server").mkdir()
    with serve(root / "repository", root / "server") as running:
        assert not running.load("l2p_stream"), running.log.read_text()
        yield running


@pytest.fixture(scope="module")
def page(server: Server) -> Iterator[PageServer]:
    with open_page(PageSpec(server.http, port=0)) as opened:
        thread = threading.Thread(target=lambda: opened.serve_forever(poll_interval=0.05))
        thread.start()
        yield opened
        opened.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def expected(bundles: Bundles) -> np.ndarray:
    with Pipeline.open(bundles.path("tiny-16-fused"), backend="onnx") as pipe:
        return pipe.generate(PROMPT, height=32, width=48, steps=3, seed=SEED, guidance=2.5, negative_prompt="blue")


@pytest.fixture(scope="module")
def coarse_to_fine(bundles: Bundles) -> np.ndarray:
    coarse = Coarse(16, 32, renoise=0.6, steps=2, guidance=2.5)
    with Pipeline.open(bundles.path("tiny-16-fused"), backend="onnx") as pipe:
        asked: dict[str, Any] = {"height": 32, "width": 64, "steps": 2, "guidance": 1.0, "coarse": coarse}
        return pipe.generate(PROMPT, positions="linear", base_grid=(1, 3), **asked)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browse() as opened:
        yield opened


@pytest.fixture
def browser(chromium: Browser, page: PageServer) -> Browser:
    """The page, ready to be asked."""
    chromium.open("about:blank")
    chromium.events.clear()
    for file in chromium.downloads.iterdir():
        file.unlink()
    chromium.open(page.url)
    chromium.wait("document.readyState == 'complete' && document.querySelector('#page')?.dataset.state == 'idle'")
    return chromium


def test_a_picture_travels_as_json_with_its_previews(page: PageServer, expected: np.ndarray, tmp_path: Path) -> None:
    asked = {"prompt": PROMPT, "height": 32, "width": 48, "steps": 3, "seed": SEED, "png": True}
    *previews, last = _events(page, asked | {"guidance": 2.5, "negative_prompt": "blue"})
    assert [event["step"] for event in previews] == [[1, 3], [2, 3], [3, 3]]
    for event in previews:
        assert _picture(base64.b64decode(event["preview_png"]), tmp_path)[0].shape == (32, 48, 3)
    pixels, text = _picture(base64.b64decode(last["image_png"]), tmp_path)
    np.testing.assert_array_equal(pixels, expected)
    report = json.loads(bytes(last["report"]))
    assert (text["prompt"], text["negative_prompt"], text["seed"]) == (PROMPT, "blue", str(SEED))
    assert json.loads(text["parameters"])["bundle"] == report["bundle"]
    assert report["seconds"]["all"] >= report["seconds"]["draw"]


@in_a_browser
def test_a_prompt_is_typed_seen_and_downloaded(browser: Browser, expected: np.ndarray, tmp_path: Path) -> None:
    assert browser.ask("document.activeElement.id") == "prompt"
    assert browser.ask("document.querySelector('#untrained').hidden")
    _fill(browser, {"size": "own"}, event="change")
    _fill(browser, {"width": "48", "height": "32", "steps": "3", "seed": str(SEED), "guidance": "2.5"})
    _fill(browser, {"negative": "blue"})
    browser.ask(_WATCH)
    browser.type(PROMPT)
    browser.press("Enter", 13, "\r")
    browser.wait("document.querySelector('#page').dataset.state == 'done'")
    assert browser.ask("window.seen") == ["waiting", "drawing", "done"]
    assert browser.ask("window.previews") >= 2
    assert browser.wait("document.querySelector('#picture').naturalWidth") == 48
    assert browser.ask("document.querySelector('#picture').alt") == PROMPT
    assert str(SEED) in browser.ask("document.querySelector('#facts').innerText")
    browser.click("#download")
    file = browser.downloaded()
    assert file.name == f"a-red-circle-{SEED}.png"
    pixels, text = _picture(file.read_bytes(), tmp_path)
    np.testing.assert_array_equal(pixels, expected)
    assert text["prompt"] == PROMPT
    assert browser.complaints() == []


def test_coarse_to_fine_travels_as_json(page: PageServer, coarse_to_fine: np.ndarray, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"prompt": PROMPT, "height": 32, "width": 64, "steps": 2, "guidance": 1, "png": True}
    asked |= {"coarse_height": 16, "coarse_width": 32, "renoise": 0.6, "fine_steps": 2, "fine_guidance": 2.5}
    *previews, last = _events(page, asked | {"positions": list(b"linear"), "base_grid": [1, 3]})
    assert [event["step"] for event in previews] == [[2, 4], [3, 4], [4, 4]]
    pixels, text = _picture(base64.b64decode(last["image_png"]), tmp_path)
    np.testing.assert_array_equal(pixels, coarse_to_fine)
    facts = json.loads(text["parameters"])
    assert facts["coarse"] == {"height": 16, "width": 32, "renoise": 0.6, "steps": 2, "guidance": 2.5}


@in_a_browser
def test_a_picture_is_drawn_coarse_to_fine(browser: Browser, coarse_to_fine: np.ndarray, tmp_path: Path) -> None:
    assert not browser.ask("document.querySelector('#beyond').hidden")
    assert not browser.ask("document.querySelector('#beyond').open")
    _fill(browser, {"size": "own"}, event="change")
    _fill(browser, {"width": "64", "height": "32", "steps": "2", "guidance": "1", "prompt": PROMPT})
    assert browser.ask("[...document.querySelector('#coarse').options].map(o => o.text)") == [
        "Off",
        "First at 32 \u00d7 16",
    ]
    _fill(browser, {"coarse": "2", "positions": "linear"}, event="change")
    _fill(browser, {"renoise": "1", "fine-steps": "29", "fine-guidance": "", "base-grid": "1 by 3"})
    browser.click("#draw")
    said = {
        "renoise": "More than 0 and less than 1.",
        "fine-steps": "With the steps above 31, up to 30.",
        "fine-guidance": "A number from 0 to 100.",
        "base-grid": "Rows and columns, as 64x64.",
    }
    for name, words in said.items():
        assert browser.ask(f"document.querySelector('#{name}-problem').textContent") == words
    assert browser.ask("document.querySelector('#beyond').open")
    assert browser.ask("document.activeElement.id") == "renoise"
    _fill(browser, {"renoise": "0.6", "fine-steps": "2", "fine-guidance": "2.5", "base-grid": "1x3"})
    browser.click("#draw")
    browser.wait("document.querySelector('#page').dataset.state == 'done'")
    assert "from 32 \u00d7 16, renoise 0.6, 2 fine steps" in browser.ask("document.querySelector('#facts').innerText")
    browser.click("#download")
    np.testing.assert_array_equal(_picture(browser.downloaded().read_bytes(), tmp_path)[0], coarse_to_fine)
    # A size that has no smaller one of its shape.
    _fill(browser, {"width": "16", "height": "16"})
    assert browser.ask("document.querySelector('#coarse').value") == ""
    assert browser.ask("document.querySelector('#coarse-settings').hidden")
    assert browser.complaints() == []


@in_a_browser
def test_a_model_of_an_earlier_version_has_no_such_fields(browser: Browser) -> None:
    browser.ask("at('positions').value = 'linear'; at('base-grid').value = 'wrong'; at('prompt').value = 'x'")
    assert browser.ask("Object.keys(beyondInputs(64, 64))") == ["positions"]
    assert not browser.ask("check(true)")
    browser.ask("limits = { ...limits, beyond: false }; offerBeyond()")
    assert browser.ask("at('beyond').hidden")
    assert browser.ask("Object.keys(beyondInputs(64, 64))") == []
    assert browser.ask("check(true)")


@in_a_browser
def test_a_refusal_is_shown_in_the_servers_words(browser: Browser) -> None:
    _fill(browser, {"prompt": "a b " * 1000})
    browser.click("#draw")
    browser.wait("document.querySelector('#page').dataset.state == 'refused'")
    assert browser.ask("document.querySelector('#refusal-title').innerText") == "The server refuses this"
    text = browser.ask("document.querySelector('#refusal-text').innerText")
    assert text.startswith("The prompt has 2011 tokens with its template, expected up to 512")
    assert "--" not in text
    assert browser.ask("document.querySelector('#refusal').getAttribute('role')") == "alert"
    assert browser.ask("document.querySelector('#draw').getAttribute('aria-disabled')") == "false"


@in_a_browser
def test_what_the_server_would_refuse_is_said_at_the_field(browser: Browser, server: Server) -> None:
    before = server.metric("l2p_requests_total", model="l2p_stream", result="refused")
    _fill(browser, {"size": "own"}, event="change")
    wrong: dict[str, tuple[dict[str, str], str]] = {
        "prompt": ({"prompt": " "}, "Say what to draw."),
        "size": ({"prompt": "x", "width": "33", "height": "32"}, "33 does not divide by 16; 32 and 48 do."),
        "steps": ({"width": "32", "steps": "31"}, "A whole number from 1 to 30."),
        "guidance": ({"steps": "1", "guidance": "101"}, "A number from 0 to 100."),
        "seed": ({"guidance": "1", "seed": str(2**64)}, f"A whole number from 0 to {2**64 - 1}."),
    }
    for name, (values, needle) in wrong.items():
        _fill(browser, values)
        browser.click("#draw")
        assert browser.ask(f"document.querySelector('#{name}-problem').textContent") == needle
    _fill(browser, {"seed": "0", "width": "128", "height": "48"})
    assert browser.ask("document.querySelector('#size-problem').textContent").startswith("6,144 pixels; the server")
    assert browser.ask("document.activeElement.id") == "seed"
    assert browser.ask("document.querySelector('#page').dataset.state") == "idle"
    assert server.metric("l2p_requests_total", model="l2p_stream", result="refused") == before


@in_a_browser
def test_stop_ends_the_drawing_on_the_server(browser: Browser, server: Server) -> None:
    before = server.metric("l2p_requests_total", model="l2p_stream", result="cancelled")
    _fill(browser, {"size": "own"}, event="change")
    _fill(browser, {"width": "64", "height": "64", "steps": "30", "prompt": PROMPT})
    browser.click("#draw")
    browser.wait("document.querySelector('#page').dataset.state == 'drawing'")
    browser.ask("document.querySelector('#stop').focus()")
    browser.press("Enter", 13, "\r")
    browser.wait("document.querySelector('#status').textContent == 'Stopped.'")
    assert browser.ask("document.activeElement.id") == "draw"
    end = time.monotonic() + 20
    while server.metric("l2p_requests_total", model="l2p_stream", result="cancelled") == before:
        assert time.monotonic() < end
        time.sleep(0.05)


@in_a_browser
def test_every_field_has_a_name_and_fits_a_narrow_window(browser: Browser) -> None:
    tree = browser.send("Accessibility.getFullAXTree")["nodes"]
    fields = [node for node in tree if node["role"]["value"] in ("textbox", "spinbutton", "combobox", "button")]
    assert len(fields) >= 7
    assert all(node["name"]["value"] for node in fields)
    try:
        for width in (320, 390, 800):
            browser.look(width, 800)
            assert browser.ask("document.documentElement.scrollWidth") == width
    finally:
        browser.look(1200, 800)


_WATCH = """
window.seen = [];
window.previews = 0;
new MutationObserver(() => {
  const state = document.querySelector('#page').dataset.state;
  if (window.seen.at(-1) !== state) window.seen.push(state);
}).observe(document.querySelector('#page'), { attributes: true });
new MutationObserver((found) => { window.previews += found.length; })
  .observe(document.querySelector('#picture'), { attributeFilter: ['src'] });
"""


def _fill(browser: Browser, values: dict[str, str], event: str = "input") -> None:
    """Set fields as their user would."""
    for name, value in values.items():
        browser.ask(
            f"(f => {{ f.value = {json.dumps(value)}; f.dispatchEvent(new Event('{event}', {{bubbles: true}})); }})"
            f"(document.querySelector('#{name}'))"
        )


def _events(page: PageServer, asked: dict[str, Any]) -> list[dict[str, Any]]:
    connection = http.client.HTTPConnection("127.0.0.1", page.server_address[1], timeout=60)
    connection.request("POST", STREAM, json.dumps(asked), {"Content-Type": "application/json"})
    with connection.getresponse() as reply:
        content = reply.read().decode()
    connection.close()
    return [json.loads(line.removeprefix("data:")) for line in content.splitlines() if line]


def _picture(data: bytes, folder: Path) -> tuple[np.ndarray, dict[str, str]]:
    """Pixels and texts of a PNG file."""
    (folder / "x.png").write_bytes(data)
    with Image.open(folder / "x.png") as image:
        image.load()
        return np.asarray(image), dict(image.text)  # type: ignore[attr-defined]
