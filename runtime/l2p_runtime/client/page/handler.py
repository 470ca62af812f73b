"""Answers a browser's requests: the page's files, the limits of a model, and a picture as it is drawn."""

from __future__ import annotations

import http.client
import json
import re
import select
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2p_runtime.errors import HostError, L2PError, UsageError

if TYPE_CHECKING:
    from l2p_runtime.client.page import PageServer

MODEL = "/v2/models/l2p_stream"
FILES: Mapping[str, tuple[str, str]] = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/beyond.js": ("beyond.js", "text/javascript; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
"""Path to a file beside this one and its type; no other file can be asked for."""

FIELDS: Mapping[str, tuple[type, ...]] = {
    "prompt": (str,),
    "negative_prompt": (str,),
    "height": (int,),
    "width": (int,),
    "seed": (int,),
    "steps": (int,),
    "guidance": (int, float),
    "positions": (list,),
    "base_grid": (list,),
    "coarse_height": (int,),
    "coarse_width": (int,),
    "renoise": (int, float),
    "fine_steps": (int,),
    "fine_guidance": (int, float),
    "png": (bool,),
}
"""What a picture may be asked with. Others, as the priority of a health request, are for the server's own side."""

_RANGES: Mapping[str, tuple[int, int]] = {"seed": (0, 2**64 - 1), "positions": (0, 255)}
"""Of what is no int32; `positions` are the bytes of a name."""

BODY_BYTES_MAX = 1 << 20
_ANSWER_BYTES_MAX = 4 << 20
_PIECE_BYTES = 1 << 16
_BROWSER_SECONDS = 30.0
_LOOK_SECONDS = 0.25
_LOCAL_NAMES = ("127.0.0.1", "localhost", "[::1]")
_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?")
_NUMBER = re.compile(r"[0-9]{1,9}")

_HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class Handler(BaseHTTPRequestHandler):
    """Answers one browser's connection."""

    server: PageServer
    protocol_version = "HTTP/1.1"
    timeout = _BROWSER_SECONDS

    def do_GET(self) -> None:
        """One of the page's files, or the configuration of the model."""
        path = self.path.partition("?")[0]
        if not self._is_for_us():
            return
        if path in FILES:
            name, kind = FILES[path]
            self._answer(200, (Path(__file__).parent / name).read_bytes(), kind)
        elif path == f"{MODEL}/config":
            self._pass_config()
        else:
            self.send_error(404, "there is no such page")

    def do_HEAD(self) -> None:
        """The same without its content."""
        self.do_GET()

    def do_POST(self) -> None:
        """A picture, as a stream of events."""
        if not self._is_for_us():
            return
        if self.path.partition("?")[0] != f"{MODEL}/generate_stream":
            self.send_error(404, "there is no such page")
            return
        size = self.headers.get("Content-Length", "")
        if self.headers.get("Content-Type", "").partition(";")[0].strip() != "application/json":
            # Any other site may send a form or plain text here; for JSON its browser asks first, and is not answered.
            self.send_error(415, "the request is not application/json")
        elif "Transfer-Encoding" in self.headers or not _NUMBER.fullmatch(size):
            self.send_error(411, "the request does not say its length")
        elif int(size) > BODY_BYTES_MAX:
            self.send_error(413, f"the request has {int(size):,} bytes, this page takes up to {BODY_BYTES_MAX:,}")
        else:
            try:
                body = checked_body(self.rfile.read(int(size)))
            except UsageError as error:
                self.send_error(400, str(error))
                return
            self._pass_stream(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """An error as Triton sends them, `{"error": "..."}`; the connection ends, as a body may be unread."""
        del explain
        self.close_connection = True
        text = message or http.client.responses.get(code, "the request is wrong")
        self._answer(code, json.dumps({"error": text}).encode(), "application/json")

    def version_string(self) -> str:
        """Without the versions, which are no stranger's matter."""
        return "l2p-export"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's name
        """Log nothing."""

    def _is_for_us(self) -> bool:
        """Refuse what another site has a browser send, under our name or under its own."""
        host, origin = self.headers.get("Host", "").lower(), self.headers.get("Origin")
        match = _HOST.fullmatch(host)
        if match is None or (self.server.local and match[1] not in (*_LOCAL_NAMES, *self.server.spec.names)):
            self.send_error(421, "this page has another name; use the address that `l2p-export triton page` printed")
        elif origin is not None and origin.lower().partition("://")[2] != host:
            self.send_error(403, "another site's page may not draw here")
        else:
            return True
        return False

    def _answer(self, code: int, body: bytes, kind: str) -> None:
        self._head(code, kind)
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, code: int, kind: str) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        for name, value in _HEADERS.items():
            self.send_header(name, value)

    def _pass_config(self) -> None:
        try:
            with self._asked("GET", "config", b"") as reply:
                status, content = reply.status, reply.read(_ANSWER_BYTES_MAX)
            if status != 200:
                raise HostError(f"{self._place()} has no model `l2p_stream` that is ready")
        except (L2PError, OSError, http.client.HTTPException) as error:
            self.send_error(502, self._said(error))
            return
        self._answer(200, content, "application/json")

    def _pass_stream(self, body: bytes) -> None:
        """Pass a picture on as it is drawn. A browser that goes away has the server stop drawing."""
        self.close_connection = True
        begun = False
        try:
            with self._asked("POST", "generate_stream", body) as reply:
                self._head(reply.status, "text/event-stream" if reply.status == 200 else "application/json")
                self.send_header("Connection", "close")
                self.end_headers()
                begun = True
                if reply.status != 200:
                    error = _refusal(reply.read(_ANSWER_BYTES_MAX))
                    self.wfile.write(json.dumps({"error": error}).encode())
                    return
                while piece := reply.read1(_PIECE_BYTES):
                    self.wfile.write(piece)
        except (L2PError, OSError, http.client.HTTPException) as error:
            if not begun:
                self.send_error(504 if isinstance(error, TimeoutError) else 502, self._said(error))
                return
            with suppress(OSError):
                # The lines before it end an event that was cut.
                self.wfile.write(b"\n\ndata: " + json.dumps({"error": self._said(error)}).encode() + b"\n\n")

    @contextmanager
    def _asked(self, method: str, what: str, body: bytes) -> Iterator[http.client.HTTPResponse]:
        """The server's answer; it is hung up on when the browser goes away.

        Raises:
            HostError: no server answers.
            OSError: it fell silent, or went away.
            http.client.HTTPException: it went away in the middle.
        """
        try:
            upstream = self.server.connect()
        except OSError as error:
            raise HostError(f"no server answers at {self._place()}") from error
        try:
            with _hanging_up(self.connection, upstream.sock):
                upstream.request(method, f"{MODEL}/{what}", body or None, {"Content-Type": "application/json"})
                with upstream.getresponse() as reply:
                    yield reply
        finally:
            upstream.close()

    def _place(self) -> str:
        return self.server.spec.server.rstrip("/")

    def _said(self, error: BaseException) -> str:
        if isinstance(error, L2PError):
            return str(error)
        if isinstance(error, TimeoutError):
            return f"the server said nothing for {self.server.spec.timeout_s:g} s"
        return "the server went away"


