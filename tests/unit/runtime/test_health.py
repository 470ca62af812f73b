"""The health check against servers that answer otherwise than a model of ours."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from l2p_runtime.client.health import check_health

REPORT = json.dumps({"bundle": "b" * 64, "seconds": {"all": 0.5}}).encode()
GOOD = {"outputs": [{"name": "report", "data": list(REPORT)}]}
CONFIG = {"input": [{"name": "prompt", "data_type": "TYPE_STRING", "dims": ["1"]}]}


@contextmanager
def answering(answers: dict[str, Any]) -> Iterator[str]:
    """A server whose models give these answers; None is none at all."""
    end = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(CONFIG)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            if self.path.endswith("/index"):
                self._send([{"name": name, "state": "READY"} for name in answers])
            elif (answer := answers[self.path.split("/")[3]]) is None:
                end.wait(10)
            else:
                self._send(answer)

        def _send(self, answer: Any) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        end.set()
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_model_that_never_answers_does_not_hide_the_others() -> None:
    started = time.monotonic()
    with answering({"l2p": None, "l2p_embeddings": GOOD}) as url:
        waits, draws = check_health(url, timeout_s=0.5)
    assert not waits.healthy
    assert "timed out" in waits.reason
    assert (draws.healthy, draws.bundle, draws.seconds) == (True, "b" * 64, 0.5)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    "answer",
    [
        {},
        [],
        {"outputs": []},
        {"outputs": [{"name": "report", "data": []}]},
        {"outputs": [{"name": "report", "data": ["x"]}]},
        {"outputs": [{"name": "report", "data": list(b"[1]")}]},
        {"outputs": [{"name": "report", "data": list(b"{}")}]},
    ],
)
def test_an_answer_without_a_report_is_not_healthy(answer: Any) -> None:
    with answering({"l2p": answer}) as url:
        (found,) = check_health(url, timeout_s=5)
    assert not found.healthy
    assert "without a report" in found.reason
