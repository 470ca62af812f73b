"""The page's own server against a server that is made up: what it hands out, passes on, and refuses."""

from __future__ import annotations

import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from click.testing import CliRunner

import l2p_runtime.client.page as package
from l2p_export.cli.triton import command
from l2p_runtime import Coarse, HostError, UsageError
from l2p_runtime.client.page import PageServer, PageSpec, main, open_page
from l2p_runtime.client.page.handler import BODY_BYTES_MAX, FIELDS, FILES, checked_body
from l2p_runtime.policies import POSITIONS
from l2p_runtime.serving import INPUTS

STREAM = "/v2/models/l2p_stream/generate_stream"
CONFIG = "/v2/models/l2p_stream/config"
ASKED = {
    "prompt": "a red circle",
    "width": 32,
    "height": 16,
    "steps": 2,
    "guidance": 1.5,
    "seed": 2**64 - 1,
    "positions": list(b"linear"),
    "base_grid": [2, 3],
    "coarse_width": 16,
    "coarse_height": 16,
    "renoise": 0.7,
    "fine_steps": 1,
    "fine_guidance": 1,
    "png": True,
}
JSON = {"Content-Type": "application/json"}
EVENT = b'data: {"step":[1,2]}\n\n'


class Made(BaseHTTPRequestHandler):
    """A Triton server as the page sees it; `prompt` says what it does."""

    protocol_version = "HTTP/1.1"
    seen: ClassVar[list[tuple[str, Any]]] = []
    gone = threading.Event()
    go_on = threading.Event()

    def do_GET(self) -> None:
        self.seen.append((self.path, None))
        self._answer(200 if self.path == CONFIG else 400, b'{"name":"l2p_stream"}')

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append((self.path, asked))
        what = asked["prompt"]
        if what == "refuse":
            self._answer(400, b'data: {"error":"height is 17 px"}\n\n')
        elif what == "strange":
            self._answer(500, b"<p>oh")
        elif what == "vanish":
            self.close_connection = True
        elif what == "silent":
            self.go_on.wait(20)
        else:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self._piece(EVENT)
            if what == "cut":
                self.close_connection = True
            elif what == "wait":
                self._wait_for_the_end()
            else:
                self.go_on.wait(20)
                self._piece(b'data: {"image_png":"' + b"A" * 300_000 + b'"}\n\n')
                self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *args: Any) -> None:
        pass

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _piece(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def _wait_for_the_end(self) -> None:
        self.connection.settimeout(20)
        with suppress(ConnectionError):
            assert not self.connection.recv(1)
        self.close_connection = True
        self.gone.set()


@pytest.fixture
def triton() -> Iterator[ThreadingHTTPServer]:
    Made.seen, Made.gone, Made.go_on = [], threading.Event(), threading.Event()
    with _running(ThreadingHTTPServer(("127.0.0.1", 0), Made)) as server:
        yield server
        Made.go_on.set()


@pytest.fixture
def page(triton: ThreadingHTTPServer) -> Iterator[PageServer]:
    with _running(open_page(_spec(triton))) as server:
        yield server


def _spec(triton: ThreadingHTTPServer, **options: Any) -> PageSpec:
    return PageSpec(f"http://127.0.0.1:{triton.server_address[1]}", port=0, **options)


@contextmanager
def _running(server: Any) -> Iterator[Any]:
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def _asked(
    page: PageServer, method: str, path: str, body: object = None, headers: dict[str, str] = JSON
) -> Iterator[http.client.HTTPResponse]:
    connection = http.client.HTTPConnection("127.0.0.1", page.server_address[1], timeout=20)
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method, path, data, headers)
    with connection.getresponse() as reply:
        yield reply
    connection.close()


def _error(page: PageServer, *arguments: Any, **options: Any) -> tuple[int, str]:
    with _asked(page, *arguments, **options) as reply:
        return reply.status, json.loads(reply.read())["error"]


