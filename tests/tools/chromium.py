"""A real browser for tests: Debian's Chromium without a window, told what to do through its DevTools pipe.

The protocol is JSON messages that end in a zero byte, written to the browser's descriptor 3 and read from its
descriptor 4 (https://chromedevtools.github.io/devtools-protocol/), so no driver and no package is needed.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, Queue
from typing import Any

CHROMIUM = os.environ.get("L2P_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
MISSING = "there is no Chromium on this machine: apt-get install chromium, or set L2P_CHROMIUM"
ANSWER_SECONDS = 60
_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
    "--remote-debugging-pipe", "--no-first-run", "--no-default-browser-check", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-extensions", "--disable-features=Translate",
    "--force-color-profile=srgb", "--lang=en-US", "about:blank",
)  # fmt: skip

_START = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
for place, end in enumerate(ends, start=3):
    os.dup2(end, place)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""Puts the two ends where Chromium looks for them, then becomes Chromium."""


class Browser:
    """One page of a browser; made by `browse`."""

    def __init__(self, to_browser: int, from_browser: int, downloads: Path) -> None:
        self.downloads = downloads
        self.events: list[dict[str, Any]] = []
        self._to, self._number, self._session = to_browser, 0, ""
        self._answers: Queue[dict[str, Any]] = Queue()
        threading.Thread(target=self._listen, args=(from_browser,), daemon=True).start()
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(downloads), eventsEnabled=True)

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command and its result."""
        self._number += 1
        number = self._number
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session and not method.startswith(("Target.", "Browser.")):
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            try:
                answer = self._answers.get(timeout=ANSWER_SECONDS)
            except Empty:
                raise AssertionError(f"the browser did not answer {method}") from None
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]  # type: ignore[no-any-return]

    def look(self, width: int, height: int, *, dark: bool = False, scale: float = 1.0) -> None:
        """Size of the window in CSS pixels, and whether its user prefers dark pages."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, url: str) -> None:
        """Go to a page."""
        self.send("Page.navigate", url=url)

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, expression: str, seconds: float = 60) -> Any:
        """The value of an expression as soon as it is true."""
        end = time.monotonic() + seconds
        while not (value := self.ask(expression)):
            assert time.monotonic() < end, (expression, self.ask("document.body.innerText"))
            time.sleep(0.05)
        return value

    def type(self, text: str) -> None:
        """Text into the field that has the focus."""
        self.send("Input.insertText", text=text)

    def press(self, key: str, code: int, text: str = "") -> None:
        """One key, by its DOM name and number."""
        facts: dict[str, Any] = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self.send("Input.dispatchKeyEvent", type="keyDown", text=text, **facts)
        self.send("Input.dispatchKeyEvent", type="keyUp", **facts)

    def click(self, selector: str) -> None:
        """The middle of an element, with the mouse."""
        name = json.dumps(selector)
        self.ask(f"document.querySelector({name}).scrollIntoView({{block: 'center'}})")
        box = self.ask(f"(r => [r.x + r.width / 2, r.y + r.height / 2])"
                       f"(document.querySelector({name}).getBoundingClientRect())")  # fmt: skip
        facts: dict[str, Any] = {"x": box[0], "y": box[1], "button": "left", "clickCount": 1}
        self.send("Input.dispatchMouseEvent", type="mousePressed", **facts)
        self.send("Input.dispatchMouseEvent", type="mouseReleased", **facts)

    def downloaded(self, seconds: float = 30) -> Path:
        """The one file that was downloaded, when it is whole."""
        end = time.monotonic() + seconds
        while True:
            files = list(self.downloads.iterdir())
            if files and not any(file.suffix == ".crdownload" for file in files):
                (found,) = files
                return found
            assert time.monotonic() < end, "no download came"
            time.sleep(0.05)

    def screenshot(self) -> bytes:
        """What the window shows, as PNG."""
        return base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"])

    def complaints(self) -> list[str]:
        """What the console and the page's scripts complained of, and requests that left this machine."""
        self.ask("1")
        found = []
        for event in list(self.events):
            facts = event.get("params", {})
            if event["method"] == "Runtime.exceptionThrown":
                found.append(json.dumps(facts["exceptionDetails"]))
            elif event["method"] == "Log.entryAdded" and facts["entry"]["level"] in ("warning", "error"):
                found.append(facts["entry"]["text"])
            elif event["method"] == "Network.requestWillBeSent":
                url = facts["request"]["url"]
                if not url.startswith(("http://127.0.0.1:", "blob:http://127.0.0.1:", "data:", "about:")):
                    found.append(f"a request to {url}")
        return found

    def _listen(self, descriptor: int) -> None:
        with suppress(OSError), os.fdopen(descriptor, "rb", closefd=True) as pipe:
            held = b""
            while data := os.read(pipe.fileno(), 1 << 20):
                *messages, held = (held + data).split(b"\0")
                for message in map(json.loads, messages):
                    if "id" in message:
                        self._answers.put(message)
                    else:
                        self.events.append(message)


@contextmanager
def browse(width: int = 1200, height: int = 800) -> Iterator[Browser]:
    """A browser with a profile of its own, gone afterwards."""
    assert CHROMIUM, MISSING
    with tempfile.TemporaryDirectory(prefix="l2p-chromium-", ignore_cleanup_errors=True) as work:
        (downloads := Path(work) / "downloads").mkdir()
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        start = [sys.executable, "-c", _START, str(theirs_in), str(theirs_out), CHROMIUM]
        process = subprocess.Popen(
            [*start, f"--user-data-dir={work}/profile", *_FLAGS],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            browser = Browser(ours_out, ours_in, downloads)
            browser.look(width, height)
            yield browser
            with suppress(AssertionError, OSError):
                browser.send("Browser.close")
        finally:
            os.close(ours_out)
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