def checked_body(data: bytes) -> bytes:
    """A request for a picture with what it may hold.

    Raises:
        UsageError: no JSON object, a name that is unknown, or a value of another type.
    """
    try:
        asked = json.loads(data, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise UsageError("the request is no JSON") from error
    if not isinstance(asked, dict):
        raise UsageError("the request is no JSON object")
    for name, value in asked.items():
        if name not in FIELDS:
            raise UsageError(f"the request holds {name[:40]!r}, expected {', '.join(FIELDS)}")
        if type(value) not in FIELDS[name]:
            kinds = {str: "text", int: "a whole number", float: "a number", bool: "true or false", list: "a list"}
            raise UsageError(f"{name} is {str(value)[:40]!r}, expected {kinds[FIELDS[name][-1]]}")
        _check_numbers(name, value if isinstance(value, list) else [value])
    return json.dumps(asked).encode()


def _check_numbers(name: str, values: list[Any]) -> None:
    """Refuse whole numbers that the input cannot hold, and all else in a list."""
    low, high = _RANGES.get(name, (-(2**31), 2**31 - 1))
    for value in values:
        if FIELDS[name] == (list,) and type(value) is not int:
            raise UsageError(f"{name} holds {str(value)[:40]!r}, expected whole numbers")
        if type(value) is int and not low <= value <= high:
            raise UsageError(f"{name} is {str(value)[:40]}, expected {low} to {high}")


def _no_number(text: str) -> None:
    raise ValueError(text)


@contextmanager
def _hanging_up(browser: socket.socket, upstream: socket.socket) -> Iterator[None]:
    """Hang up on the server as soon as the browser does: it then stops drawing."""
    done = threading.Event()

    def watch() -> None:
        poll = select.poll()
        poll.register(browser, select.POLLIN | select.POLLRDHUP)
        while not done.is_set():
            if poll.poll(_LOOK_SECONDS * 1000) and not done.is_set():
                with suppress(OSError):
                    if browser.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                        done.wait(_LOOK_SECONDS)
                        continue
                with suppress(OSError):
                    upstream.shutdown(socket.SHUT_RDWR)
                return

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _refusal(content: bytes) -> str:
    """What the server says in an answer that is no picture: JSON, or one event that holds JSON."""
    text = content.decode(errors="replace").strip().removeprefix("data:").strip()
    try:
        return str(json.loads(text)["error"])
    except (ValueError, KeyError, TypeError):
        return "the server refused, and did not say why"