def test_the_pages_files_come_with_what_a_browser_needs(page: PageServer) -> None:
    for path, (name, kind) in FILES.items():
        with _asked(page, "GET", path) as reply:
            assert (reply.status, reply.getheader("Content-Type")) == (200, kind)
            assert reply.read() == (Path(package.__file__).parent / name).read_bytes()
            assert "default-src 'none'" in (reply.getheader("Content-Security-Policy") or "")
            assert reply.getheader("X-Content-Type-Options") == "nosniff"
            assert reply.getheader("Access-Control-Allow-Origin") is None
    with _asked(page, "HEAD", "/?from=here") as reply:
        assert (reply.status, reply.read()) == (200, b"")


def test_the_page_names_no_other_place() -> None:
    for name, _ in FILES.values():
        text = (Path(package.__file__).parent / name).read_text()
        assert not [part for part in ("https://", "//cdn", "@import", "url(") if part in text]
        assert text.count("http://") == text.count("http://www.w3.org/2000/svg")


def test_a_picture_may_be_asked_with_all_that_a_served_model_takes() -> None:
    assert FIELDS.keys() == {*INPUTS, "png"} - {"prompt_embeds", "negative_embeds"}


def test_the_page_offers_every_policy_and_the_defaults_of_coarse_to_fine() -> None:
    text = (Path(package.__file__).parent / "page.html").read_text()
    assert tuple(re.findall(r"<option>(.*)</option>", text)) == POSITIONS
    for name, default in (("renoise", 0.7), ("fine-steps", 4), ("fine-guidance", 1)):
        (found,) = re.findall(rf'<input id="{name}"[^>]* value="([^"]*)"', text)
        assert float(found) == default
    assert (Coarse(1, 1).renoise, Coarse(1, 1).steps, Coarse(1, 1).guidance) == (0.7, 4, 1)


@pytest.mark.parametrize(
    "path",
    [
        "/../handler.py", "/handler.py", "/%2e%2e/handler.py", "//etc/passwd", "/page.js/", "/..%2fhandler.py", "//[",
        "/page.html", "/\x7f",
        "/v2/health/ready", "/v2/repository/index", "/v2/models/l2p/config", f"{CONFIG}/../../l2p/stats",
    ],
)  # fmt: skip
def test_no_other_path_is_there(path: str, page: PageServer) -> None:
    with socket.create_connection(("127.0.0.1", page.server_address[1]), timeout=20) as raw:
        raw.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        answer = _all(raw)
    assert answer.startswith(b"HTTP/1.1 404"), answer
    assert Made.seen == []


@pytest.mark.parametrize("path", ["/v2/repository/models/l2p/unload", "/v2/models/l2p/infer", "/", CONFIG])
def test_nothing_else_is_passed_on(path: str, page: PageServer) -> None:
    assert _error(page, "POST", path, ASKED)[0] == 404
    with _asked(page, "DELETE", path) as reply:
        assert reply.status == 501
        assert "Python" not in str(reply.headers) + reply.read().decode()
    assert Made.seen == []


def test_the_configuration_is_passed_on(page: PageServer) -> None:
    with _asked(page, "GET", CONFIG) as reply:
        assert (reply.status, json.loads(reply.read())) == (200, {"name": "l2p_stream"})


def test_events_arrive_as_they_are_sent(page: PageServer) -> None:
    with _asked(page, "POST", STREAM, ASKED) as reply:
        assert (reply.status, reply.getheader("Content-Type")) == (200, "text/event-stream")
        assert reply.read(len(EVENT)) == EVENT
        Made.go_on.set()
        rest = reply.read()
    assert len(json.loads(rest.removeprefix(b"data: "))["image_png"]) == 300_000
    assert Made.seen == [(STREAM, ASKED)]


def test_a_refusal_is_passed_on_in_the_servers_words(page: PageServer) -> None:
    assert _error(page, "POST", STREAM, ASKED | {"prompt": "refuse"}) == (400, "height is 17 px")
    assert _error(page, "POST", STREAM, ASKED | {"prompt": "strange"}) == (
        500,
        "the server refused, and did not say why",
    )


def test_a_server_that_goes_away_is_told_of(page: PageServer) -> None:
    assert _error(page, "POST", STREAM, ASKED | {"prompt": "vanish"}) == (502, "the server went away")
    with _asked(page, "POST", STREAM, ASKED | {"prompt": "cut"}) as reply:
        assert reply.status == 200
        last = reply.read().strip().rpartition(b"\n")[2]
    assert json.loads(last.removeprefix(b"data: ")) == {"error": "the server went away"}


def test_a_server_that_is_not_there_is_told_of() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with _running(open_page(PageSpec(url, port=0))) as page:
            for call in (("GET", CONFIG), ("POST", STREAM, ASKED)):
                assert _error(page, *call) == (502, f"no server answers at {url}")


def test_a_silent_server_is_given_up(triton: ThreadingHTTPServer) -> None:
    with _running(open_page(_spec(triton, timeout_s=0.2))) as page:
        told = _error(page, "POST", STREAM, ASKED | {"prompt": "silent"})
    assert told == (504, "the server said nothing for 0.2 s")


def test_a_browser_that_goes_away_ends_the_drawing(page: PageServer) -> None:
    body = json.dumps(ASKED | {"prompt": "wait"}).encode()
    head = f"POST {STREAM} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with socket.create_connection(("127.0.0.1", page.server_address[1]), timeout=20) as raw:
        raw.sendall(head.encode() + b"\r\n\r\n" + body)
        assert raw.recv(100).startswith(b"HTTP/1.1 200")
        assert not Made.gone.is_set()
    assert Made.gone.wait(20)


STRANGERS: dict[str, tuple[int, dict[str, str]]] = {
    "another site": (403, {"Origin": "http://example.org"}),
    "another port": (403, {"Host": "localhost:1", "Origin": "http://localhost:2"}),
    "no address": (403, {"Origin": "http://[localhost"}),
    "no site": (403, {"Origin": "null"}),
    "a name that was bent": (421, {"Host": "example.org"}),
    "no name": (421, {"Host": "localhost/"}),
    "a form": (415, {"Content-Type": "text/plain"}),
    "no type": (415, {"Content-Type": ""}),
    "no length": (411, {"Content-Length": "x"}),
    "a negative length": (411, {"Content-Length": "-1"}),
    "pieces": (411, {"Transfer-Encoding": "chunked"}),
    "too large": (413, {"Content-Length": str(BODY_BYTES_MAX + 1)}),
    "absurd": (411, {"Content-Length": "9" * 4000}),
}


@pytest.mark.parametrize("case", STRANGERS)
def test_a_stranger_is_refused_before_the_body_is_read(case: str, page: PageServer) -> None:
    status, headers = STRANGERS[case]
    sent = {"Host": "localhost", "Content-Type": "application/json", "Content-Length": "2"} | headers
    with socket.create_connection(("127.0.0.1", page.server_address[1]), timeout=20) as raw:
        lines = "".join(f"{name}: {value}\r\n" for name, value in sent.items())
        raw.sendall(f"POST {STREAM} HTTP/1.1\r\n{lines}\r\n".encode())
        answer = _all(raw)
    assert answer.startswith(f"HTTP/1.1 {status} ".encode()), answer
    assert Made.seen == []


def test_its_own_page_is_let_through_by_every_name(page: PageServer) -> None:
    Made.go_on.set()
    for name in ("localhost:9000", "127.0.0.1", "[::1]:80"):
        headers = JSON | {"Host": name, "Origin": f"http://{name}"}
        with _asked(page, "POST", STREAM, ASKED, headers=headers) as reply:
            assert reply.status == 200


def test_a_web_server_in_front_gives_it_another_name(triton: ThreadingHTTPServer) -> None:
    headers = {"Host": "draw.example.org", "Origin": "https://draw.example.org"}
    with _running(open_page(_spec(triton, names=("draw.example.org",)))) as page:
        with _asked(page, "GET", "/", headers=headers) as reply:
            assert reply.status == 200
        assert _error(page, "GET", "/", headers=headers | {"Origin": "https://example.org"})[0] == 403


WRONG: dict[str, tuple[bytes, str]] = {
    "no JSON": (b"{", "is no JSON"),
    "deep": (b"[" * 100_000, "is no JSON"),
    "a list": (b"[1]", "no JSON object"),
    "no number": (b'{"guidance": NaN}', "is no JSON"),
    "huge": (b'{"seed": ' + b"9" * 5000 + b"}", "is no JSON"),
    "priority": (b'{"priority": 1}', "the request holds 'priority', expected prompt, negative_prompt"),
    "health": (b'{"health": true}', "the request holds 'health'"),
    "a text as number": (b'{"height": "16"}', "height is '16', expected a whole number"),
    "a fraction": (b'{"steps": 1.5}', "steps is '1.5', expected a whole number"),
    "true as number": (b'{"seed": true}', "seed is 'True', expected a whole number"),
    "a number as text": (b'{"prompt": 1}', "prompt is '1', expected text"),
    "seed": (b'{"seed": 18446744073709551616}', "expected 0 to 18446744073709551615"),
    "a name as text": (b'{"positions": "linear"}', "positions is 'linear', expected a list"),
    "no byte": (b'{"positions": [256]}', "positions is 256, expected 0 to 255"),
    "a grid of parts": (b'{"base_grid": [2, 1.5]}', "base_grid holds '1.5', expected whole numbers"),
    "a large grid": (b'{"base_grid": [2, 2147483648]}', "base_grid is 2147483648, expected -2147483648 to"),
    "a coarse size": (b'{"coarse_width": 16.5}', "coarse_width is '16.5', expected a whole number"),
    "renoise": (b'{"renoise": "0.7"}', "renoise is '0.7', expected a number"),
    "width": (b'{"width": 2147483648}', "expected -2147483648 to 2147483647"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_request_is_refused_in_words(case: str) -> None:
    data, needle = WRONG[case]
    with pytest.raises(UsageError) as caught:
        checked_body(data)
    assert needle in str(caught.value)


def test_a_wrong_request_is_no_crash(page: PageServer) -> None:
    assert _error(page, "POST", STREAM, b"{") == (400, "the request is no JSON")
    assert Made.seen == []


def test_too_many_connections_are_refused_at_once(page: PageServer) -> None:
    page._free = threading.BoundedSemaphore(1)
    with _asked(page, "POST", STREAM, ASKED) as reply:
        assert reply.read(len(EVENT)) == EVENT
        with _asked(page, "GET", "/") as second:
            assert second.status == 503
        Made.go_on.set()
        reply.read()
    end = time.monotonic() + 20
    while True:
        with _asked(page, "GET", "/") as third:
            if third.status == 200:
                break
        assert time.monotonic() < end


def test_what_cannot_be_served_is_refused() -> None:
    for wrong in ({"server": "grpc://localhost:1"}, {"server": "localhost"}, {"port": 70_000}, {"timeout_s": 0.0}):
        with pytest.raises(UsageError):
            PageSpec(**{"server": "http://localhost:8000", **wrong})  # type: ignore[arg-type]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        spec = PageSpec("http://localhost:8000", port=taken.getsockname()[1])
        with pytest.raises(HostError, match="cannot listen on 127"):
            open_page(spec)


def test_at_the_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    served: list[PageSpec] = []

    def serve_forever(self: PageServer) -> None:
        served.append(self.spec)
        raise KeyboardInterrupt

    monkeypatch.setattr(PageServer, "serve_forever", serve_forever)
    result = CliRunner().invoke(command, ["page", "http://127.0.0.1:8000", "--port", "0", "--timeout", "5"])
    assert result.stdout.startswith("http://127.0.0.1:")
    assert main(["http://127.0.0.1:8000", "0"]) == 130
    assert capsys.readouterr().out.startswith("http://127.0.0.1:")
    assert [(spec.server, spec.port, spec.timeout_s) for spec in served] == [
        ("http://127.0.0.1:8000", 0, 5.0),
        ("http://127.0.0.1:8000", 0, 600.0),
    ]
    assert main(["http://127.0.0.1:8000", "x"]) == 2
    assert main(["ftp://127.0.0.1:8000", "0"]) == 2


def _all(raw: socket.socket) -> bytes:
    found = b""
    while data := raw.recv(1 << 16):
        found += data
    return found
